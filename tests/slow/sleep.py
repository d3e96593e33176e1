"""integration/test_sleep.py at every ZeRO stage that can sleep, full and LoRA, with every teacher that has tensors.

    make matrix
"""

import pytest
from common import LORA, ZERO
from test_sleep import FULL
from test_sleep import test_the_teacher_sleeps_with_the_optimizer as sleeps


@pytest.mark.parametrize("kind", ["ema", "base"])
@pytest.mark.parametrize("tuned", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("zero", ZERO[1:], ids=["zero1", "zero2", "zero3"])
def test_who_sleeps(openrlhf, model, reward, recorded, replay, tmp_path, zero, tuned, kind):
    sleeps(openrlhf, model, reward, recorded, replay, tmp_path, zero, tuned, kind)
