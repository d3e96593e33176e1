"""The EMA teacher on the real host: right in the last digits, at every ZeRO stage."""

import shutil
from pathlib import Path

import pytest
import torch
from common import ROWS, SDPO, ZERO

CELLS = ["1 rank", "zero0", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="session")
def many_steps(recorded, tmp_path_factory):
    """`many_steps(n)`: a directory with the recorded steps again and again, n of them."""

    def repeat(steps):
        directory = tmp_path_factory.mktemp("many")
        for step in range(steps):
            shutil.copy(recorded.directory / "samples" / f"{step % 2:05d}.pt", directory / f"{step:05d}.pt")
        return directory

    return repeat


@pytest.mark.parametrize(
    ("steps", "flags"), [(40, ()), (40, ZERO[0]), (40, ZERO[1]), (200, ZERO[2]), (40, ZERO[3])], ids=CELLS
)
def test_the_average_is_the_one_in_float64(
    openrlhf, model, reward, recorded, many_steps, monkeypatch, tmp_path, steps, flags
):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    run = openrlhf(
        model, ROWS, reward, *SDPO, *flags, "--actor.adam.lr", "1e-6", "--testing.replay", str(many_steps(steps)),
        "--probe.out", str(tmp_path / "found"), "--plugins", "sdpo_plugin.testing", "ema_probe", replay=recorded,
    )  # fmt: skip
    assert len(run.metrics["train/policy_loss"]) == steps
    parts = [part for file in tmp_path.glob("found.*") for part in torch.load(file).values()]
    error, motion = (sum(values).sqrt() for values in zip(*parts, strict=True))
    print(f"{steps} steps, {flags}: error {error / motion:.1e} of the motion, {motion:.1e}; {run.seconds:.0f} s")
    assert motion > 0 and error <= 1e-5 * motion
