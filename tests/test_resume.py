"""Killed at any moment and started again, a run ends with the weights of one that was never killed, bit for bit."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import ROWS, SDPO, TWO_RANKS, same
from killer import POINTS

from sdpo_plugin.host.checkpoint import flags_win, mend_latest, name_latest, prune
from sdpo_plugin.testing import RunFailed

FLAGS = (
    *SDPO, *TWO_RANKS, "--rollout.deterministic", "--train.num_episodes", "2", "--ckpt.save_steps", "1",
    "--rollout.batch_size", "4", "--rollout.micro_batch_size", "4", "--train.batch_size", "8",  # two steps an episode
    "--ckpt.max_num", "1", "--plugins", "sdpo_plugin.testing", "killer",
)  # fmt: skip


@pytest.fixture(scope="session")
def unkilled(openrlhf, model, reward):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        return openrlhf(model, ROWS, reward, *FLAGS)


@pytest.mark.parametrize("at", POINTS)
def test_a_killed_run_continues(openrlhf, model, reward, unkilled, monkeypatch, tmp_path, at):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    flags = [*FLAGS, "--ckpt.path", str(tmp_path / "ckpt")]
    with pytest.raises(RunFailed, match="^-9;"):
        openrlhf(model, ROWS, reward, *flags, "--killer.at", at, "--killer.marker", str(tmp_path / "killed"))
    assert (tmp_path / "killed").exists()
    assert (tmp_path / "ckpt" / "_actor" / "latest").read_text() == "global_step1"
    resumed = openrlhf(model, ROWS, reward, *flags, "--ckpt.load_enable", "--vllm.num_engines", "2")
    for mine, theirs in zip(resumed.samples, unkilled.samples[1:], strict=True):
        assert all(torch.equal(a.sequences, b.sequences) for a, b in zip(mine, theirs, strict=True))
    assert same(resumed, unkilled)


def test_fresh_interpreters_make_the_same_run(openrlhf, model, reward, unkilled, monkeypatch, tmp_path):
    """As users start them: one killed, one that resumes, and both are one run with the forks of `unkilled`."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    flags = [*FLAGS, "--ckpt.path", str(tmp_path / "ckpt")]
    with pytest.raises(RunFailed, match="^-9;"):
        marker = str(tmp_path / "killed")
        openrlhf(model, ROWS, reward, *flags, "--killer.at", "batch", "--killer.marker", marker, fresh=True)
    assert (tmp_path / "ckpt" / "_actor" / "latest").read_text() == "global_step1"
    resumed = openrlhf(model, ROWS, reward, *flags, "--ckpt.load_enable", fresh=True)
    prompts = [[sample.labels[0] for sample in step] for step in resumed.samples]
    assert prompts == [[sample.labels[0] for sample in step] for step in unkilled.samples[1:]]
    assert same(resumed, unkilled)


def test_an_episode_that_was_over_is_not_repeated(openrlhf, model, reward, tmp_path):
    """Three prompts a step, two in the last: OpenRLHF saves that step under the episode it ended."""
    flags = [
        *SDPO, "--rollout.batch_size", "3", "--rollout.micro_batch_size", "2", "--train.batch_size", "6",
        "--train.micro_batch_size", "2", "--ckpt.save_steps", "1", "--ckpt.path", str(tmp_path / "ckpt"),
    ]  # fmt: skip
    first = openrlhf(model, ROWS, reward, *flags)
    again = openrlhf(model, ROWS, reward, *flags, "--ckpt.load_enable")
    assert [len(step) for step in first.samples] == [6, 6, 4] and again.samples == []
    assert same(again, first)


def test_latest_names_a_whole_checkpoint(tmp_path):
    """The host deletes old checkpoints before it saves, by their metric: what `latest` names may be among them."""
    for tag in ("global_step1", "global_step2", "global_step3"):
        (tmp_path / tag).mkdir()
    for tag in ("global_step1", "global_step2"):
        name_latest(str(tmp_path), tag)
    mend_latest(str(tmp_path))
    assert (tmp_path / "latest").read_text() == "global_step2"
    for file in (tmp_path / "global_step2").iterdir():
        file.unlink()
    (tmp_path / "global_step2").rmdir()
    mend_latest(str(tmp_path))
    assert (tmp_path / "latest").read_text() == "global_step1"
    mend_latest(str(tmp_path / "nothing there"))


def test_the_newest_checkpoint_is_never_pruned_and_best_ones_do_not_count(tmp_path):
    """In the host's order: without a metric first, then the worst."""
    metrics = {"global_step1": 0.9, "global_step2": 0.1, "global_step3": None, "global_step4": 0.0, "best_step1": 0.9}
    for tag in metrics:
        (tmp_path / tag).mkdir()
    for max_num, left in ((3, {"1", "2", "4"}), (2, {"1", "4"}), (1, {"4"})):
        prune(str(tmp_path), max_num, "global_step4", lambda path: metrics[Path(path).name])
        assert {path.name for path in tmp_path.iterdir()} == {f"global_step{i}" for i in left} | {"best_step1"}


def test_a_restored_optimizer_has_the_settings_that_are_given():
    """The learning rate where it was on its schedule, which falls with 1/n here."""

    def engine(lr, betas):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=lr, betas=betas)
        return SimpleNamespace(
            optimizer=optimizer, lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
        )

    saved = engine(1e-3, (0.9, 0.99))
    for _ in range(3):
        saved.optimizer.step()
        saved.lr_scheduler.step()

    def load(engine):
        engine.optimizer.load_state_dict(copy.deepcopy(saved.optimizer.state_dict()))
        engine.lr_scheduler.load_state_dict(copy.deepcopy(saved.lr_scheduler.state_dict()))

    for given, at in (((1e-3, (0.9, 0.99)), 1e-3 / 4), ((1e-4, (0.8, 0.9)), 1e-4 / 4)):
        restored = engine(*given)
        flags_win(load)(restored)
        (group,) = restored.optimizer.param_groups
        assert (group["lr"], group["betas"]) == (at, given[1])
        restored.optimizer.step()
        restored.lr_scheduler.step()
        assert restored.lr_scheduler.get_last_lr() == [group["lr"]] == [given[0] / 5]
