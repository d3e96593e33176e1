"""A teacher's weights in CPU memory, at the ZeRO stages where DeepSpeed does not offload a model without an optimizer.

At ZeRO-3 DeepSpeed fetches them itself, layer by layer (`offload_param`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from sdpo_plugin.distillation.head import Head
from sdpo_plugin.openrlhf_adapter.worker.actor import PolicyActor


class OffloadedActor(PolicyActor):
    """A model for scoring only: its weights are on the device during a forward pass, else in (pinned) CPU memory."""

    def tap_head(self) -> None:
        super().tap_head()
        for parameter in self.model.parameters():
            weights = parameter.data.cpu()
            parameter.data = weights.pin_memory() if parameter.is_cuda else weights

    def hidden_states(self, *inputs: Any) -> torch.Tensor:
        with self.on_device():
            return super().hidden_states(*inputs)

    @contextmanager
    def gathered_head(self) -> Iterator[Head]:
        with self._on_device(self.tap.module.parameters()), super().gathered_head() as head:
            yield head

    def on_device(self) -> AbstractContextManager[None]:
        return self._on_device(self.model.parameters())

    @contextmanager
    def _on_device(self, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        kept = [(parameter, parameter.data) for parameter in parameters]
        for parameter, weights in kept:
            parameter.data = weights.to(self.model.device, copy=True)
        try:
            yield
        finally:
            for parameter, weights in kept:
                parameter.data = weights
