"""Teachers that vLLM engines score, on the real host: the gradient of a teacher on the policy workers."""

import pytest
import torch
from common import ROWS, TWO_RANKS
from test_gradients import distance

SDPO = ("--algo", "sdpo", "--distill.topk", "20", "--distill.support", "teacher")
ENGINE = ("--teacher.scored_by", "engine", "--teacher.gpu_memory_utilization", "0.1")


@pytest.fixture(scope="session")
def first_step(openrlhf, model, reward, recorded, tmp_path_factory):
    """`first_step(*flags)`: the gradient of the first recorded step, and the run."""

    def run(*flags):
        out = tmp_path_factory.mktemp("gradient") / "gradient.pt"
        flags = (*SDPO, *flags, "--gradient.out", str(out), "--plugins", "first_gradient")
        run = openrlhf(model, ROWS, reward, *flags, replay=recorded)
        return torch.load(out), run

    return run


def test_an_engine_gives_the_gradient_of_a_worker(first_step):
    base = ("--teacher.kind", "base")
    (engine, run), (worker, other) = first_step(*base, *ENGINE), first_step(*base)
    print(run.metrics["train/self_distillation/loss"], other.metrics["train/self_distillation/loss"], distance(engine, worker))
    print(run.metrics["train/timing/teacher_score"])
    assert distance(engine, worker) < 0.05
