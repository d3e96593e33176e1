"""The policy worker's gradient is the dense definition's, at every ZeRO stage, and no large logits exist in it."""

from pathlib import Path

import pytest
import torch
from common import ROWS, SDPO, ZERO
from probe import CHUNK_ROWS

from sdpo_plugin.testing import tiny_model


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True)


@pytest.mark.parametrize(
    ("stage", "tied"), [(0, False), (2, True), (3, False), (3, True)], ids=["0-untied", "2-tied", "3-untied", "3-tied"]
)
def test_gradient_is_the_definition_s(
    openrlhf, model, tied_model, reward, recorded, monkeypatch, tmp_path, stage, tied
):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    gradients, rows = {}, {}
    for form in ("fused", "dense"):
        out = tmp_path / f"{form}.pt"
        flags = [*SDPO, *ZERO[stage], "--probe.out", str(out), *(["--probe.dense"] if form == "dense" else [])]
        plugins = ["--plugins", "sdpo_plugin.testing", "probe"]
        run = openrlhf(tied_model if tied else model, ROWS, reward, *flags, *plugins, replay=recorded)
        gradients[form], rows[form] = torch.load(out), run.metrics["train/probe/logit_rows"][-1][1]
    difference = sum((gradients["fused"][n] - g).square().sum() for n, g in gradients["dense"].items()).sqrt()
    norm = sum(g.square().sum() for g in gradients["dense"].values()).sqrt()
    print(f"stage {stage}, tied {tied}: relative difference {difference / norm:.1e}")
    assert norm > 0 and difference <= 1e-5 * norm
    assert rows["fused"] <= CHUNK_ROWS < rows["dense"]  # the tracer sees what there is to see
