"""The EMA teacher: right in the last digits at every ZeRO stage, in bounded memory, and after a restart."""


import pytest
import torch
from largest import LargestTensor

from sdpo_plugin.algorithms.sdpo import SDPO as Algorithm
from sdpo_plugin.algorithms.teacher import EmaTeacher
from sdpo_plugin.config import TeacherConfig
from sdpo_plugin.interface import models
from sdpo_plugin.interface.models import Fragment
from sdpo_plugin.testing import fake_worker

# ── units: on a fake worker ──


def shard(rank, ranks, shift=0.0):
    """A worker that has its part of every parameter, the last rank nothing; `shift` tells its student from others."""
    worker = fake_worker()
    worker.rank, worker.ranks = rank, ranks

    def part(model, rank=rank):
        for name, p in model.named_parameters():
            size = -(-p.numel() // max(ranks - 1, 1))
            start = rank * size
            if start < p.numel():
                yield name, Fragment(start, p.data.view(-1)[start : start + size])

    worker.fragments = lambda: dict(part(worker.actor))
    type(worker).layout = [
        [(name, fragment.start, len(fragment.values)) for name, fragment in part(worker.actor, rank)]
        for rank in range(ranks)
    ]
    for p in worker.actor.parameters():
        p.data += shift
    return worker


def ema(worker, **options):
    return EmaTeacher(worker.load_initial_model(False, True), worker, TeacherConfig(**options))


def whole(pairs) -> dict[str, torch.Tensor]:
    """An average's pieces put together, by parameter."""
    found = {}
    for name, values in pairs:
        found.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in found.items()}


def moved(steps, **options) -> list[float]:
    """Where the teacher is after each step of a student that has moved by 1."""
    worker = fake_worker(teacher=options)
    plugin = Algorithm(worker.args)
    plugin.openrlhf_worker_setup(worker)
    start = worker.actor.mix.weight.detach().clone()
    worker.actor.mix.weight.data += 1.0
    at = []
    for _ in range(steps):
        plugin.openrlhf_optimizer_step(worker)
        at.append((plugin.teacher.model.mix.weight - start).mean().item())
    return at


@pytest.mark.usefixtures("device")
def test_the_ema_teacher_waits_for_sync_steps():
    assert moved(6, sync_steps=3, update_rate=0.5) == pytest.approx([0.0, 0.0, 0.5, 0.5, 0.5, 0.75])


@pytest.mark.usefixtures("device")
def test_rate_1_is_a_copy_every_so_many_steps():
    assert moved(4, sync_steps=2, update_rate=1.0) == pytest.approx([0.0, 1.0, 1.0, 1.0])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("before", "after"), [(1, 1), (3, 1), (1, 3), (4, 3)])
def test_the_ema_teacher_survives_a_change_of_ranks(monkeypatch, tmp_path, before, after):
    monkeypatch.setattr(models, "MAX_CHUNK_BYTES", 56)
    for rank in range(before):
        ema(shard(rank, before, shift=3.0)).save(str(tmp_path))
    restored = {}
    for rank in range(after):
        worker = shard(rank, after)
        teacher = ema(worker)
        teacher.load(str(tmp_path))
        for name, values in whole(teacher.weights()).items():
            restored.setdefault(name, []).append(values)
    for name, p in fake_worker().actor.named_parameters():
        assert torch.equal(torch.cat(restored[name]), (p.data + 3.0).double().view(-1))


@pytest.mark.usefixtures("device")
def test_a_restored_ema_teacher_moves_at_the_rate_that_is_given(tmp_path):
    ema(shard(0, 1), update_rate=0.5).save(str(tmp_path))
    teacher = ema(shard(0, 1), update_rate=0.25)
    teacher.load(str(tmp_path))
    assert teacher.rate == 0.25


@pytest.mark.usefixtures("device")
def test_a_rank_may_have_nothing_to_average(tmp_path):
    worker = shard(2, 3)
    assert not worker.fragments()
    teacher = ema(worker)
    teacher.after_optimizer_step()
    teacher.save(str(tmp_path))
    assert teacher.metrics()["teacher/ema_distance"] == 0.0


@pytest.mark.usefixtures("device")
def test_the_ema_teacher_is_updated_in_chunks(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "MAX_CHUNK_BYTES", 256)
    worker = shard(0, 1)
    assert max(p.nbytes for p in worker.actor.parameters()) > 1024
    teacher = ema(worker)
    for action, inputs in ((teacher.after_optimizer_step, ()), (teacher.save, [tmp_path]), (teacher.load, [tmp_path])):
        with LargestTensor() as largest:
            action(*inputs)
        assert largest.bytes <= 256
        assert largest.bytes > 0 or action != teacher.after_optimizer_step


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_checkpoint_has_the_ema_once_and_bit_for_bit(tmp_path, dtype):
    """At ZeRO 0 every rank has all of it, and the first writes it: 6 bytes per parameter in bf16."""

    def of_rank(rank, seed):
        worker = fake_worker()
        worker.rank, worker.ranks = rank, 2
        initial = worker.load_initial_model(False, True).to(dtype)
        worker.load_initial_model = lambda *_: initial
        teacher = ema(worker, update_rate=0.3)
        torch.manual_seed(seed)
        for p in worker.actor.parameters():
            p.data += torch.randn_like(p)
        teacher.after_optimizer_step()
        return teacher

    saved = [of_rank(rank, seed=1) for rank in range(2)]
    for teacher in saved:
        teacher.save(str(tmp_path))
    numel = sum(p.numel() for p in saved[0].model.parameters())
    sizes = {path.suffix: path.stat().st_size for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 3
    assert sizes[".weights"] == dtype.itemsize * numel and sizes[".residual"] == 4 * numel
    restored = of_rank(1, seed=2)
    restored.load(str(tmp_path))
    for name, image in saved[1].model.weight_shards().items():
        assert torch.equal(restored.model.weight_shards()[name], image)
        assert torch.equal(restored.residual[name], saved[1].residual[name])
