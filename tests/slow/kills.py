"""Twenty runs, each killed at a random moment and started again, all from fresh interpreters: `make kills`.

Not part of `make test`, where runs are killed at chosen moments (test_resume.py); this takes most of an hour.
"""

import random

import pytest
from common import ROWS, SDPO, TWO_RANKS, same

from sdpo_plugin.testing import RunFailed

FLAGS = (
    *SDPO, *TWO_RANKS, "--rollout.deterministic", "--train.num_episodes", "6", "--ckpt.save_steps", "1",
    "--rollout.batch_size", "4", "--rollout.micro_batch_size", "4", "--train.batch_size", "8",  # two steps an episode
    "--plugins", "sdpo_plugin.testing", "killer",
)  # fmt: skip


@pytest.fixture(scope="session")
def unkilled(openrlhf, model, reward):
    return openrlhf(model, ROWS, reward, *FLAGS, fresh=True)


@pytest.mark.parametrize("number", range(20))
def test_a_run_killed_at_any_moment_continues(openrlhf, model, reward, unkilled, tmp_path, number):
    steps = sum(seconds for _, seconds in unkilled.metrics["train/timing/step_total"])
    flags, delay = [*FLAGS, "--ckpt.path", str(tmp_path / "ckpt")], random.Random(number).uniform(0.0, steps)
    marker = tmp_path / "killed"
    killing = ["--killer.delay", str(delay), "--killer.marker", str(marker)]
    try:
        openrlhf(model, ROWS, reward, *flags, *killing, fresh=True)
    except RunFailed:
        assert marker.exists()  # else it was faster
    checkpoints = tmp_path / "ckpt" / "_actor"
    latest = (checkpoints / "latest").read_text() if (checkpoints / "latest").exists() else "none"
    found = sorted(path.name for path in checkpoints.glob("global_step*"))
    resumed = openrlhf(model, ROWS, reward, *flags, "--ckpt.load_enable", fresh=True)
    print(f"{number}: killed {marker.exists()}, {delay:.1f} s after the first rollout, latest {latest} of {found}")
    assert same(resumed, unkilled)
