"""The EMA teacher: right in the last digits at every ZeRO stage, in bounded memory, and after a restart."""

import shutil
from pathlib import Path

import pytest
import torch
from common import ROWS, SDPO, ZERO, LargestTensor, same
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sdpo_plugin import teacher as teachers
from sdpo_plugin.config import TeacherConfig
from sdpo_plugin.sdpo import SDPO as Algorithm
from sdpo_plugin.teacher import EmaTeacher, Fragment
from sdpo_plugin.testing import fake_worker, tiny_model

STEPS = 40
PIECE_BYTES = 8192

# ── units: on a fake worker ──


def shard(rank, ranks, shift=0.0):
    """A worker that has its part of every parameter, the last rank nothing; `shift` tells its student from others."""
    worker = fake_worker()
    worker.rank, worker.ranks = rank, ranks

    def part(model):
        for name, p in model.named_parameters():
            size = -(-p.numel() // max(ranks - 1, 1))
            start = rank * size
            if start < p.numel():
                yield name, Fragment(start, p.data.view(-1)[start : start + size])

    worker.fragments = lambda: dict(part(worker.actor))
    worker.images = lambda model: {name: fragment.values for name, fragment in part(model)}
    for p in worker.actor.parameters():
        p.data += shift
    return worker


def ema(worker, **options):
    return EmaTeacher(worker.teacher_model(False, True), worker, TeacherConfig(**options))


def whole(pairs) -> dict[str, torch.Tensor]:
    """An average's pieces put together, by parameter."""
    found = {}
    for name, values in pairs:
        found.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in found.items()}


def moved(steps, **options) -> list[float]:
    """Where the teacher is after each step of a student that has moved by 1."""
    worker = fake_worker(teacher=options)
    plugin = Algorithm()
    plugin.openrlhf_worker_setup(worker)
    start = worker.actor.mix.weight.detach().clone()
    worker.actor.mix.weight.data += 1.0
    at = []
    for _ in range(steps):
        plugin.openrlhf_optimizer_step(worker)
        at.append((plugin.teacher.model.mix.weight - start).mean().item())
    return at


def test_the_average_waits_for_sync_steps():
    assert moved(6, sync_steps=3, update_rate=0.5) == pytest.approx([0.0, 0.0, 0.5, 0.5, 0.5, 0.75])


def test_rate_1_is_a_copy_every_so_many_steps():
    assert moved(4, sync_steps=2, update_rate=1.0) == pytest.approx([0.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(("before", "after"), [(1, 1), (3, 1), (1, 3), (4, 3)])
def test_the_average_survives_a_change_of_ranks(monkeypatch, tmp_path, before, after):
    monkeypatch.setattr(teachers, "PIECE_BYTES", 56)
    for rank in range(before):
        ema(shard(rank, before, shift=3.0)).save(str(tmp_path))
    restored = {}
    for rank in range(after):
        worker = shard(rank, after)
        teacher = ema(worker)
        teacher.load(str(tmp_path))
        for name, values in whole(teacher.average()).items():
            restored.setdefault(name, []).append(values)
    for name, p in fake_worker().actor.named_parameters():
        assert torch.equal(torch.cat(restored[name]), (p.data + 3.0).double().view(-1))


def test_a_restored_average_moves_at_the_rate_that_is_given(tmp_path):
    ema(shard(0, 1), update_rate=0.5).save(str(tmp_path))
    teacher = ema(shard(0, 1), update_rate=0.25)
    teacher.load(str(tmp_path))
    assert teacher.rate == 0.25


def test_a_rank_may_have_nothing_to_average(tmp_path):
    worker = shard(2, 3)
    assert not worker.fragments()
    teacher = ema(worker)
    teacher.after_optimizer_step()
    teacher.save(str(tmp_path))
    assert teacher.metrics()["teacher/ema_distance"] == 0.0


def test_the_average_is_kept_in_pieces(monkeypatch, tmp_path):
    monkeypatch.setattr(teachers, "PIECE_BYTES", 256)
    worker = shard(0, 1)
    assert max(p.nbytes for p in worker.actor.parameters()) > 1024
    teacher = ema(worker)
    for action, inputs in ((teacher.after_optimizer_step, ()), (teacher.save, [tmp_path]), (teacher.load, [tmp_path])):
        with LargestTensor() as largest:
            action(*inputs)
        assert 0 < largest.bytes <= 256


# ── the real host ──


@pytest.fixture(scope="session")
def many_steps(recorded, tmp_path_factory):
    """The recorded steps again and again."""
    directory = tmp_path_factory.mktemp("many")
    for step in range(STEPS):
        shutil.copy(recorded.directory / "samples" / f"{step % 2:05d}.pt", directory / f"{step:05d}.pt")
    return directory


@pytest.mark.parametrize("zero", ZERO, ids=["zero0", "zero1", "zero2", "zero3"])
def test_the_average_is_the_one_in_float64(openrlhf, model, reward, recorded, many_steps, monkeypatch, tmp_path, zero):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    run = openrlhf(
        model, ROWS, reward, *SDPO, *zero, "--actor.adam.lr", "1e-6", "--testing.replay", str(many_steps),
        "--probe.out", str(tmp_path / "found"), "--probe.piece_bytes", str(PIECE_BYTES),
        "--ckpt.save_steps", str(STEPS), "--plugins", "sdpo_plugin.testing", "ema_probe", replay=recorded,
    )  # fmt: skip
    assert len(run.metrics["train/policy_loss"]) == STEPS
    found = [torch.load(file) for file in tmp_path.glob("found.*")]
    assert len(found) == 2 and all(0 < size <= PIECE_BYTES for rank in found for size in rank["largest"].values())
    parts = [part for rank in found for part in rank["parts"].values()]
    error, motion = (sum(values).sqrt() for values in zip(*parts, strict=True))
    print(f"{zero}: error {error / motion:.1e} of the motion, {motion:.1e}; {run.seconds:.0f} s")
    assert motion > 0 and error <= 1e-5 * motion


@pytest.mark.parametrize("kind", ["ema", "trust_region"])
def test_offloaded_weights_are_on_the_device_only_while_read(
    openrlhf, model, reward, recorded, replay, monkeypatch, tmp_path, kind
):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    flags = (*SDPO, *ZERO[2], "--teacher.kind", kind, "--teacher.update_rate", "0.5", "--distill.weight", "0.5")
    run = openrlhf(
        model, ROWS, reward, *flags, "--teacher.offload", "--residence.out", str(tmp_path / "found"),
        "--plugins", "sdpo_plugin.testing", "residence", replay=recorded,
    )  # fmt: skip
    found = {line for file in tmp_path.glob("found.*") for line in file.read_text().splitlines()}
    assert found == {"21 of 21"}
    assert same(run, replay(*flags))


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_ranks_that_hold_nothing_but_padding(openrlhf, reward, recorded, monkeypatch, tmp_path, stage):
    """Two trained elements on four ranks."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
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
