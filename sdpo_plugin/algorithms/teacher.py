"""Whose weights read the teacher's context: the student's own, the initial ones, or a moving average of them.

A teacher hands over final hidden states at response positions and a head, never logits.
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
from sdpo_plugin.distillation.fused import Head
from sdpo_plugin.interface.micro_batch import Model, TeacherModel, Worker, pieces

STATE = "teacher_rank{rank}.pt"  # where each parameter's values are in the file beside it
VALUES = ".float64"


def make_teacher(config: TeacherConfig, worker: Worker) -> Teacher:
    """The teacher of `--teacher.kind`, on this rank."""
    if config.kind == "live":
        return Teacher(worker.actor)
    if config.kind == "model":
        assert config.model_name_or_path is not None  # `TeacherConfig.check`
        return Teacher(worker.model_at(config.model_name_or_path, config.offload, config.zero_stage))
    initial = worker.initial_model(config.offload, follows=config.kind == "ema")
    if config.kind == "ema":
        return EmaTeacher(initial, worker, config)
    return TrustRegionTeacher(initial, worker.actor, config.update_rate) if config.kind == "trust_region" else (
        Teacher(initial)
    )


class Teacher:
    """`live` (a teacher whose model is the student), `base` and `model` (whose model never changes)."""

    rate: float  # of a teacher that has one

    def __init__(self, model: Model) -> None:
        self.model = model

    def hidden_states(self, *inputs: Any) -> torch.Tensor:
        """As the model's."""
        return self.model.hidden_states(*inputs)

    @contextmanager
    def head(self) -> Iterator[Any]:
        with self.model.whole_head() as head:
            yield head

    def after_optimizer_step(self) -> None:
        """Follow the student, if this teacher does."""

    def metrics(self) -> dict[str, float]:
        """About the teacher, after the last optimizer step."""
        return {}

    def device_tensors(self) -> list[torch.Tensor]:
        """What it adds to the device's memory between two steps."""
        return getattr(self.model, "device_tensors", list)()  # the student's own are not the teacher's

    def save(self, directory: str) -> None:
        """Write what a restart cannot rebuild into OpenRLHF's checkpoint."""

    def load(self, directory: str) -> None:
        """Read what `save` wrote."""


class TrustRegionTeacher(Teacher):
    """Logits `(1 - rate) base + rate student`: the initial model, and what the student has learned since, a part of it.

    A sum of two heads' products is the product of what they are made of side by side, `fused.Head.beside`.
    """

    def __init__(self, initial: Model, student: Model, rate: float) -> None:
        super().__init__(initial)
        self.student, self.rate = student, rate
        with initial.whole_head() as head:
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
        with self.model.whole_head() as initial, self.student.whole_head() as student:
            bias = None
            if initial.bias is not None and student.bias is not None:
                bias = torch.lerp(initial.bias, student.bias, self.rate)
            yield replace(initial, beside=student.weight, bias=bias)


class EmaTeacher(Teacher):
    """`t <- (1 - rate) t + rate s` after each optimizer step, from the optimizer's fp32 weights.

    A bf16 average loses most of the student's motion at the learning rates in use, and the last digits of an fp32 one
    are some 1e-4 of it (docs/design.md). Here the teacher's low-precision weights, which exist anyway, are the leading
    digits, and an fp32 remainder, sharded over the ranks like the weights it follows, holds the rest.

    Everything is done in pieces of at most `PIECE_BYTES`.
    """

    model: TeacherModel

    def __init__(self, model: TeacherModel, worker: Worker, config: TeacherConfig) -> None:
        super().__init__(model)
        self.worker, self.config = worker, config
        self.steps, self.rate, self.distance = 0, config.update_rate, 0.0
        self.rest: dict[str, torch.Tensor] = {}
        images = model.images()
        for name, fragment in worker.masters.fragments().items():
            device = torch.device("cpu") if config.offload else fragment.values.device
            pinned = config.offload and fragment.values.is_cuda
            self.rest[name] = rest = torch.empty(len(fragment.values), device=device, pin_memory=pinned)
            for piece in pieces(len(rest)):
                self._write(images[name][piece], rest[piece], fragment.values[piece].double())
        model.publish()

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        self.steps += 1
        if self.steps % self.config.sync_steps:
            return
        images = self.model.images()
        ahead, norm = [], []
        for name, fragment in self.worker.masters.fragments().items():
            for piece in pieces(len(fragment.values)):
                student = fragment.values[piece]
                ahead.append(self._follow(images[name][piece], self.rest[name][piece], student))
                norm.append(student.norm())
        self.model.publish()
        # A rank may have nothing: DeepSpeed pads what it cannot divide.
        self.distance = float((1.0 - self.rate) * torch.stack(ahead).norm() / torch.stack(norm).norm()) if norm else 0.0

    def _follow(self, image: torch.Tensor, kept: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """Move a piece of the average, its two parts given, by the rate; how far the student was ahead of it."""
        device = image.device if student.device.type == "cpu" else student.device  # the fast one, if there are two
        rest, student = kept.to(device), student.to(device)
        # Copied first, then converted: torch converts copies between host and GPU on the host, which takes ten times
        # as long. All differences are of numbers close to each other, so float32 has digits enough for them.
        leading = image.to(device).to(torch.float32, copy=True)
        difference = (student - leading).sub_(rest)
        rest.add_(difference, alpha=self.rate)
        moved = (leading + rest).to(image.dtype)
        image.copy_(moved)
        rest.add_(leading.sub_(moved))
        if rest is not kept:
            kept.copy_(rest)
        return difference.norm()

    def device_tensors(self) -> list[torch.Tensor]:
        return [*super().device_tensors(), *([] if self.config.offload else self.rest.values())]

    def metrics(self) -> dict[str, float]:
        """`ema_distance`: of student and teacher, relative to the student's norm, on this rank's part of both."""
        return {"teacher/ema_distance": self.distance, "teacher/update_rate": self.rate}

    def average(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's part of the average, laid out like `masters.fragments()`: name and float64 values, in pieces."""
        images = self.model.images()
        for name, rest in self.rest.items():
            for piece in pieces(len(rest)):
                image = images[name][piece]
                yield name, image.double() + rest[piece].to(image.device).double()

    def _write(self, image: torch.Tensor, rest: torch.Tensor, values: torch.Tensor) -> None:
        """Set a piece of the average, its two parts given, to float64 values."""
        leading = values.to(image.dtype)
        image.copy_(leading)
        rest.copy_((values - leading.double()).to(rest.dtype))

    def save(self, directory: str) -> None:
        places, position = {}, 0
        for name, start, numel in self.worker.masters.layout[self.worker.rank]:
            places[name] = (start, numel, position)
            position += numel
        path = os.path.join(directory, STATE.format(rank=self.worker.rank))
        with open(path + VALUES, "wb") as file:
            for _, values in self.average():
                values.cpu().numpy().tofile(file)
        state = {"steps": self.steps, "ranks": self.worker.ranks, "average": places}
        torch.save(state, path + ".tmp")
        os.replace(path + ".tmp", path)  # a killed run leaves either no file or a whole one

    @torch.no_grad()
    def load(self, directory: str) -> None:
        """Fill this rank's part from the files of all ranks, however many there were.

        Raises:
            ConfigError: the checkpoint holds no teacher; it was written without `--teacher.kind ema`.
        """
        images, fragments = self.model.images(), self.worker.masters.fragments()
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
            for name in fragments.keys() & saved["average"].keys():
                mine, (start, numel, position) = fragments[name], saved["average"][name]
                begin = max(mine.start, start)
                shared = min(mine.start + len(mine.values), start + numel) - begin
                for piece in pieces(shared):
                    values = numpy.fromfile(
                        path + VALUES, numpy.float64, piece.stop - piece.start,
                        offset=8 * (position + begin - start + piece.start),
                    )  # fmt: skip
                    here = slice(begin - mine.start + piece.start, begin - mine.start + piece.stop)
                    self._write(images[name][here], self.rest[name][here], torch.from_numpy(values))
            rank += 1
        self.model.publish()
