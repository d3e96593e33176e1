"""The models that teach: one beside the policy's, or the policy's own under another adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

from sdpo_plugin.interface.models import Worker
from sdpo_plugin.openrlhf_adapter.worker import lora
from sdpo_plugin.openrlhf_adapter.worker.offload import OffloadedActor
from sdpo_plugin.openrlhf_adapter.worker.zero import device_tensors, sync, weight_shards


class SeparateTeacher:
    """A model of its own, on every policy worker."""

    def __init__(self, worker: Any, actor: Any) -> None:  # a `PolicyWorker`
        self.worker, self.actor = worker, actor
        self.hidden_states, self.gathered_head = actor.hidden_states, actor.gathered_head

    def weight_shards(self) -> dict[str, torch.Tensor]:
        return weight_shards(self.worker.master_weights.layout[self.worker.rank], self.actor.model.module)

    def sync(self) -> None:
        sync(self.worker.master_weights.layout, self.actor.model.module)

    def export(self, path: str) -> None:
        self.worker.sleeper.wake()  # saving gathers the weights on the device
        self.worker.strategy.save_model(self.actor, self.worker.tokenizer, path)

    def modules_for_engines(self) -> Iterator[Any]:
        with self.actor.on_device() if isinstance(self.actor, OffloadedActor) else nullcontext():
            yield self.actor.model.module

    def device_tensors(self) -> list[torch.Tensor]:
        return [] if self.actor._offload else device_tensors(self.actor.model.module)


class AdapterTeacher:
    """The policy's own model under its second adapter, or with none (`adapter` None). No copy of a weight."""

    def __init__(self, worker: Worker, adapter: str | None) -> None:
        self.worker, self.adapter = worker, adapter
        self.actor = worker.actor
        self.gathered_head = worker.actor.gathered_head  # no adapter is on it (`PolicyActor.tap_head`)

    def hidden_states(self, *inputs: Any) -> torch.Tensor:
        with lora.under(self.actor.model.module, self.adapter):
            return self.actor.hidden_states(*inputs)

    def weight_shards(self) -> dict[str, torch.Tensor]:
        names = [name for name, *_ in self.worker.master_weights.layout[self.worker.rank]]
        found = weight_shards(self._layout()[self.worker.rank], self.actor.model.module)
        return dict(zip(names, found.values(), strict=True))

    def sync(self) -> None:
        sync(self._layout(), self.actor.model.module)

    def modules_for_engines(self) -> Iterator[Any]:
        return lora.merged_modules(self.actor.model.module, lora.TEACHER)

    def device_tensors(self) -> list[torch.Tensor]:
        return []  # adapters stay awake with the model they are in

    def export(self, path: str) -> None:
        lora.save_teacher(self.actor.model.module, path, write=self.worker.rank == 0)

    def _layout(self) -> list[list[tuple[str, int, int]]]:
        """The student's, under the names of the weights that follow it."""
        return [
            [(name.replace(f".{lora.STUDENT}.", f".{lora.TEACHER}."), start, n) for name, start, n in part]
            for part in self.worker.master_weights.layout
        ]
