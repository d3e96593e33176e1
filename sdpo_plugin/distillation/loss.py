"""The self-distillation loss: the readable definition that everything else is tested against.

Student and teacher are the same model under two contexts; `S` and `T` are their next-token distributions at one
response token. SDPO (arXiv 2601.20802) distils `T` into `S` on the policy's own tokens. The generalised Jensen-Shannon
divergence is the one of GKD (arXiv 2306.13649), the clip per vocabulary entry the one of OPSD (arXiv 2601.18734).

Everything here is computed in float32 whatever comes in, or in float64 for float64, and the teacher gets no gradient.
`config.weight` and `config.skip_tokens` are the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_plugin.config import ConfigError, DistillConfig

# Stands for log 0. Lower than any log-probability of finite logits, but finite: 0 * log 0 is then 0 and never nan.
LOG_ZERO = -1e15

# A tail bucket never holds less than this: log(1 - mass) of a support that holds everything would be -inf.
MIN_TAIL = 1e-7


class TeacherTable(NamedTuple):
    """A teacher's scores of N tokens where its distributions stay elsewhere, such as in a vLLM engine.

    Attributes:
        sampled: `[N]`, log-probabilities of the sampled tokens.
        ids: int64 `[N, K]`, the teacher's likeliest tokens, in order.
        log_probs: `[N, K]`, theirs; `LOG_ZERO` where there is no such token.
    """

    sampled: Tensor
    ids: Tensor
    log_probs: Tensor


class Unread(Sequence[Tensor]):
    """Stands for the distributions of teachers that are known by their tables alone."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, k: Any) -> Any:
        raise ConfigError(
            "--teacher.scored_by engine: this algorithm reads the teacher's whole distribution, and an engine returns "
            "its top-k tokens; give --teacher.scored_by worker"
        )


@dataclass
class TokenBatch:
    """Some response tokens under the student and its teachers: all that a loss can be made of.

    Attributes:
        student: `[r, V]`, the student's log-probabilities, differentiable.
        teachers: of each teacher context, `[r, V]`; ConfigError where there are tables.
        ids: int64 `[r]`, the sampled tokens.
        rows: int64 `[r]`, where the tokens are among all N.
        data: what else is known about them, tensors `[N]`: `tokens["reward"]` is `[r]`.
        tables: of each teacher context, where it is scored by an engine.
    """

    student: Tensor
    teachers: Sequence[Tensor]
    ids: Tensor
    rows: Tensor
    data: Mapping[str, Tensor] = field(default_factory=dict)
    tables: Sequence[TeacherTable] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self.data[name][self.rows]

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self.data else None

    def gather_sampled(self, log_probs: Tensor) -> Tensor:
        """`[r, V]` -> `[r]`: the entries of the sampled tokens."""
        return log_probs.gather(-1, self.ids[:, None]).squeeze(-1)

    def at(self, ids: Tensor) -> Tensor:
        """The student's log-probabilities of `ids` `[r, K]`."""
        return self.student.gather(-1, ids)

    @cached_property
    def log_probs(self) -> Tensor:
        """`[r]`, the student's of the sampled tokens, differentiable."""
        return self.gather_sampled(self.student)

    @cached_property
    def teacher_log_probs(self) -> Tensor:
        """`[r]`, the first teacher's of the sampled tokens."""
        return self.sampled_by_teachers[0]

    @cached_property
    def sampled_by_teachers(self) -> Tensor:
        """`[K, r]`, every teacher's of the sampled tokens."""
        if self.tables:
            return torch.stack([table.sampled[self.rows] for table in self.tables])
        return torch.stack([self.gather_sampled(teacher) for teacher in self.teachers])

    @cached_property
    def student_entropy(self) -> Tensor:
        """`[r]`, in nats, without a gradient."""
        return entropy_of(self.student.detach())

    @cached_property
    def teacher_entropy(self) -> Tensor:
        """`[r]`, in nats, of the first teacher."""
        return entropy_of(self.teachers[0])

    def divergence(self, config: DistillConfig) -> Tensor:
        """`[r]`: `loss_from_log_probs` of the first teacher, with the tokens' `old_log_probs` if there are any."""
        if self.tables:
            return divergence_from_table(self, config)
        return loss_from_log_probs(self.student, self.teachers[0], self.ids, config, self.get("old_log_probs"))


Objective = Callable[[TokenBatch], Tensor]  # -> the loss of each token, [r]


def objective_of(config: DistillConfig) -> Objective:
    """`TokenBatch.divergence` of `config`."""
    return lambda tokens: tokens.divergence(config)


def entropy_of(log_probs: Tensor) -> Tensor:
    """`[..., V]` -> `[...]`, in nats."""
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def log_probs(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension, float32 or float64, with `LOG_ZERO` where a logit is -inf."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits, dim=-1).clamp(min=LOG_ZERO)


def token_divergence(
    student_log_probs: Tensor, teacher_log_probs: Tensor, alpha: float, kl_clip: float | None = None
) -> Tensor:
    """The divergence of two distributions over the last dimension: `[..., K]`, `[..., K]` -> `[...]`.

    alpha 0: KL(T||S). alpha 1: KL(S||T). Between: (1-alpha) KL(S||M) + alpha KL(T||M), M = (1-alpha) S + alpha T.
    `kl_clip` bounds each entry's contribution from above, before the sum. Those of a KL can be negative, those of the
    mixtures cannot: a clipped KL may therefore be below zero.
    """
    s, t = student_log_probs, teacher_log_probs
    if alpha == 0.0:
        shares = _kl(t, s)
    elif alpha == 1.0:
        shares = _kl(s, t)
    else:
        m = torch.logaddexp(s + math.log1p(-alpha), t + math.log(alpha))
        shares = torch.lerp(_kl(s, m), _kl(t, m), alpha)
    if kl_clip is not None:
        shares = shares.clamp(max=kl_clip)
    return shares.sum(dim=-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Each entry's contribution to KL(P||Q): P log(P/Q), of log-probabilities."""
    return F.kl_div(q, p, reduction="none", log_target=True)


def on_support(student_log_probs: Tensor, teacher_log_probs: Tensor, config: DistillConfig) -> tuple[Tensor, Tensor]:
    """The two distributions that are compared: `[..., V]`, `[..., V]` -> `[..., K]`, `[..., K]`, log-probabilities.

    `mode=full`, or a top-k that is the whole vocabulary: as they come. `mode=topk`: the entries that are among the k
    likeliest of `config.support`, the same ones for both, and the mass outside them in one more bucket (`add_tail`)
    or divided among them.
    """
    if compares_all(config, student_log_probs.shape[-1]):
        return student_log_probs, teacher_log_probs
    ids = support_ids(student_log_probs, teacher_log_probs, config)
    return on_shared_support(student_log_probs.gather(-1, ids), teacher_log_probs.gather(-1, ids), ids, config)


def compares_all(config: DistillConfig, vocab: int) -> bool:
    return config.mode == "full" or config.topk is None or config.topk >= vocab


def _largest(x: Tensor, k: int) -> Tensor:
    return x.topk(k, dim=-1).indices


def support_ids(
    student: Tensor, teacher: Tensor, config: DistillConfig, largest: Callable[[Tensor, int], Tensor] = _largest
) -> Tensor:
    """The entries that `mode=topk` compares, `[..., K]`: of anything that is in the order of the log-probabilities."""
    choosers = {"student": (student,), "teacher": (teacher,), "union": (student, teacher)}[config.support]
    assert config.topk is not None  # `DistillConfig.check`
    ids = torch.cat([largest(x, config.topk) for x in choosers], dim=-1)
    return ids.sort(dim=-1).values if config.support == "union" else ids


def on_shared_support(
    student: Tensor, teacher: Tensor, ids: Tensor, config: DistillConfig
) -> tuple[Tensor, Tensor]:
    """`on_support` of log-probabilities at `support_ids`, `[..., K]` each."""
    if config.support == "union":
        # A token that both choose is counted once: of two equal neighbours the second becomes an empty bucket.
        repeated = F.pad(ids[..., 1:] == ids[..., :-1], (1, 0))
        student, teacher = (x.masked_fill(repeated, LOG_ZERO) for x in (student, teacher))
    first, second = (_with_tail(x) if config.add_tail else torch.log_softmax(x, dim=-1) for x in (student, teacher))
    return first, second


def _with_tail(log_probs: Tensor) -> Tensor:
    """Appends log(1 - mass): `[..., K]` -> `[..., K+1]`, as published (log1mexp of the clamped log mass)."""
    log_mass = torch.logsumexp(log_probs, dim=-1, keepdim=True).clamp(max=-MIN_TAIL)
    return torch.cat([log_probs, torch.log(-torch.expm1(log_mass))], dim=-1)


def divergence_from_table(tokens: TokenBatch, config: DistillConfig) -> Tensor:
    """`[r]`: `loss_from_log_probs` of the first teacher's table, with `config.support` the teacher's top-k."""
    if config.mode == "sampled":
        loss = (tokens.log_probs - tokens.teacher_log_probs).detach() * tokens.log_probs
    else:
        ids, teacher = (x[tokens.rows] for x in tokens.tables[0][1:])
        student = tokens.at(ids).masked_fill(teacher <= LOG_ZERO, LOG_ZERO)
        pair = on_shared_support(student, teacher.to(student.dtype), ids, config)
        loss = token_divergence(*pair, config.alpha, config.kl_clip)
    return loss * importance_ratio(tokens.log_probs, tokens.get("old_log_probs"), config.is_clip)


def importance_ratio(token_log_probs: Tensor, old_log_probs: Tensor | None, is_clip: float | None) -> Tensor | float:
    """min(S/S_old, c) of the sampled token, detached; S_old: the policy before the update, None if that is S itself."""
    if is_clip is None:
        return 1.0
    if old_log_probs is None:
        return min(1.0, is_clip)
    log_ratio = token_log_probs.detach() - old_log_probs.to(token_log_probs.dtype)
    return log_ratio.clamp(-20.0, 20.0).exp().clamp(max=is_clip)


def loss_from_log_probs(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    token_ids: Tensor,
    config: DistillConfig,
    old_log_probs: Tensor | None = None,
) -> Tensor:
    """`per_token_loss` for distributions that are normalised already: `[..., V]`, `[..., V]`, `[...]` -> `[...]`."""
    student_token = student_log_probs.gather(-1, token_ids[..., None]).squeeze(-1)
    if config.mode == "sampled":
        teacher_token = teacher_log_probs.gather(-1, token_ids[..., None]).squeeze(-1)
        loss = (student_token - teacher_token).detach() * student_token
    else:
        student, teacher = on_support(student_log_probs, teacher_log_probs, config)
        loss = token_divergence(student, teacher, config.alpha, config.kl_clip)
    return loss * importance_ratio(student_token, old_log_probs, config.is_clip)


def per_token_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    config: DistillConfig,
    old_log_probs: Tensor | None = None,
) -> Tensor:
    """The loss of every token: logits `[..., V]`, sampled `token_ids` and `old_log_probs` `[...]` -> `[...]`."""
    student = log_probs(student_logits)
    teacher = log_probs(teacher_logits.detach()).to(student.dtype)
    return loss_from_log_probs(student, teacher, token_ids, config, old_log_probs)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    loss_mask: Tensor,
    config: DistillConfig,
    old_log_probs: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> Tensor:
    """The mean loss over the mask: logits `[B, T, V]`, everything else `[B, T]` -> scalar.

    `token_weights` scale single tokens (to gate by entropy or pass rate) and do not enter the mean's denominator.
    Tokens of mask or weight 0 are left out before any arithmetic, so what their logits hold does not matter. Without
    any token the loss is a zero that still backpropagates.
    """
    weights = loss_mask if token_weights is None else (loss_mask * token_weights).where(loss_mask != 0, 0)
    rows = weights != 0
    losses = per_token_loss(
        student_logits[rows], teacher_logits[rows], token_ids[rows], config,
        None if old_log_probs is None else old_log_probs[rows],
    )
    return (losses * weights[rows].to(losses.dtype)).sum() / loss_mask.sum(dtype=losses.dtype).clamp(min=1)
