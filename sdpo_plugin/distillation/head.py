"""An LM head, and what a teacher's pass leaves for the loss: hidden states and the head that reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sdpo_plugin.distillation.loss import log_probs


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`.

    weight `[V, H]`, bias `[V]`. `scale` multiplies the logits (Cohere, Granite), `softcap` bounds them (Gemma). Token
    ids from `vocab_size` on are padding: they have no probability and get no gradient.

    A head that needs no gradient may have a second weight `second_weight` the first, `[V, H2]`: its hidden states are
    `[N, H + H2]`, and the two products are added.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    second_weight: Tensor | None = None

    def effective(self, temperature: float) -> Head:
        """The head of logits / temperature, without the padding and outside any graph."""
        vocab = slice(self.vocab_size)
        return Head(
            self.weight.detach()[vocab],
            None if self.bias is None else self.bias.detach()[vocab],
            self.scale / temperature,
            None if self.softcap is None else self.softcap / temperature,
            second_weight=None if self.second_weight is None else self.second_weight.detach()[vocab],
        )

    def logits(self, products: Tensor) -> Tensor:
        """`hidden @ weight.T` `[n, V]` -> logits `[n, V]`."""
        if self.bias is not None:
            products = products + self.bias
        if self.scale != 1.0:
            products = products * self.scale
        if self.softcap is not None:
            products = torch.tanh(products / self.softcap) * self.softcap
        return products

    def log_probs(self, products: Tensor) -> Tensor:
        """`hidden @ weight.T` `[n, V]` -> log-probabilities `[n, V]`, as `loss.log_probs` defines them."""
        logits = self.logits(products)
        # The floor under log 0 is one more pass over [n, V]. Logits of finite products are finite, except with a bias.
        return torch.log_softmax(logits, dim=-1) if self.bias is None else log_probs(logits)


def match_vocab_size(a: Head, b: Head) -> tuple[Head, Head]:
    """Two heads of one tokenizer whose vocabularies are padded differently, without what only one of them has."""
    rows = min(len(a.weight), len(b.weight))
    return (a, b) if len(a.weight) == len(b.weight) else (replace(a, vocab_size=rows), replace(b, vocab_size=rows))


class TeacherStates(NamedTuple):
    """A teacher's side of a pass: hidden states `[N, H]`, which may be another width than the student's, and a head."""

    hidden: Tensor
    head: Head
