"""What `kernels.py` does to logits `[r, V]`, on a CPU: a few in-place passes over a tile that stays in its cache.

That is half of the elementwise work of autograd, whose graph keeps a tensor for almost every operation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PART = 128
SMALLEST = 1e-37  # a probability whose logarithm is finite in float32


class Slope(NamedTuple):
    """The derivative of a divergence by the student's log-probabilities: `probs * (factor * of + shift)`, `[r, V]`."""

    probs: Tensor
    of: Tensor | None  # None: zero
    factor: float
    shift: float


class Logits:
    """Products `[r, V]` and what makes logits of them; `statistics` adds their log-probabilities."""

    def __init__(self, products: Tensor, scale: float, cap: float | None) -> None:
        self.products, self.scale, self.cap = products, scale, cap
        self.log_probs: Tensor
        self.lse: Tensor
        self.slope: Slope | None = None  # what `divergence` leaves to `write_gradient`
        self._probs: Tensor | None = None

    def values(self) -> Tensor:
        logits = self.products if self.scale == 1.0 else self.products * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def probs(self) -> Tensor:
        if self._probs is None:
            self._probs = self.log_probs.exp()
        return self._probs


class Divergence(NamedTuple):
    """As `kernels.Divergence`."""

    teacher: Logits
    teacher_lse: Tensor
    alpha: float
    kl_clip: float | None


def statistics(logits: Logits) -> tuple[Tensor, None, None]:
    """Log-sum-exp `[r]`. Here entropy and maxima would be passes of their own, so they are left out."""
    values = logits.values()
    logits.log_probs = torch.log_softmax(values, dim=-1)
    logits.lse = values.amax(dim=-1) - logits.log_probs.amax(dim=-1)  # the entries with the least rounding
    return logits.lse.detach(), None, None  # a tensor of the caller's, who may differentiate by it


def entropy(logits: Logits) -> Tensor:
    """`[r]`, in nats."""
    log_probs = logits.log_probs if logits.slope is None else logits.values() - logits.lse[:, None]
    return -torch.linalg.vecdot(logits.probs(), log_probs)


def divergence(student: Logits, lse: Tensor, of: Divergence) -> tuple[Tensor, Tensor]:
    """As `kernels.divergence`. The log-probabilities of both models are used up."""
    alpha, s, t = of.alpha, student.probs(), of.teacher.probs()
    log_s, log_t = student.log_probs, of.teacher.log_probs
    if alpha == 0.0:
        terms, slope = [(1.0, t, log_t.sub_(log_s))], Slope(t, None, 0.0, -1.0)
    elif alpha == 1.0:
        terms = [(1.0, s, log_s.sub_(log_t))]
        slope = Slope(s, log_s, 1.0, 1.0)
    else:
        log_m = torch.lerp(s, t, alpha).clamp_(min=SMALLEST).log_()
        terms = [(1.0 - alpha, s, log_s.sub_(log_m)), (alpha, t, log_t.sub_(log_m))]
        slope = Slope(s, log_s, 1.0 - alpha, 0.0)  # what the mixture itself adds cancels
    if of.kl_clip is None:
        sums = [torch.linalg.vecdot(probs, ratio) for _, probs, ratio in terms]
        loss = sum(factor * own for (factor, _, _), own in zip(terms, sums, strict=True))
        student.slope, total = slope, slope.shift + slope.factor * sums[0]
        return torch.as_tensor(loss), total
    share = sum(factor * probs * ratio for factor, probs, ratio in terms)
    assert isinstance(share, Tensor)
    inner = torch.full_like(s, slope.shift) if slope.of is None else slope.factor * slope.of + slope.shift
    inner.masked_fill_(share > of.kl_clip, 0.0)
    student.slope = Slope(slope.probs, inner, 1.0, 0.0)
    return share.clamp(max=of.kl_clip).sum(dim=-1), torch.linalg.vecdot(slope.probs, inner)


def write_gradient(
    student: Logits, lse: Tensor, entropy: Tensor | None, by_lse: Tensor, by_entropy: Tensor | None,
    by_divergence: Tensor | None, total: Tensor | None, of: Divergence | None,
) -> None:
    """As `kernels.write_gradient`; `entropy` is needed with `by_entropy` alone."""
    s, slope, gradient = student.probs(), student.slope, student.products
    values = student.values() if by_entropy is not None or student.cap is not None else None
    if slope is None or by_divergence is None or total is None:
        made = s * by_lse[:, None]
    else:
        by_probs = by_lse - total * by_divergence
        if slope.probs is not s:
            made = torch.addcmul(s * by_probs[:, None], slope.probs, _row(slope, by_divergence))
        elif slope.of is None:
            made = s * (by_probs + slope.shift * by_divergence)[:, None]
        else:
            made = slope.of.mul_((slope.factor * by_divergence)[:, None])
            made.add_((by_probs + slope.shift * by_divergence)[:, None]).mul_(s)
    if by_entropy is not None:
        assert values is not None and entropy is not None
        made -= s * (values - (lse - entropy)[:, None]) * by_entropy[:, None]
    if student.cap is not None:
        assert values is not None
        made *= 1.0 - (values / student.cap) ** 2
    torch.mul(made, student.scale, out=gradient)


def _row(slope: Slope, by_divergence: Tensor) -> Tensor:
    """`[r, 1]` or `[r, V]`: what the slope's probabilities are multiplied with."""
    constant = slope.shift if slope.of is None else slope.factor * slope.of + slope.shift
    return constant * by_divergence[:, None]
