"""Another model teaches, on the real host: of another width, with a padded vocabulary, at its own ZeRO stage."""

import pytest
import torch
from common import LORA, ROWS, TWO_RANKS, ZERO, adapter, cases, motion, same
from test_gradients import distance

from sdpo_plugin.testing import tiny_model

OPD = ("--algo", "opd", "--distill.topk", "20", "--algo.advantage.is_correction_level", "off")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    path = tiny_model(tmp_path_factory.mktemp("models") / "teacher", hidden=192, seed=1)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(112)
    model.save_pretrained(path)
    return ("--teacher.model_name_or_path", str(path))


@pytest.fixture(scope="session")
def gradient(openrlhf, model, reward, recorded, teacher, tmp_path_factory):
    """`gradient(*flags)`: of the first recorded step, in float32."""

    def run(*flags):
        out = tmp_path_factory.mktemp("gradient") / "gradients.pt"
        probe = ["--probe.out", str(out), "--probe.fp32", "--plugins", "probe"]
        openrlhf(model, ROWS, reward, *OPD, *teacher, *flags, *probe, replay=recorded)
        return torch.load(out)[0]

    return run


def test_the_student_moves_towards_another_model(replay, model, teacher, initial):
    run = replay(*OPD, *ZERO[2], "--train.max_epochs", "4", "--distill.is_clip", "none", *teacher)
    own = replay(*OPD, *ZERO[2], "--teacher.model_name_or_path", str(model))
    losses = [value for _, value in run.metrics["train/self_distillation/loss"]]
    assert losses[1] < losses[0] / 2
    assert abs(own.metrics["train/self_distillation/loss"][0][1]) < 1e-6  # it agrees with itself
    assert run.metrics["train/self_distillation/reprompt_sample_fraction"][0][1] == 1.0
    assert "train/teacher/context_kl" not in run.metrics  # there is no context
    assert motion(run, initial) > 0 and not same(run, own)


OWN_STAGE = {
    "2-3": ("2", ("--teacher.zero_stage", "3")), "3-offload": ("3", ("--teacher.zero_stage", "0", "--teacher.offload")),
}  # fmt: skip


@pytest.mark.parametrize(("student", "flags"), cases(OWN_STAGE, "2-3"))
def test_the_teacher_has_a_zero_stage_of_its_own(gradient, student, flags):
    own = gradient(*TWO_RANKS, "--ds.zero_stage", student, *flags)
    difference = distance(own, gradient())
    print(f"student {student}, teacher {flags}: relative difference {difference:.1e}")
    assert difference <= 1e-5


@pytest.mark.check
def test_a_lora_student_learns_from_a_whole_teacher(replay, teacher):
    run = replay(*OPD, *teacher, *ZERO[2], *LORA)
    assert any(values.any() for name, values in adapter(run).items() if "lora_B" in name)  # B starts at zero
