"""Whose weights read the teacher's context: the student's own, the initial ones, or a moving average of them.

A teacher hands over final hidden states at response positions and a head, never logits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from sdpo_plugin.config import ConfigError, TeacherConfig
from sdpo_plugin.fused import Head

STATE = "teacher_rank{rank}.pt"


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one parameter's fp32 master weight: elements `start : start + values.numel()`."""

    start: int
    values: torch.Tensor


class Model(Protocol):
    """What a teacher needs of a model (`host.actor.PolicyActor`; of `testing.fake_worker` for units)."""

    def hidden_states(
        self, sequences: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor, max_tokens: int
    ) -> torch.Tensor:
        """[N, H] at the N positions of `rows` (bool [B, S]), in passes of at most `max_tokens`."""

    def whole_head(self) -> Any:
        """A context manager that yields the model's `fused.Head`."""


def make_teacher(config: TeacherConfig, worker: Any) -> Teacher:
    """The teacher of `--teacher.kind`, on this rank."""
    if config.kind == "live":
        return Teacher(worker.actor)
    initial = worker.teacher_model(config.offload, follows=config.kind == "ema")
    if config.kind == "ema":
        return EmaTeacher(initial, worker, config)
    return TrustRegionTeacher(initial, worker.actor, config.update_rate) if config.kind == "trust_region" else (
        Teacher(initial)
    )


class Teacher:
    """`live` (a teacher whose model is the student) and `base` (whose model never changes)."""

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

    def save(self, directory: str) -> None:
        """Write what a restart cannot rebuild into the host's checkpoint."""

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
            bias = None if initial.bias is None else torch.lerp(initial.bias, student.bias, self.rate)
            yield replace(initial, beside=student.weight, bias=bias)


class EmaTeacher(Teacher):
    """`t <- (1 - rate) t + rate s` after each optimizer step, from the optimizer's fp32 weights.

    A bf16 average loses most of the student's motion at the learning rates in use, and the last digits of an fp32 one
    are some 1e-4 of it (docs/design.md). Here the teacher's low-precision weights, which exist anyway, are the leading
    digits, and an fp32 remainder, sharded over the ranks like the weights it follows, holds the rest.
    """

    def __init__(self, model: Model, worker: Any, config: TeacherConfig) -> None:
        super().__init__(model)
        self.worker, self.config = worker, config
        self.steps, self.rate, self.distance = 0, config.update_rate, 0.0
        self.rest: dict[str, torch.Tensor] = {}
        self._set({name: fragment.values for name, fragment in worker.masters.fragments().items()})

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        self.steps += 1
        if self.steps % self.config.sync_steps:
            return
        images = self.worker.images(self.model)
        ahead, norm = [], []
        for name, student in self.worker.masters.fragments().items():
            device = student.values.device
            image, rest = images[name], self.rest[name].to(device)
            # All differences are of numbers close to each other, so float32 has digits enough for them.
            leading = image.to(device, torch.float32, copy=True)
            difference = (student.values - leading).sub_(rest)
            rest.add_(difference, alpha=self.rate)
            image.copy_(leading + rest)
            rest.add_(leading.sub_(image.to(device)))
            if rest is not self.rest[name]:
                self.rest[name].copy_(rest)
            ahead.append(difference.norm())
            norm.append(student.values.norm())
        self.worker.publish(self.model)
        self.distance = float((1.0 - self.rate) * torch.stack(ahead).norm() / torch.stack(norm).norm())

    def metrics(self) -> dict[str, float]:
        """`ema_distance`: of student and teacher, relative to the student's norm, on this rank's part of both."""
        return {"teacher/ema_distance": self.distance, "teacher/update_rate": self.rate}

    def average(self) -> dict[str, torch.Tensor]:
        """This rank's part of the average in float64, laid out like `masters.fragments()`."""
        images = self.worker.images(self.model)
        return {name: images[name].double() + rest.to(images[name].device).double() for name, rest in self.rest.items()}

    def _write(self, name: str, image: torch.Tensor, values: torch.Tensor) -> None:
        image.copy_(values)
        rest = (values - image.to(values.device).double()).float()
        if name in self.rest:
            self.rest[name].copy_(rest)
        else:
            self.rest[name] = rest.cpu().pin_memory() if self.config.offload and rest.is_cuda else rest

    @torch.no_grad()
    def _set(self, average: dict[str, torch.Tensor]) -> None:
        images = self.worker.images(self.model)
        for name, values in average.items():
            self._write(name, images[name], values.double())
        self.worker.publish(self.model)

    def save(self, directory: str) -> None:
        starts = {name: fragment.start for name, fragment in self.worker.masters.fragments().items()}
        average = {name: (starts[name], values.cpu()) for name, values in self.average().items()}
        path = os.path.join(directory, STATE.format(rank=self.worker.rank))
        state = {"steps": self.steps, "rate": self.rate, "ranks": self.worker.ranks, "average": average}
        torch.save(state, path + ".tmp")
        os.replace(path + ".tmp", path)  # a killed run leaves either no file or a whole one

    def load(self, directory: str) -> None:
        """Fill this rank's part from the files of all ranks, however many there were.

        Raises:
            FileNotFoundError: the checkpoint holds no teacher; it was written without `--teacher.kind ema`.
        """
        average = self.average()
        starts = {name: fragment.start for name, fragment in self.worker.masters.fragments().items()}
        rank, ranks = 0, 1
        while rank < ranks:
            path = os.path.join(directory, STATE.format(rank=rank))
            if not os.path.exists(path):
                raise FileNotFoundError(
                    f"no teacher in {directory} ({os.path.basename(path)} is missing): this checkpoint was written "
                    "without --teacher.kind ema; resume with the teacher it was trained with"
                )
            saved = torch.load(path, weights_only=True)
            self.steps, self.rate, ranks = saved["steps"], saved["rate"], saved["ranks"]
            for name, (start, values) in saved["average"].items():
                if name in average:
                    _copy_overlap(average[name], starts[name], values, start)
            rank += 1
        self._set(average)


def _copy_overlap(into: torch.Tensor, into_start: int, values: torch.Tensor, start: int) -> None:
    """Copy what two parts of one parameter, each from its element `start` on, share."""
    begin = max(into_start, start)
    end = min(into_start + into.numel(), start + values.numel())
    if begin < end:
        into[begin - into_start : end - into_start] = values[begin - start : end - start]
