"""At ZeRO-3 a teacher that is the student's own model leaves the student's trace alone: weights are gathered ahead."""

import pytest
from common import LORA, ROWS, SDPO, TWO_RANKS, cases

TEACHERS = {"live": ("live", ()), "lora-ema": ("ema", LORA), "lora-base": ("base", LORA), "separate": ("base", ())}


@pytest.mark.parametrize(("kind", "tuned"), cases(TEACHERS, "lora-ema"))
def test_a_teacher_s_passes_have_a_trace_of_their_own(openrlhf, model, reward, kind, tuned):
    """DeepSpeed gives a trace up where a pass differs from it: in every micro-batch, if they shared one."""
    run = openrlhf(
        model, ROWS, reward, *SDPO, *TWO_RANKS, *tuned, "--teacher.kind", kind, "--ds.zero_stage", "3",
        "--train.micro_batch_size", "2", "--train.num_episodes", "2", "--plugins", "prefetch",
    )  # fmt: skip
    given_up, passes = (run.metrics[f"train/prefetch/{name}"][-1][1] for name in ("given_up", "passes"))
    assert passes > 12 and given_up <= 2
