"""Killed at any moment and started again, a run ends with the weights of one that was never killed, bit for bit."""

import copy
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sdpo_plugin.config import ConfigError
from sdpo_plugin.openrlhf_adapter.worker.checkpoint import (
    flags_win,
    mark_whole,
    mend_latest,
    name_latest,
    named_latest,
    prune,
    require_readable,
    require_source,
)

FLAGS = {"--ds.zero_stage": 2, "--ds.lora.rank": 0}


def test_latest_names_a_whole_checkpoint(tmp_path):
    """The host deletes old checkpoints before it saves, by their metric: what `latest` names may be among them."""
    for tag in ("global_step1", "global_step2", "global_step3"):
        (tmp_path / tag).mkdir()
    for tag in ("global_step1", "global_step2"):
        mark_whole(str(tmp_path), tag, FLAGS)
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


def test_what_is_not_whole_is_pruned_first_and_no_clock_decides(tmp_path):
    """A checkpoint that was cut off does not take the place of a whole one, and steps count where times are wrong."""
    tags = [f"global_step{step}" for step in (8, 9, 10, 11, 12)]
    for age, tag in enumerate(tags):
        (tmp_path / tag).mkdir()
        if tag != "global_step11":
            mark_whole(str(tmp_path), tag, FLAGS)
        os.utime(tmp_path / tag, (1e9 - age, 1e9 - age))  # the clock went backwards
    for max_num, left in ((4, (8, 9, 10, 12)), (2, (10, 12))):
        prune(str(tmp_path), max_num, "global_step12", lambda path: None)
        assert {path.name for path in tmp_path.iterdir()} == {f"global_step{i}" for i in left}
    name_latest(str(tmp_path), "global_step13")
    mend_latest(str(tmp_path))
    assert (tmp_path / "latest").read_text() == "global_step12"


def test_what_cannot_be_resumed_is_named_and_an_older_one_offered(tmp_path):
    for tag in ("global_step9", "global_step10"):
        (tmp_path / tag).mkdir()
        (tmp_path / tag / "states.pt").write_bytes(bytes(1000))
        mark_whole(str(tmp_path), tag, FLAGS)
        name_latest(str(tmp_path), tag)
    require_readable(str(tmp_path), FLAGS)
    with pytest.raises(ConfigError, match="^--ds.zero_stage 3: the checkpoint .*step10 was written with 2 and cannot"):
        require_readable(str(tmp_path), FLAGS | {"--ds.zero_stage": 3})
    os.truncate(tmp_path / "global_step10" / "states.pt", 10)
    with pytest.raises(ConfigError, match="states.pt has 10 bytes of 1,000; .*: echo global_step9 >"):
        require_readable(str(tmp_path), FLAGS)
    (tmp_path / "global_step9" / "states.pt").unlink()
    with pytest.raises(ConfigError, match="no other checkpoint is complete; give another --ckpt.path"):
        require_readable(str(tmp_path), FLAGS)
    for tag in ("global_step9", "global_step10"):  # as OpenRLHF alone writes it
        (tmp_path / tag / "whole").unlink()
    require_readable(str(tmp_path), FLAGS)
    shutil.rmtree(tmp_path)
    require_readable(str(tmp_path), FLAGS)


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


def test_a_universal_checkpoint_is_of_one_step_with_its_teacher(tmp_path):
    """DeepSpeed loads what `latest_universal` names; the rest is in the checkpoint that was converted."""
    require_source(str(tmp_path / "a run that starts anew"))
    with pytest.raises(ConfigError, match="has no latest_universal; convert a checkpoint there to NAME_universal"):
        require_source(str(tmp_path))
    for tag in ("global_step10", "global_step10_universal", "global_step20"):
        (tmp_path / tag).mkdir()
    for tag in ("global_step10", "global_step20"):
        mark_whole(str(tmp_path), tag, FLAGS)
        name_latest(str(tmp_path), tag)
    (tmp_path / "latest_universal").write_text("global_step10_universal")
    assert named_latest(str(tmp_path)) == "global_step20"
    assert named_latest(str(tmp_path), universal=True) == "global_step10"
    require_source(str(tmp_path))
    require_readable(str(tmp_path), {}, universal=True)
    (tmp_path / "global_step10").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="there is no .*global_step10, which has the teacher"):
        require_source(str(tmp_path))


def test_universal_checkpoints_are_not_pruned(tmp_path):
    tags = ["global_step1", "global_step1_universal", "global_step2", "global_step3"]
    for tag in tags:
        (tmp_path / tag).mkdir()
    prune(str(tmp_path), 2, "global_step3", lambda path: None)
    assert {path.name for path in tmp_path.iterdir()} == set(tags) - {"global_step1"}
