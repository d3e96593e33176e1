"""Models and their weights, as the adapter hands them to a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sdpo_plugin.distillation.head import Head

# For each sample what the model's processor made of its images (`pixel_values`, ...), or None if it has none.
Images = Sequence[Mapping[str, torch.Tensor] | None]
# The largest tensor that is made, beside what stays, for what is done to all weights.
MAX_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one parameter's fp32 master weight: elements `start : start + len(values)`, no copy."""

    start: int
    values: torch.Tensor


def chunks(numel: int, element_bytes: int = 8) -> Iterator[slice]:
    """`range(numel)` in slices whose elements (float64 by default) fill at most `MAX_CHUNK_BYTES`."""
    length = max(MAX_CHUNK_BYTES // element_bytes, 1)
    return (slice(start, min(start + length, numel)) for start in range(0, numel, length))


class Model(Protocol):
    """A language model that can be read: the policy's own, or a teacher's."""

    def hidden_states(
        self,
        sequences: torch.Tensor,
        attention_mask: torch.Tensor,
        rows: torch.Tensor,
        max_tokens: int,
        wanted: torch.Tensor | None = None,
        images: Images | None = None,
    ) -> torch.Tensor:
        """[N, H] at the N positions of `rows` (bool [B, S]), in passes of at most `max_tokens`. Collective.

        Of these, if given, the `wanted` (bool [N]): with ring attention, those that this rank needs. `images`: of each
        of the B sequences.
        """

    def gathered_head(self) -> AbstractContextManager[Head]:
        """The LM head, whole on every rank while the context lasts. Collective."""


class TeacherModel(Model, Protocol):
    """A model for scoring only, whose weights can be set to follow the student's."""

    def weight_shards(self) -> dict[str, torch.Tensor]:
        """This rank's part of the weights, by the names of `Worker.master_weights` and laid out like them; views."""

    def sync(self) -> None:
        """Distribute what was written to `weight_shards` to all ranks. Collective."""

    def export(self, path: str) -> None:
        """Save the model in Hugging Face form. Collective."""

    def modules_for_engines(self) -> Iterator[Any]:
        """What vLLM engines are sent: modules whose `named_parameters()` are all weights that change. Collective."""

    def device_tensors(self) -> list[torch.Tensor]:
        """Weights of its own in device memory, all that are there between two passes. Collective."""


class MasterWeights(Protocol):
    """The fp32 weights that the student's optimizer holds on this rank.

    Attributes:
        layout: of each rank, (name, start, number of elements) of its fragments, in order.
    """

    layout: Sequence[Sequence[tuple[str, int, int]]]

    def fragments(self) -> dict[str, Fragment]:
        """By parameter name; together the ranks hold every element. Valid until the optimizer moves or sleeps."""


class Worker(Protocol):
    """A policy worker: one rank of the student.

    Attributes:
        args: OpenRLHF's nested arguments.
        actor: the student, OpenRLHF's `Actor`; its model is `actor.model`, `actor.temperature` the rollout's.
        tokenizer, strategy, trainer: OpenRLHF's.
        master_weights: the optimizer's weights.
        rank, ranks: this policy worker's number, and how many there are.
    """

    args: Any
    actor: Any
    tokenizer: Any
    strategy: Any
    trainer: Any
    master_weights: MasterWeights
    rank: int
    ranks: int

    def load_initial_model(self, offload: bool, updatable: bool) -> TeacherModel:
        """The student as it was before training; with weights to write to, if it `follows` the student. Collective."""

    def load_model(self, path: str, offload: bool, zero_stage: int | None) -> TeacherModel:
        """The model at `path`, without adapters; zero_stage 0 or 3, or None for the student's. Collective."""
    def publish_to_engines(self, model: TeacherModel) -> None:
        """Send the teacher's engines these weights, once the rollout batch has been trained on."""
