"""Every teacher with all weights and with LoRA, at every ZeRO stage, in step and asynchronously: `make matrix`.

Each cell is two steps of SDPO on the real host with two policy ranks, and is written to docs/matrix.md as it went: it
trained (the weights moved, something was distilled), or it was refused, with the message. Besides, every way in which
DeepSpeed accumulates and reduces gradients has one gradient. Not part of `make test`: 100 cells take half an hour.
"""

import itertools
from pathlib import Path

import pytest
from common import LORA, ROWS, SDPO, TWO_RANKS, adapter, motion
from test_gradients import active, gradient, probed  # noqa: F401
from test_gradients import test_every_micro_batch_is_in_the_gradient as one_gradient

from sdpo_plugin.testing import RunFailed

PAGE = Path(__file__).parents[2] / "docs" / "matrix.md"
TEACHERS = ("live", "base", "ema", "trust_region")
CELLS = list(itertools.product(TEACHERS, ("full", "LoRA"), range(4), ("sync", "async")))


@pytest.fixture(scope="session")
def page():
    found = {}
    yield found
    lines = [
        "# Which combinations were trained", "",
        "Made by `make matrix`, which trains every cell with OpenRLHF on CPU, two policy ranks, two steps of SDPO:",
        "yes, if weights moved and tokens were distilled, or the message it was refused with.", "",
        "| teacher | weights | ZeRO | sync | async |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for teacher, weights, stage in itertools.product(TEACHERS, ("full", "LoRA"), range(4)):
        cells = [found.get((teacher, weights, stage, mode), "not run") for mode in ("sync", "async")]
        lines.append(f"| {teacher} | {weights} | {stage} | {cells[0]} | {cells[1]} |")
    PAGE.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("teacher", "weights", "stage", "mode"), CELLS)
def test_cell(openrlhf, model, reward, recorded, initial, page, teacher, weights, stage, mode):
    flags = [*SDPO, *TWO_RANKS, "--teacher.kind", teacher, "--ds.zero_stage", str(stage)]
    flags += LORA if weights == "LoRA" else ()
    try:
        if mode == "async":
            run = openrlhf(model, ROWS, reward, *flags, "--train.async_enable", "--train.num_episodes", "2")
        else:
            run = openrlhf(model, ROWS, reward, *flags, replay=recorded)
    except RunFailed as failure:
        page[teacher, weights, stage, mode] = "no: " + str(failure).strip().splitlines()[-1]
        raise
    losses = [loss for _, loss in run.metrics["train/self_distillation/loss"]]
    assert len(losses) >= 1 and all(loss > 0 for loss in losses)
    if weights == "LoRA":  # B starts at zero
        assert any(values.any() for name, values in adapter(run).items() if "lora_B" in name)
    else:
        assert motion(run, initial) > 0
    page[teacher, weights, stage, mode] = "yes"


GRADIENTS = itertools.product((1, 2, 3), ("offload", "none"), ("full", "lora"), ("once", "recomputed", "reentrant"))


@pytest.mark.parametrize(("stage", "optimizer", "weights", "layers"), GRADIENTS)
def test_gradient_cell(gradient, stage, optimizer, weights, layers):  # noqa: F811
    """The combinations that are not in the suite, too."""
    one_gradient(gradient, stage, optimizer, weights, layers)
