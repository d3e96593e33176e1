"""On a GPU, the loss of rows from a few numbers of each: log-sum-exp, entropy, divergence, some log-probabilities.

Elementwise work on `[r, V]` takes several times as long as the matrix products there, because every operation reads and
writes device memory. Most objectives need no whole distribution: what they are made of is differentiated by autograd,
and how it depends on the distribution by one kernel (`kernels.py`). One that reads whole distributions all the same is
left to `fused.py`'s general form.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sdpo_plugin.config import DistillConfig
from sdpo_plugin.distillation.loss import (
    TeacherTable,
    TokenBatch,
    Unread,
    compares_all,
    divergence_from_table,
    entropy_of,
    importance_ratio,
    on_shared_support,
    support_ids,
    token_divergence,
)

logger = logging.getLogger(__name__)


class WholeDistribution(Exception):  # noqa: N818
    """An objective has read a distribution as a whole."""


def kernels(products: Tensor, heads: Sequence[Any]) -> ModuleType | None:
    """The kernels, where they can be used for these products of these heads."""
    suited = products.dtype == torch.float32 and all(head.bias is None and head.scale > 0.0 for head in heads)
    return _kernels(products.device) if suited else None


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The kernels, if this device can run them; else, on a GPU, a warning."""
    if device.type != "cuda":
        return None
    try:
        from sdpo_plugin.distillation import kernels

        kernels.statistics(kernels.Logits(torch.zeros(1, 8, device=device), 1.0, None))
        return kernels
    except Exception as error:  # without a C compiler, for one
        logger.warning(f"the loss is computed without Triton, which takes several times as long: {error}")
        return None


class RowTokens(TokenBatch):
    """`loss.TokenBatch` of logits that are given as products `[r, V]` and the heads they are of, without biases."""

    def __init__(
        self, kernels: Any, products: Tensor, head: Any, teachers: Sequence[tuple[Tensor, Any]], ids: Tensor,
        rows: Tensor, data: Mapping[str, Tensor], tables: Sequence[TeacherTable], differentiate: bool,
    ) -> None:
        self.ids, self.rows, self.data, self.tables = ids, rows, data, tables
        self._kernels, self._head, self._differentiate = kernels, head, differentiate
        self._logits = kernels.Logits(products, head.scale, head.softcap)
        self._taught_by = [(head, kernels.Logits(x, head.scale, head.softcap)) for x, head in teachers]
        self._gathered: list[tuple[Tensor, Tensor]] = []  # ids and products there, [r, K] each
        self._divergence: tuple[Any, Tensor, Tensor] | None = None  # which, its value, its `total`

    @property
    def student(self) -> Tensor:  # type: ignore[override]
        raise WholeDistribution

    @property
    def teachers(self) -> Sequence[Tensor]:  # type: ignore[override]
        if self.tables:
            return Unread()
        raise WholeDistribution

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        lse, entropy, maxima = self._kernels.statistics(self._logits)
        return self._leaf(lse), self._leaf(entropy), maxima

    @cached_property
    def _teacher_statistics(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [self._kernels.statistics(logits) for _, logits in self._taught_by]

    def _leaf(self, values: Tensor) -> Tensor:
        return values.requires_grad_(self._differentiate)

    def at(self, ids: Tensor) -> Tensor:
        products = self._leaf(self._logits.products.gather(1, ids))
        self._gathered.append((ids, products))
        return self._head.logits(products) - self._statistics[0][:, None]

    def _teacher_at(self, ids: Tensor, k: int = 0) -> Tensor:
        head, logits = self._taught_by[k]
        return head.logits(logits.products.gather(1, ids)) - self._teacher_statistics[k][0][:, None]

    @cached_property
    def log_probs(self) -> Tensor:
        return self.at(self.ids[:, None]).squeeze(1)

    @cached_property
    def sampled_by_teachers(self) -> Tensor:
        if self.tables:
            return torch.stack([table.sampled[self.rows] for table in self.tables])
        return torch.stack([self._teacher_at(self.ids[:, None], k).squeeze(1) for k in range(len(self._taught_by))])

    @property
    def entropy(self) -> Tensor:
        """`[r]`, in nats, differentiable."""
        return self._statistics[1]

    @cached_property
    def student_entropy(self) -> Tensor:
        return self.entropy.detach()

    @cached_property
    def teacher_entropy(self) -> Tensor:
        return entropy_of(self.teachers[0]) if self.tables else self._teacher_statistics[0][1]

    def divergence(self, config: DistillConfig) -> Tensor:
        if self.tables:
            return divergence_from_table(self, config)
        student, (_, teacher) = self._logits.products, self._taught_by[0]
        if config.mode == "sampled":
            loss = (self.log_probs - self.teacher_log_probs).detach() * self.log_probs
        elif compares_all(config, student.shape[1]):
            loss = self._over_all(config)
        else:
            # Logits are in the order of their products.
            ids = support_ids(student, teacher.products, config, self._largest)
            pair = on_shared_support(self.at(ids), self._teacher_at(ids), ids, config)
            loss = token_divergence(*pair, config.alpha, config.kl_clip)
        return loss * importance_ratio(self.log_probs, self.get("old_log_probs"), config.is_clip)

    def _largest(self, products: Tensor, k: int) -> Tensor:
        own = products is self._logits.products
        maxima = (self._statistics if own else self._teacher_statistics[0])[2]
        return largest(products, k, maxima, self._kernels.PART)

    def _over_all(self, config: DistillConfig) -> Tensor:
        if self._divergence is not None:  # one is all that the kernel can differentiate
            raise WholeDistribution
        teacher, lse = self._taught_by[0][1], self._teacher_statistics[0][0]
        which = self._kernels.Divergence(teacher, lse, config.alpha, config.kl_clip)
        loss, total = self._kernels.divergence(self._logits, self._statistics[0].detach(), which)
        self._divergence = which, self._leaf(loss), total
        return loss

    def write_gradient(self, outputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> None:
        """Over the student's products, their gradient for the gradients that arrive at `outputs`, `[r]` each."""
        which, loss, total = self._divergence or (None, None, None)
        gathered = [products for _, products in self._gathered]
        leaves = [*self._statistics[:2], *gathered, *([] if loss is None else [loss])]
        by_lse, by_entropy, *by_rest = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
        lse, entropy = (x.detach() for x in self._statistics[:2])
        by_lse = torch.zeros_like(lse) if by_lse is None else by_lse
        by_loss = None if loss is None else by_rest[-1]
        self._kernels.write_gradient(self._logits, lse, entropy, by_lse, by_entropy, by_loss, total, which)
        for (ids, _), gradient in zip(self._gathered, by_rest, strict=False):
            if gradient is not None:
                self._logits.products.scatter_add_(1, ids, gradient)


def largest(x: Tensor, k: int, maxima: Tensor, size: int) -> Tensor:
    """Where the k largest of each row are, `[r, k]`, as `topk` finds them in three times the time.

    `maxima` `[r, P]`: of the row's parts of `size` entries, but for a rest; the k are in the k parts with the largest.
    """
    (rows, vocab), parts = x.shape, maxima.shape[1]
    if parts < 4 * k:
        return x.topk(k, dim=-1).indices
    best = maxima.topk(k, dim=-1, sorted=False).indices
    within = torch.arange(size, device=x.device)
    rest = torch.arange(parts * size, vocab, device=x.device).expand(rows, -1)
    ids = torch.cat([(best[:, :, None] * size + within).flatten(1), rest], dim=1)
    return ids.gather(1, x.gather(1, ids).topk(k, dim=-1).indices)
