"""What is done to logits `[r, V]` on a GPU, in one pass over them each, as Triton kernels.

In come the products of `fused.Head`, float32 with contiguous rows; a kernel makes logits of them as it reads:
`scale * product`, or `cap * tanh(scale * product / cap)`. Importing this module needs Triton, which torch's CUDA builds
bring along.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 8
PART = 128  # entries whose maximum `statistics` finds


class Logits(NamedTuple):
    """Products `[r, V]`, and what makes logits of them."""

    products: Tensor
    scale: float
    cap: float | None

    @property
    def arguments(self) -> tuple[Tensor, int, float, float]:
        return self.products, self.products.stride(0), self.scale, 0.0 if self.cap is None else self.cap


class Divergence(NamedTuple):
    """`loss.token_divergence` over the whole vocabulary: from a teacher's logits and their log-sum-exp `[r]`."""

    teacher: Logits
    teacher_lse: Tensor
    alpha: float
    kl_clip: float | None

    @property
    def constants(self) -> dict[str, float | bool]:
        alpha = self.alpha
        logs = [math.log(x) if x > 0.0 else 0.0 for x in (1.0 - alpha, alpha)]
        return {
            "ALPHA": alpha, "LOG_STUDENT": logs[0], "LOG_TEACHER": logs[1], "CLIPPED": self.kl_clip is not None,
            "CLIP": self.kl_clip or 0.0, "TEACHER_CAPPED": self.teacher.cap is not None,
        }  # fmt: skip


def statistics(logits: Logits) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp and entropy in nats, `[r]` each, and the largest logit of every whole `PART` of a row."""
    rows, vocab = logits.products.shape
    lse, entropy = logits.products.new_empty(2, rows)
    maxima = logits.products.new_empty(rows, vocab // PART)
    _statistics[(rows,)](
        *logits.arguments, lse, entropy, maxima, vocab, CAPPED=logits.cap is not None, BLOCK=BLOCK, PART=PART,
        num_warps=WARPS,
    )  # fmt: skip
    return lse, entropy, maxima


def divergence(student: Logits, lse: Tensor, of: Divergence) -> tuple[Tensor, Tensor]:
    """The divergence, and the sum of its derivatives by the student's log-probabilities, `[r]` each."""
    rows, vocab = student.products.shape
    loss, total = student.products.new_empty(2, rows)
    _divergence[(rows,)](
        *student.arguments, *of.teacher.arguments, lse, of.teacher_lse, loss, total, vocab,
        CAPPED=student.cap is not None, **of.constants, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return loss, total


def write_gradient(
    student: Logits, lse: Tensor, entropy: Tensor, by_lse: Tensor, by_entropy: Tensor | None,
    by_divergence: Tensor | None, total: Tensor | None, of: Divergence | None,
) -> None:
    """Over the products, the gradient by them of a function of their log-sum-exp, entropy and divergence.

    `by_lse`, `by_entropy` and `by_divergence`, `[r]` each, are that function's own derivatives; `total` is the second
    of what `divergence` returns.
    """
    rows, vocab = student.products.shape
    other = (student, lse) if of is None else (of.teacher, of.teacher_lse)
    constants = {"ALPHA": 0.0, "LOG_STUDENT": 0.0, "LOG_TEACHER": 0.0, "CLIPPED": False, "CLIP": 0.0,
                 "TEACHER_CAPPED": False} if of is None else of.constants  # fmt: skip
    _gradient[(rows, triton.cdiv(vocab, BLOCK))](
        *student.arguments, *other[0].arguments, lse, other[1], entropy, by_lse,
        by_lse if by_entropy is None else by_entropy, by_lse if by_divergence is None else by_divergence,
        by_lse if total is None else total, vocab, CAPPED=student.cap is not None, BY_ENTROPY=by_entropy is not None,
        BY_DIVERGENCE=by_divergence is not None, **constants, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _logits(x, at, inside, scale, cap, CAPPED: tl.constexpr):
    z = tl.load(x + at, mask=inside, other=0.0) * scale
    if CAPPED:
        z = cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)  # tanh
    return z


@triton.jit
def _shares(
    log_s, log_t, ALPHA: tl.constexpr, LOG_STUDENT: tl.constexpr, LOG_TEACHER: tl.constexpr, CLIPPED: tl.constexpr,
    CLIP: tl.constexpr,
):
    """Each entry's contribution to the divergence, and the derivative of all contributions by its log s."""
    s, t = tl.exp(log_s), tl.exp(log_t)
    if ALPHA == 0.0:
        share = t * (log_t - log_s)
        slope = -t
    elif ALPHA == 1.0:
        share = s * (log_s - log_t)
        slope = share + s
    else:
        a, b = log_s + LOG_STUDENT, log_t + LOG_TEACHER
        top = tl.maximum(a, b)
        log_m = top + tl.log(tl.exp(a - top) + tl.exp(b - top))
        slope = (1.0 - ALPHA) * s * (log_s - log_m)  # what the mixture itself adds cancels
        share = slope + ALPHA * t * (log_t - log_m)
    if CLIPPED:
        slope = tl.where(share > CLIP, 0.0, slope)
        share = tl.minimum(share, CLIP)
    return share, slope


@triton.jit
def _statistics(
    x, stride, scale, cap, lse, entropy, maxima, vocab, CAPPED: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    maxima += row * (vocab // PART)
    top = tl.full([BLOCK], -1e30, tl.float32)  # of each lane, so that lanes are reduced once, at the end
    mass, weighted = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocab
        z = _logits(x, at, inside, scale, cap, CAPPED)
        higher = tl.where(inside, tl.maximum(top, z), top)
        kept, e = tl.exp(top - higher), tl.where(inside, tl.exp(z - higher), 0.0)
        mass, weighted, top = mass * kept + e, weighted * kept + e * z, higher
        part = start // PART + tl.arange(0, BLOCK // PART)
        tl.store(maxima + part, tl.max(tl.reshape(z, (BLOCK // PART, PART)), axis=1), mask=part < vocab // PART)
    highest = tl.max(top, 0)
    factor = tl.exp(top - highest)
    total = tl.sum(mass * factor, 0)
    log_sum = highest + tl.log(total)
    tl.store(lse + row, log_sum)
    tl.store(entropy + row, log_sum - tl.sum(weighted * factor, 0) / total)


@triton.jit
def _divergence(
    x, x_stride, x_scale, x_cap, y, y_stride, y_scale, y_cap, x_lse, y_lse, loss, total, vocab, CAPPED: tl.constexpr,
    ALPHA: tl.constexpr, LOG_STUDENT: tl.constexpr, LOG_TEACHER: tl.constexpr, CLIPPED: tl.constexpr,
    CLIP: tl.constexpr, TEACHER_CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    y += row * y_stride
    x_log, y_log = tl.load(x_lse + row), tl.load(y_lse + row)
    shares, slopes = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocab
        log_s = _logits(x, at, inside, x_scale, x_cap, CAPPED) - x_log
        log_t = _logits(y, at, inside, y_scale, y_cap, TEACHER_CAPPED) - y_log
        share, slope = _shares(log_s, log_t, ALPHA, LOG_STUDENT, LOG_TEACHER, CLIPPED, CLIP)
        shares += tl.where(inside, share, 0.0)
        slopes += tl.where(inside, slope, 0.0)
    tl.store(loss + row, tl.sum(shares, 0))
    tl.store(total + row, tl.sum(slopes, 0))


@triton.jit
def _gradient(
    x, x_stride, x_scale, x_cap, y, y_stride, y_scale, y_cap, x_lse, y_lse, entropy, by_lse, by_entropy, by_divergence,
    total, vocab, CAPPED: tl.constexpr, BY_ENTROPY: tl.constexpr, BY_DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr,
    LOG_STUDENT: tl.constexpr, LOG_TEACHER: tl.constexpr, CLIPPED: tl.constexpr, CLIP: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    z = _logits(x, at, inside, x_scale, x_cap, CAPPED)
    log_s = z - tl.load(x_lse + row)
    s = tl.exp(log_s)
    gradient = s * tl.load(by_lse + row)
    if BY_ENTROPY:
        gradient -= s * (log_s + tl.load(entropy + row)) * tl.load(by_entropy + row)
    if BY_DIVERGENCE:
        log_t = _logits(y + row * y_stride, at, inside, y_scale, y_cap, TEACHER_CAPPED) - tl.load(y_lse + row)
        _, slope = _shares(log_s, log_t, ALPHA, LOG_STUDENT, LOG_TEACHER, CLIPPED, CLIP)
        gradient += (slope - s * tl.load(total + row)) * tl.load(by_divergence + row)
    if CAPPED:
        gradient *= 1.0 - (z / x_cap) * (z / x_cap)
    tl.store(x + at, gradient * x_scale, mask=inside)
