"""Whose weights read the teacher's context: the student's own, the initial ones, or a moving average of them.

A teacher hands over final hidden states at response positions and a head, never logits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sdpo_plugin.config import TeacherConfig

STATE = "teacher_rank{rank}.pt"


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one parameter's fp32 master weight: elements `start : start + values.numel()`."""

    start: int
    values: torch.Tensor


class Model(Protocol):
    """What a teacher needs of a model (`host.worker.PolicyActor`; `testing.FakeActor` for units)."""

    def hidden_states(self, sequences: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[N, H] at the N positions of `rows` (bool [B, S])."""

    def whole_head(self) -> Any:
        """A context manager that yields the model's `fused.Head`."""


def make_teacher(config: TeacherConfig, worker: Any) -> Teacher:
    """The teacher of `--teacher.kind`, on this rank."""
    if config.kind == "live":
        return Teacher(worker.actor)
    frozen = worker.frozen_copy(config.offload)
    return EmaTeacher(frozen, worker, config) if config.kind == "ema" else Teacher(frozen)


class Teacher:
    """`live` (a teacher whose model is the student) and `base` (whose model never changes)."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def hidden_states(self, sequences: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.model.hidden_states(sequences, attention_mask, rows)

    @contextmanager
    def head(self) -> Iterator[Any]:
        with self.model.whole_head() as head:
            yield head

    def after_optimizer_step(self) -> None:
        """Follow the student, if this teacher does."""

    def save(self, directory: str) -> None:
        """Write what a restart cannot rebuild into the host's checkpoint."""

    def load(self, directory: str) -> None:
        """Read what `save` wrote."""


class EmaTeacher(Teacher):
    """`t <- (1 - rate) t + rate s` after each optimizer step, in fp32 from the optimizer's fp32 weights.

    A bf16 average loses most of the student's motion at the learning rates in use (docs/design.md); this one is
    sharded over the ranks like the weights it follows, and only its low-precision image is in the model.
    """

    def __init__(self, model: Model, worker: Any, config: TeacherConfig) -> None:
        super().__init__(model)
        self.worker, self.config = worker, config
        self.steps = 0
        self.average = {
            name: Fragment(fragment.start, fragment.values.detach().clone())
            for name, fragment in worker.masters.fragments().items()
        }

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        self.steps += 1
        if self.steps % self.config.sync_steps:
            return
        for name, student in self.worker.masters.fragments().items():
            self.average[name].values.lerp_(student.values, self.config.update_rate)
        self.worker.publish(self.average, self.model)

    def save(self, directory: str) -> None:
        state = {name: (fragment.start, fragment.values.cpu()) for name, fragment in self.average.items()}
        path = os.path.join(directory, STATE.format(rank=self.worker.rank))
        torch.save({"steps": self.steps, "average": state}, path + ".tmp")
        os.replace(path + ".tmp", path)  # a killed run leaves either no file or a whole one

    @torch.no_grad()
    def load(self, directory: str) -> None:
        """Fill this rank's fragments from the files of all ranks, however many there were.

        Raises:
            FileNotFoundError: the checkpoint holds no teacher; it was written without `--teacher.kind ema`.
        """
        rank = 0
        while os.path.exists(path := os.path.join(directory, STATE.format(rank=rank))):
            saved = torch.load(path, weights_only=True)
            self.steps = saved["steps"]
            for name, (start, values) in saved["average"].items():
                if name in self.average:
                    _copy_overlap(self.average[name], start, values)
            rank += 1
        if rank == 0:
            raise FileNotFoundError(
                f"no teacher in {directory}: this checkpoint was written without --teacher.kind ema; resume with the "
                "teacher it was trained with"
            )
        self.worker.publish(self.average, self.model)


def _copy_overlap(into: Fragment, start: int, values: torch.Tensor) -> None:
    """Copy what `values`, beginning at element `start` of its parameter, shares with the fragment `into`."""
    begin = max(into.start, start)
    end = min(into.start + into.values.numel(), start + values.numel())
    if begin < end:
        into.values[begin - into.start : end - into.start] = values[begin - start : end - start]
