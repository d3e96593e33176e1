"""The EMA teacher: right in the last digits at every ZeRO stage, in bounded memory, and after a restart."""

import shutil

import pytest
import torch
from common import ROWS, SDPO, STAGES, ZERO, cases, same
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sdpo_plugin.testing import tiny_model

STEPS = 24
MAX_CHUNK_BYTES = 8192


# ── the real host ──


@pytest.fixture(scope="session")
def many_steps(recorded, tmp_path_factory):
    """The recorded steps again and again."""
    directory = tmp_path_factory.mktemp("many")
    for step in range(STEPS):
        shutil.copy(recorded.directory / "samples" / f"{step % 2:05d}.pt", directory / f"{step:05d}.pt")
    return directory


@pytest.mark.parametrize("zero", cases(STAGES, "zero2", "zero3"))
def test_the_ema_teacher_equals_one_in_float64(
    openrlhf, model, reward, recorded, many_steps, monkeypatch, tmp_path, zero
):
    run = openrlhf(
        model, ROWS, reward, *SDPO, *zero, "--actor.adam.lr", "1e-6", "--testing.replay", str(many_steps),
        "--probe.out", str(tmp_path / "found"), "--probe.piece_bytes", str(MAX_CHUNK_BYTES),
        "--ckpt.save_steps", str(STEPS), "--plugins", "sdpo_plugin.testing", "ema_probe", replay=recorded,
    )  # fmt: skip
    assert len(run.metrics["train/policy_loss"]) == STEPS
    found = [torch.load(file) for file in tmp_path.glob("found.*")]
    assert len(found) == 2 and all(0 < rank["largest"]["after_optimizer_step"] for rank in found)
    assert all(size <= MAX_CHUNK_BYTES for rank in found for size in rank["largest"].values())  # saving makes none
    parts = [part for rank in found for part in rank["parts"].values()]
    error, motion = (sum(values).sqrt() for values in zip(*parts, strict=True))
    print(f"{zero}: error {error / motion:.1e} of the motion, {motion:.1e}; {run.seconds:.0f} s")
    assert motion > 0 and error <= 1e-5 * motion


@pytest.mark.parametrize("kind", cases(["ema", "trust_region"], "ema"))
def test_offloaded_weights_are_on_the_device_only_while_read(
    openrlhf, model, reward, recorded, replay, monkeypatch, tmp_path, kind
):
    flags = (*SDPO, *ZERO[2], "--teacher.kind", kind, "--teacher.update_rate", "0.5", "--distill.weight", "0.5")
    run = openrlhf(
        model, ROWS, reward, *flags, "--teacher.offload", "--residence.out", str(tmp_path / "found"),
        "--plugins", "sdpo_plugin.testing", "residence", replay=recorded,
    )  # fmt: skip
    found = {line for file in tmp_path.glob("found.*") for line in file.read_text().splitlines()}
    assert found == {"21 of 21"}
    assert same(run, replay(*flags))


@pytest.mark.parametrize("stage", cases(["1", "2", "3"], "3"))
def test_ranks_that_hold_nothing_but_padding(openrlhf, reward, recorded, monkeypatch, tmp_path, stage):
    """Two trained elements on four ranks."""
    narrow = tiny_model(tmp_path / "model")
    shape = {"hidden_size": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
    config = LlamaConfig.from_pretrained(narrow, **shape)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(narrow)
    run = openrlhf(
        narrow, ROWS, reward, *SDPO, "--actor.num_gpus_per_node", "4",
        "--train.micro_batch_size", "4", "--rollout.micro_batch_size", "4", "--ds.zero_stage", stage, "--teacher.save",
        "--teacher.update_rate", "0.5", "--actor.adam.lr", "1e-1", "--plugins", "sdpo_plugin.testing", "frozen",
        replay=recorded,
    )  # fmt: skip
    teacher = load_file(run.directory / "model" / "teacher" / "model.safetensors")["model.norm.weight"]
    student = run.weights["model.norm.weight"]
    assert (teacher != 1).any() and (student != teacher).any()
    assert 0 < run.metrics["train/teacher/ema_distance"][-1][1] < 1  # and not NaN


@pytest.mark.check
def test_a_resumed_run_takes_new_flags(openrlhf, model, reward, recorded, tmp_path):
    """Of the average and of the optimizer; and without an engine."""
    flags = [*SDPO, *ZERO[2], "--ckpt.path", str(tmp_path), "--ckpt.save_steps", "1"]
    openrlhf(model, ROWS, reward, *flags, replay=recorded)
    run = openrlhf(
        model, ROWS, reward, *flags, "--ckpt.load_enable", "--teacher.update_rate", "0.01", "--actor.adam.lr", "1e-4",
        replay=recorded,
    )  # fmt: skip
    steps, rates = zip(*run.metrics["train/teacher/update_rate"], strict=True)
    assert steps == (3, 4) and rates == pytest.approx((0.01, 0.01))
    assert [value for _, value in run.metrics["train/actor_lr"]] == pytest.approx([1e-4, 1e-4])
