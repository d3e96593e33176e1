"""Killed at any moment and started again, a run ends with the weights of one that was never killed, bit for bit."""


import pytest
import torch
from common import ROWS, SDPO, TWO_RANKS, cases, same
from killer import POINTS

from sdpo_plugin.testing import RunFailed

FLAGS = (
    *SDPO, *TWO_RANKS, "--rollout.deterministic", "--train.num_episodes", "2", "--ckpt.save_steps", "1",
    "--rollout.batch_size", "4", "--rollout.micro_batch_size", "4", "--train.batch_size", "8",  # two steps an episode
    "--ckpt.max_num", "1", "--plugins", "sdpo_plugin.testing", "killer",
)  # fmt: skip


@pytest.fixture(scope="session")
def unkilled(openrlhf, model, reward):
    return openrlhf(model, ROWS, reward, *FLAGS)


ENGINE = ("--teacher.scored_by", "engine", "--teacher.gpu_memory_utilization", "0.1", "--distill.support", "teacher")


@pytest.mark.check
@pytest.mark.parametrize("kind", ["base", "ema"])
def test_a_killed_run_continues_with_a_teacher_in_an_engine(openrlhf, model, reward, unkilled, tmp_path, kind):
    flags = [*FLAGS[:-3], *ENGINE, "--teacher.kind", kind, "--teacher.update_rate", "0.9", *FLAGS[-3:]]
    never = openrlhf(model, ROWS, reward, *flags)
    flags += ["--ckpt.path", str(tmp_path / "ckpt")]
    with pytest.raises(RunFailed, match="^-9;"):
        marker = str(tmp_path / "killed")
        openrlhf(model, ROWS, reward, *flags, "--killer.at", "optimizer_step", "--killer.marker", marker)
    resumed = openrlhf(model, ROWS, reward, *flags, "--ckpt.load_enable", "--teacher.num_engines", "2")
    assert same(resumed, never) and not same(never, unkilled)


@pytest.mark.parametrize("at", cases(POINTS[1:], "save_checkpoint"))  # the first: below
def test_a_killed_run_continues(openrlhf, model, reward, unkilled, monkeypatch, tmp_path, at):
    flags = [*FLAGS, "--ckpt.path", str(tmp_path / "ckpt")]
    with pytest.raises(RunFailed, match="^-9;"):
        openrlhf(model, ROWS, reward, *flags, "--killer.at", at, "--killer.marker", str(tmp_path / "killed"))
    assert (tmp_path / "killed").exists()
    assert (tmp_path / "ckpt" / "_actor" / "latest").read_text() == "global_step1"
    resumed = openrlhf(model, ROWS, reward, *flags, "--ckpt.load_enable", "--vllm.num_engines", "2")
    for mine, theirs in zip(resumed.samples, unkilled.samples[1:], strict=True):
        assert all(torch.equal(a.sequences, b.sequences) for a, b in zip(mine, theirs, strict=True))
    assert same(resumed, unkilled)


@pytest.mark.check
def test_fresh_interpreters_make_the_same_run(openrlhf, model, reward, unkilled, monkeypatch, tmp_path):
    """As users start them: one killed, one that resumes, and both are one run with the forks of `unkilled`."""
    flags = [*FLAGS, "--ckpt.path", str(tmp_path / "ckpt")]
    with pytest.raises(RunFailed, match="^-9;"):
        marker = str(tmp_path / "killed")
        openrlhf(model, ROWS, reward, *flags, "--killer.at", "batch", "--killer.marker", marker, fresh=True)
    assert (tmp_path / "ckpt" / "_actor" / "latest").read_text() == "global_step1"
    resumed = openrlhf(model, ROWS, reward, *flags, "--ckpt.load_enable", fresh=True)
    prompts = [[sample.labels[0] for sample in step] for step in resumed.samples]
    assert prompts == [[sample.labels[0] for sample in step] for step in unkilled.samples[1:]]
    assert same(resumed, unkilled)


@pytest.mark.check
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
