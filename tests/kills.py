"""Twenty runs, each killed at a random moment and started again, all from fresh interpreters: `make kills`.

Not part of `make test`, where runs are killed at chosen moments (test_resume.py); this takes most of an hour.
"""

import contextlib
import random

import pytest
from common import ROWS, SDPO, TWO_RANKS, same

from sdpo_plugin.testing import RunFailed

FLAGS = (*SDPO, *TWO_RANKS, "--rollout.deterministic", "--train.num_episodes", "12", "--ckpt.save_steps", "1")


@pytest.fixture(scope="session")
def unkilled(openrlhf, model, reward):
    return openrlhf(model, ROWS, reward, *FLAGS, fresh=True)


@pytest.mark.parametrize("number", range(20))
def test_a_run_killed_at_any_moment_continues(openrlhf, model, reward, unkilled, tmp_path, number):
    moment = random.Random(number).uniform(0.35, 0.75) * unkilled.seconds  # later runs start faster than the first
    flags = [*FLAGS, "--ckpt.path", str(tmp_path / "ckpt")]
    with contextlib.suppress(RunFailed):  # it may have been faster
        openrlhf(model, ROWS, reward, *flags, fresh=True, timeout=moment)
    checkpoints = tmp_path / "ckpt" / "_actor"
    latest = (checkpoints / "latest").read_text() if (checkpoints / "latest").exists() else "none"
    found = sorted(path.name for path in checkpoints.glob("global_step*"))
    resumed = openrlhf(model, ROWS, reward, *flags, "--ckpt.load_enable", fresh=True)
    print(f"{number}: killed after {moment:.1f} s, latest {latest} of {found}")
    assert same(resumed, unkilled)
