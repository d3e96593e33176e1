"""The policy worker's gradient is the dense definition's, at every ZeRO stage, and no large logits exist in it."""

import shutil
from pathlib import Path

import pytest
import torch
from common import ROWS, SDPO, ZERO
from probe import CHUNK_ROWS

from sdpo_plugin.testing import tiny_model


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True)


@pytest.fixture(scope="session")
def twice(recorded, tmp_path_factory):
    """The first recorded step, two times."""
    directory = tmp_path_factory.mktemp("twice")
    for name in ("00000.pt", "00001.pt"):
        shutil.copy(recorded.directory / "samples" / "00000.pt", directory / name)
    return directory


@pytest.mark.parametrize(
    ("stage", "tied"), [(0, False), (2, False), (3, True)], ids=["0-untied", "2-untied", "3-tied"]
)
def test_gradient_is_the_definition_s(
    openrlhf, model, tied_model, reward, recorded, twice, monkeypatch, tmp_path, stage, tied
):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    flags = [*SDPO, *ZERO[stage], "--actor.adam.lr", "0", "--testing.replay", str(twice)]
    probe = ["--probe.out", str(tmp_path / "gradients.pt"), "--plugins", "sdpo_plugin.testing", "probe"]
    run = openrlhf(tied_model if tied else model, ROWS, reward, *flags, *probe, replay=recorded)
    fused, dense = torch.load(tmp_path / "gradients.pt")
    difference = sum((fused[name] - g).square().sum() for name, g in dense.items()).sqrt()
    norm = sum(g.square().sum() for g in dense.values()).sqrt()
    print(f"stage {stage}, tied {tied}: relative difference {difference / norm:.1e}")
    assert norm > 0 and difference <= 1e-5 * norm
    rows = [value for _, value in run.metrics["train/probe/logit_rows"]]
    assert rows[0] <= CHUNK_ROWS < rows[1]  # and the tracer sees what there is to see
