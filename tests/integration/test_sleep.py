"""`--train.colocate_all --vllm.enable_sleep --ds.enable_sleep`: who sleeps when, and that nothing else changes."""

import json
import shutil

import pytest
import torch
from common import LORA, ROWS, SDPO, TWO_RANKS, ZERO, adapter, cases, same

from sdpo_plugin.testing import RunFailed

SHARED = ("--train.colocate_all", "--vllm.enable_sleep", "--ds.enable_sleep")
FULL: tuple[str, ...] = ()


def whereabouts(directory) -> dict[str, dict[str, str]]:
    """By phase, where each part was, every time and on every rank."""
    found: dict[str, dict[str, set]] = {}
    for file in directory.glob("found.*"):
        for phase, places in map(json.loads, file.read_text().splitlines()):
            for part, where in places.items():
                found.setdefault(phase, {}).setdefault(part, set()).update(where)
    return {phase: {part: "/".join(sorted(w)) for part, w in parts.items()} for phase, parts in found.items()}


def final(run) -> dict:
    return adapter(run) if (run.directory / "model" / "adapter_config.json").exists() else run.weights


ASLEEP = {
    "zero2-lora-ema": (ZERO[2], LORA, "ema"), "zero3-full-ema": (ZERO[3], FULL, "ema"),
    "zero3-lora-base": (ZERO[3], LORA, "base"),
}  # fmt: skip  # all of them: tests/slow/sleep.py


@pytest.mark.parametrize(("zero", "tuned", "kind"), cases(ASLEEP, "zero3-full-ema"))
def test_the_teacher_sleeps_with_the_optimizer(openrlhf, model, reward, recorded, replay, tmp_path, zero, tuned, kind):
    flags = (*SDPO, *zero, *tuned, "--teacher.kind", kind, "--teacher.update_rate", "0.5", "--actor.adam.lr", "1e-3")
    run = openrlhf(
        model, ROWS, reward, *flags, *SHARED, "--whereabouts.out", str(tmp_path / "found"), "--ckpt.save_steps", "1",
        "--plugins", "sdpo_plugin.testing", "whereabouts", replay=recorded,
    )  # fmt: skip
    found = whereabouts(tmp_path)
    own = {"teacher"} if not tuned else set()
    parts = {"fp32 weights", "moments", "student"} | own | ({"residual"} if kind == "ema" else set())
    awake = dict.fromkeys(parts, "device")
    assert found["training"] == awake
    assert found["checkpoint"] == {part: "device" if part == "student" else "host" for part in parts}
    ours, theirs = final(run), final(replay(*flags))
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.check
@pytest.mark.parametrize("zero", ZERO[2:3], ids=["zero2"])
def test_a_checkpoint_of_sleepers_is_whole(openrlhf, model, reward, recorded, replay, tmp_path, zero):
    """OpenRLHF saves while the optimizer sleeps: one step, then one more from the checkpoint."""
    flags = (*SDPO, *zero, "--teacher.update_rate", "0.5", "--actor.adam.lr", "1e-3")
    first, second = sorted((recorded.directory / "samples").glob("*.pt"))
    for step, samples in enumerate((first, second)):
        (tmp_path / str(step)).mkdir()
        shutil.copy(samples, tmp_path / str(step))
        run = openrlhf(
            model, ROWS, reward, *flags, "--train.colocate_all", "--ds.enable_sleep",
            "--ckpt.path", str(tmp_path / "ckpt"), "--ckpt.save_steps", "1",
            "--testing.replay", str(tmp_path / str(step)), *(["--ckpt.load_enable"] if step else []), replay=recorded,
        )  # fmt: skip
    assert same(run, replay(*flags))


def test_engines_on_the_same_gpus(openrlhf, model, reward):
    flags = (*SDPO, "--train.num_episodes", "2", "--rollout.deterministic")
    assert same(openrlhf(model, ROWS, reward, *flags, *SHARED), openrlhf(model, ROWS, reward, *flags))


@pytest.mark.check
def test_an_asynchronous_run_shares_what_deepspeed_has(openrlhf, model, reward):
    """Policy and reference model on the same GPUs, the engine on its own."""
    run = openrlhf(
        model, ROWS, reward, *SDPO, *TWO_RANKS, "--train.num_episodes", "2", "--train.async_enable",
        "--train.colocate_all", "--ds.enable_sleep", "--algo.kl.use_loss", "--algo.kl.init_coef", "0.01",
        "--ref.num_gpus_per_node", "2", "--actor.adam.lr", "1e-3",
    )  # fmt: skip
    assert len(run.metrics["train/policy_loss"]) == 2 and run.metrics["train/teacher/ema_distance"][-1][1] > 0


def test_what_deepspeed_cannot_put_to_sleep_is_rejected(openrlhf, model, reward):
    with pytest.raises(RunFailed, match="--ds.enable_sleep: DeepSpeed can do it from --ds.zero_stage 1 on; give"):
        openrlhf(model, ROWS, reward, *SDPO, *ZERO[0], *SHARED)
