"""The EMA teacher on the real host: right in the last digits, at every ZeRO stage."""

import shutil
from pathlib import Path

import pytest
import torch
from common import ROWS, SDPO, ZERO

STEPS = 40


@pytest.fixture(scope="session")
def many_steps(recorded, tmp_path_factory):
    """The recorded steps again and again."""
    directory = tmp_path_factory.mktemp("many")
    for step in range(STEPS):
        shutil.copy(recorded.directory / "samples" / f"{step % 2:05d}.pt", directory / f"{step:05d}.pt")
    return directory


@pytest.mark.parametrize("zero", ZERO, ids=["zero0", "zero1", "zero2", "zero3"])
def test_the_average_is_the_one_in_float64(openrlhf, model, reward, recorded, many_steps, monkeypatch, tmp_path, zero):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    run = openrlhf(
        model, ROWS, reward, *SDPO, *zero, "--actor.adam.lr", "1e-6", "--testing.replay", str(many_steps),
        "--probe.out", str(tmp_path / "found"), "--plugins", "sdpo_plugin.testing", "ema_probe", replay=recorded,
    )  # fmt: skip
    assert len(run.metrics["train/policy_loss"]) == STEPS
    parts = [part for file in tmp_path.glob("found.*") for part in torch.load(file).values()]
    error, motion = (sum(values).sqrt() for values in zip(*parts, strict=True))
    print(f"{zero}: error {error / motion:.1e} of the motion, {motion:.1e}; {run.seconds:.0f} s")
    assert motion > 0 and error <= 1e-5 * motion
