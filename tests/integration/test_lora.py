"""LoRA on the real host: the engines follow the adapter, teachers are adapters, and a restart has both."""


import pytest
import torch
from common import LORA, ROWS, SDPO, TWO_RANKS, ZERO, adapter
from safetensors.torch import load_file


def test_the_engines_follow_the_adapter(openrlhf, model, reward, tmp_path):
    """What the engine says about its samples is what base model and saved adapter say together."""
    run = openrlhf(
        model, ROWS, reward, *SDPO, *TWO_RANKS, *LORA, "--train.num_episodes", "2", "--actor.adam.lr", "1e-2",
        "--algo.advantage.is_correction_level", "token", "--ckpt.save_hf", "--ckpt.save_steps", "1", "--ds.zero_stage",
        "3", "--teacher.save",
    )  # fmt: skip
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    said = {}
    for name in ("base", "adapted"):
        if name == "adapted":
            base = PeftModel.from_pretrained(base, run.directory / "ckpt" / "global_step1_hf")
        said[name] = torch.cat([_error(base, sample) for sample in run.samples[1]])
    # bf16 engine against float32: noise far below what one step at this learning rate changes.
    assert said["adapted"].mean() < 0.02 and said["base"].mean() > 5 * said["adapted"].mean(), said
    assert {"lora_A", "lora_B"} == {name.split(".")[-2] for name in adapter(run)}  # and no adapter of the teacher
    teacher = load_file(run.directory / "model" / "teacher" / "adapter_model.safetensors")
    assert teacher and any(values.any() for name, values in teacher.items() if "lora_B" in name)


def _error(model, sample) -> torch.Tensor:
    """How far the engine's log-probabilities of a sample's response tokens are from the model's."""
    with torch.no_grad():
        log_probs = model(sample.sequences).logits[:, :-1].float().log_softmax(-1)
    mine = log_probs.gather(-1, sample.sequences[:, 1:, None])[..., 0]
    return (mine - sample.rollout_log_probs).abs()[sample.action_mask.bool()]


@pytest.mark.check  # four runs each
@pytest.mark.parametrize("stage", ["2", "3"])
def test_teachers_are_adapters(replay, stage):
    """Alike before the first update and different after it, at every stage; and the student moves."""
    kinds, zero = ("base", "ema", "live", "trust_region"), ZERO[int(stage)]
    runs = {kind: replay(*SDPO, *LORA, "--teacher.kind", kind, *zero) for kind in kinds}
    assert all(values.any() for run in runs.values() for name, values in adapter(run).items() if "lora_B" in name)
    losses = {kind: [v for _, v in run.metrics["train/self_distillation/loss"]] for kind, run in runs.items()}
    assert all(first == pytest.approx(losses["base"][0], rel=1e-3) for first, _ in losses.values())
    assert len({second for _, second in losses.values()}) == 4
