"""The teachers of `--teacher.kind`: the student itself, the initial model, an EMA of the student, or another model.

A teacher returns final hidden states at response positions and an LM head, never logits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy
import torch

from sdpo_plugin.config import ConfigError, TeacherConfig
from sdpo_plugin.distillation.head import Head
from sdpo_plugin.interface.models import Model, TeacherModel, Worker, chunks

# Of each parameter: where its values are in the files beside it, the teacher's weights and their fp32 residual.
STATE = "teacher_rank{rank}.pt"
WEIGHTS, RESIDUAL = ".weights", ".residual"


def make_teacher(config: TeacherConfig, worker: Worker) -> Teacher:
    """The teacher of `--teacher.kind`, on this rank."""
    if config.scored_by == "engine":
        if config.kind != "ema":
            return EngineTeacher()
        return PublishedEmaTeacher(worker.load_initial_model(config.offload, updatable=True), worker, config)
    if config.kind == "live":
        return Teacher(worker.actor)
    if config.kind == "model":
        assert config.model_name_or_path is not None  # `TeacherConfig.check`
        return Teacher(worker.load_model(config.model_name_or_path, config.offload, config.zero_stage))
    initial = worker.load_initial_model(config.offload, updatable=config.kind == "ema")
    if config.kind == "ema":
        return EmaTeacher(initial, worker, config)
    return TrustRegionTeacher(initial, worker.actor, config.update_rate) if config.kind == "trust_region" else (
        Teacher(initial)
    )


class Teacher:
    """A teacher without state: `live` (its model is the student), `base` and `model` (their model never changes)."""

    rate: float  # the EMA rate or the trust region's; only teachers that use one have it

    def __init__(self, model: Model) -> None:
        self.model = model

    def hidden_states(self, *inputs: Any) -> torch.Tensor:
        """[N, H], see `Model.hidden_states`. Collective."""
        return self.model.hidden_states(*inputs)

    @contextmanager
    def head(self) -> Iterator[Any]:
        with self.model.gathered_head() as head:
            yield head

    def after_optimizer_step(self) -> None:
        """Update the teacher's weights; does nothing for a teacher that does not follow the student."""

    def metrics(self) -> dict[str, float]:
        """Metrics of the teacher after the last optimizer step."""
        return {}

    def device_tensors(self) -> list[torch.Tensor]:
        """The tensors that this teacher keeps in device memory between two steps, besides the student's."""
        return getattr(self.model, "device_tensors", list)()  # the student's own are not the teacher's

    def save(self, directory: str) -> None:
        """Write the state that cannot be rebuilt at a restart to `directory`, inside of OpenRLHF's checkpoint."""

    def load(self, directory: str) -> None:
        """Restore the state that `save` wrote."""


class EngineTeacher(Teacher):
    """A teacher of which the policy workers have nothing: vLLM engines hold its weights and score."""

    def __init__(self) -> None:
        self.model: Any = None


class TrustRegionTeacher(Teacher):
    """Logits `(1 - rate) base + rate student`: an interpolation between the initial model and the student.

    The sum of two heads' products is one product of concatenated hidden states and concatenated weights
    (`fused.Head.second_weight`).

    Raises:
        ConfigError: the model bounds its logits with a soft-cap.
    """

    def __init__(self, initial: Model, student: Model, rate: float) -> None:
        super().__init__(initial)
        self.student, self.rate = student, rate
        with initial.gathered_head() as head:
            if head.softcap is not None:
                raise ConfigError(
                    "--teacher.kind trust_region: this model bounds its logits (soft-cap), and they cannot be mixed "
                    "before that; use ema, base or live"
                )

    def hidden_states(self, *inputs: Any) -> torch.Tensor:
        initial, student = self.model.hidden_states(*inputs), self.student.hidden_states(*inputs)
        return torch.cat([initial.float() * (1.0 - self.rate), student.float() * self.rate], dim=-1)

    @contextmanager
    def head(self) -> Iterator[Head]:
        with self.model.gathered_head() as initial, self.student.gathered_head() as student:
            bias = None
            if initial.bias is not None and student.bias is not None:
                bias = torch.lerp(initial.bias, student.bias, self.rate)
            yield replace(initial, second_weight=student.weight, bias=bias)


class EmaTeacher(Teacher):
    """`t <- (1 - rate) t + rate s` every `sync_steps` optimizer steps, from the optimizer's fp32 master weights.

    At the usual learning rates, a bf16 EMA loses most of the student's motion, and rounding in an fp32 EMA amounts to
    about 1e-4 of it (docs/design.md). Here the EMA is the sum of the teacher's low-precision weights, which exist
    anyway, and an fp32 residual, which is sharded over the ranks like the master weights.

    Updates, checkpoints and loading are chunked: no temporary tensor is larger than `MAX_CHUNK_BYTES`.
    """

    model: TeacherModel

    def __init__(self, model: TeacherModel, worker: Worker, config: TeacherConfig) -> None:
        super().__init__(model)
        self.worker, self.config = worker, config
        self.steps, self.rate, self.distance = 0, config.update_rate, 0.0
        self.residual: dict[str, torch.Tensor] = {}
        shards = model.weight_shards()
        for name, fragment in worker.master_weights.fragments().items():
            device = torch.device("cpu") if config.offload else fragment.values.device
            pinned = config.offload and fragment.values.is_cuda
            self.residual[name] = residual = torch.empty(len(fragment.values), device=device, pin_memory=pinned)
            for chunk in chunks(len(residual)):
                self._write(shards[name][chunk], residual[chunk], fragment.values[chunk].double())
        model.sync()

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        self.steps += 1
        if self.steps % self.config.sync_steps:
            return
        shards = self.model.weight_shards()
        ahead, norm = [], []
        for name, fragment in self.worker.master_weights.fragments().items():
            for chunk in chunks(len(fragment.values)):
                student = fragment.values[chunk]
                ahead.append(self._follow(shards[name][chunk], self.residual[name][chunk], student))
                norm.append(student.norm())
        self.model.sync()
        # A rank may hold no weights: DeepSpeed pads a partition that is not divisible by the number of ranks.
        self.distance = float((1.0 - self.rate) * torch.stack(ahead).norm() / torch.stack(norm).norm()) if norm else 0.0

    def _follow(self, shard: torch.Tensor, kept: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """Update one chunk of the EMA in place, and return the norm of student minus EMA before the update.

        Args:
            shard: the teacher's low-precision weights.
            kept: their fp32 residual.
            student: the fp32 master weights.
        """
        device = shard.device if student.device.type == "cpu" else student.device  # the GPU, if one of them is there
        residual, student = kept.to(device), student.to(device)
        # Copy first, then convert: torch converts on the CPU while copying between CPU and GPU, which takes ten times
        # as long. All differences are between numbers close to each other, so float32 is precise enough for them.
        leading = shard.to(device).to(torch.float32, copy=True)
        difference = (student - leading).sub_(residual)
        residual.add_(difference, alpha=self.rate)
        moved = (leading + residual).to(shard.dtype)
        shard.copy_(moved)
        residual.add_(leading.sub_(moved))
        if residual is not kept:
            kept.copy_(residual)
        return difference.norm()

    def device_tensors(self) -> list[torch.Tensor]:
        return [*super().device_tensors(), *([] if self.config.offload else self.residual.values())]

    def metrics(self) -> dict[str, float]:
        """`ema_distance`: norm of student minus EMA relative to the student's norm, on this rank's shard."""
        return {"teacher/ema_distance": self.distance, "teacher/update_rate": self.rate}

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's shard of the EMA in chunks, in the layout of `MasterWeights.fragments`: name, float64 values."""
        shards = self.model.weight_shards()
        for name, residual in self.residual.items():
            for chunk in chunks(len(residual)):
                shard = shards[name][chunk]
                yield name, shard.double() + residual[chunk].to(shard.device).double()

    def _restore(
        self, shard: torch.Tensor, residual: torch.Tensor, saved: torch.Tensor, saved_residual: torch.Tensor
    ) -> None:
        """Set a chunk of the EMA to what was saved, bit for bit if the dtype is the same."""
        if saved.dtype != shard.dtype:
            return self._write(shard, residual, saved.double() + saved_residual.double())
        shard.copy_(saved)
        residual.copy_(saved_residual)

    def _write(self, shard: torch.Tensor, residual: torch.Tensor, values: torch.Tensor) -> None:
        """Set a chunk of the EMA, given by its low-precision weights and fp32 residual, to float64 values."""
        leading = values.to(shard.dtype)
        shard.copy_(leading)
        residual.copy_((values - leading.double()).to(residual.dtype))

    def save(self, directory: str) -> None:
        layout, rank = self.worker.master_weights.layout, self.worker.rank
        replicated = all(part == layout[0] for part in layout)  # ZeRO 0: every rank has all of it
        if replicated and rank > 0:
            return
        path, places, shards = os.path.join(directory, STATE.format(rank=rank)), {}, self.model.weight_shards()
        with open(path + WEIGHTS, "wb") as weights, open(path + RESIDUAL, "wb") as residual:
            for name, start, numel in layout[rank]:
                places[name] = (start, numel, shards[name].dtype, weights.tell(), residual.tell())
                for chunk in chunks(numel):
                    for values, file in ((shards[name][chunk], weights), (self.residual[name][chunk], residual)):
                        values.cpu().view(torch.uint8).numpy().tofile(file)
        state = {"steps": self.steps, "ranks": 1 if replicated else self.worker.ranks, "fragments": places}
        torch.save(state, path + ".tmp")
        os.replace(path + ".tmp", path)  # a killed run leaves either no file or a complete one

    @torch.no_grad()
    def load(self, directory: str) -> None:
        """Restore this rank's shard from the files of all ranks; the number of ranks may have changed.

        Raises:
            ConfigError: the checkpoint has no teacher because it was written without `--teacher.kind ema`.
        """
        shards, fragments = self.model.weight_shards(), self.worker.master_weights.fragments()
        rank, ranks = 0, 1
        while rank < ranks:
            path = os.path.join(directory, STATE.format(rank=rank))
            if not os.path.exists(path):
                raise ConfigError(
                    f"--teacher.kind ema: no teacher in {directory} ({os.path.basename(path)} is missing): this "
                    "checkpoint was written without --teacher.kind ema; resume with the teacher it was trained with"
                )
            saved = torch.load(path, weights_only=True)
            self.steps, ranks = saved["steps"], saved["ranks"]
            for name in fragments.keys() & saved["fragments"].keys():
                mine, (start, numel, *stored) = fragments[name], saved["fragments"][name]
                begin = max(mine.start, start)
                shared = min(mine.start + len(mine.values), start + numel) - begin
                for chunk in chunks(shared):
                    here = slice(begin - mine.start + chunk.start, begin - mine.start + chunk.stop)
                    first = begin - start + chunk.start
                    parts = _read(path, first, chunk.stop - chunk.start, *stored)
                    self._restore(shards[name][here], self.residual[name][here], *parts)
            rank += 1
        self.model.sync()


class PublishedEmaTeacher(EmaTeacher):
    """An EMA teacher that vLLM engines score: they get its low-precision weights after the rollout batch's updates."""

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        super().after_optimizer_step()
        self.worker.publish_to_engines(self.model)

    def load(self, directory: str) -> None:
        super().load(directory)
        self.worker.publish_to_engines(self.model)


def _read(
    path: str, first: int, numel: int, dtype: torch.dtype, weights: int, residual: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`numel` elements of a saved parameter from its element `first` on, both parts; it begins at these bytes."""
    found = []
    for suffix, kind, offset in ((WEIGHTS, dtype, weights), (RESIDUAL, torch.float32, residual)):
        size = kind.itemsize
        values = numpy.fromfile(path + suffix, numpy.uint8, numel * size, offset=offset + first * size)
        found.append(torch.from_numpy(values).view(kind))
    return found[0], found[1]
