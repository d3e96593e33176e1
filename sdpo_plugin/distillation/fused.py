"""The loss of `loss.py` from hidden states and head weights, in memory that does not grow with the tokens.

Logits over a vocabulary of 150,000 are the largest tensors of a training step. Here they exist for one chunk of rows at
a time, and so do their gradients: as in Liger-Kernel (arXiv 2410.10989) the gradients of hidden states and head are
made in the forward pass, while the chunk's logits are at hand, and the backward pass only scales them. Where the
log-probabilities are differentiated too (a policy loss beside the distillation), their gradient is unknown until the
backward pass, which then makes the chunk's logits again.

This module multiplies matrices. The loss of a few rows is whatever function of `loss.TokenBatch` it is given, under an
autograd graph that ends with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdpo_plugin.config import DistillConfig
from sdpo_plugin.distillation import by_row
from sdpo_plugin.distillation.head import Head, TeacherStates
from sdpo_plugin.distillation.loss import (
    Objective,
    TeacherTable,
    TokenBatch,
    Unread,
    entropy_of,
    objective_of,
)
from sdpo_plugin.distillation.products import accumulate, head_products, product_dtype, rows_at_a_time, sum_dtype


@dataclass(frozen=True)
class HeadOutput:
    """What a pass over N rows yields, in float32 (float64 for a float64 head)."""

    loss: Tensor  # scalar: the sum of weights * token_loss
    token_loss: Tensor  # [N], detached; 0 where the weight is 0
    log_probs: Tensor  # [N], of token_ids
    entropy: Tensor | None  # [N]


def linear_distillation(
    student_hidden: Tensor,
    student_head: Head,
    teachers: Sequence[TeacherStates | TeacherTable],
    token_ids: Tensor,
    weights: Tensor,
    objective: Objective,
    *,
    data: Mapping[str, Tensor] | None = None,
    read: Tensor | None = None,
    temperature: float = 1.0,
    differentiable_log_probs: bool = False,
    with_entropy: bool = False,
    chunk_size: int | None = None,
) -> HeadOutput:
    """`sum(weights * objective(tokens))` of all models' logits / temperature, without the logits.

    A teacher's table has been made at this temperature; either all teachers are tables, or none.

    Student hidden states `[N, H]`; token_ids, weights and all of `data` `[N]`. Rows of weight 0 get neither teacher
    logits nor a loss, but log-probabilities and entropy like all others; those of `read` (bool `[N]`) are shown to
    `objective` all the same, without being part of the sum. Gradients reach the student's hidden states,
    weight and bias; they are summed in float32 (float64 for float64) and returned in the dtype of what they belong to.

    `objective` maps `loss.TokenBatch`, a few rows at a time, to their losses: any function of the student's and the
    teachers' distributions that treats rows alone. It may be called more than once for a row.

    `differentiable_log_probs` lets gradients through `log_probs` and `entropy`, at the price of all heads' products
    once more in the backward pass, where the weights must be in place again (ZeRO-3 gathers them for the forward).
    """
    states = [t for t in teachers if isinstance(t, TeacherStates)]
    distilled = _Distillation(
        [TeacherStates(t.hidden.detach(), t.head.effective(temperature)) for t in states],
        weights.detach(), objective, data or {}, read, [t for t in teachers if isinstance(t, TeacherTable)],
    )
    job = _Job(token_ids, temperature, with_entropy, chunk_size, distilled)
    return _run(student_hidden, student_head, job, differentiable_log_probs)


def linear_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    token_ids: Tensor,
    loss_mask: Tensor,
    config: DistillConfig,
    old_log_probs: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`loss.distillation_loss` of `hidden @ head.T / temperature`: hidden `[N, H]`, heads `[V, H]`, the rest `[N]`.

    The same value and gradients, never a `[N, V]` tensor. Rows of mask 0 are not read.
    """
    sums = sum_dtype(student_head)
    weights = loss_mask.to(sums) / loss_mask.sum(dtype=sums).clamp(min=1)
    teacher = TeacherStates(teacher_hidden.detach(), Head(teacher_head).effective(temperature))
    data = {} if old_log_probs is None else {"old_log_probs": old_log_probs}
    distilled = _Distillation([teacher], weights, objective_of(config), data)
    job = _Job(token_ids, temperature, False, None, distilled, rows=weights != 0)
    return _run(student_hidden, Head(student_head), job, differentiable_log_probs=False).loss


def linear_log_probs(
    hidden: Tensor,
    head: Head,
    token_ids: Tensor,
    temperature: float = 1.0,
    *,
    with_entropy: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of `token_ids` and entropies, differentiable: hidden `[N, H]`, ids `[N]` -> `[N]`, `[N]`."""
    scores = _run(hidden, head, _Job(token_ids, temperature, with_entropy, chunk_size), differentiable_log_probs=True)
    return scores.log_probs, scores.entropy


class _Distillation(NamedTuple):
    """What a pass distils."""

    teachers: Sequence[TeacherStates]
    weights: Tensor
    objective: Objective
    data: Mapping[str, Tensor]
    read: Tensor | None = None
    tables: Sequence[TeacherTable] = ()


class _Job(NamedTuple):
    """Arguments of a pass over the rows, except the tensors that get gradients."""

    token_ids: Tensor
    temperature: float
    with_entropy: bool
    chunk_size: int | None
    distilled: _Distillation | None = None
    rows: Tensor | None = None  # [N] bool, the rows to visit; None: all


class _Upstream(NamedTuple):
    """The gradients that arrive at the outputs of a pass."""

    loss: Tensor | float | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None


def _run(hidden: Tensor, head: Head, job: _Job, differentiable_log_probs: bool) -> HeadOutput:
    # fp16 cannot hold the gradient of a mean over many tokens before DeepSpeed's loss scale has multiplied it, which
    # the backward pass brings. The second sweep has it; gradients computed ahead would have to be kept in float32.
    eager = torch.is_grad_enabled() and not differentiable_log_probs and head.weight.dtype != torch.float16
    if head.second_weight is not None and torch.is_grad_enabled():
        raise ValueError("a head with a second weight is a teacher's: it gets no gradient")
    apart: Any = None  # tensors that get gradients are arguments of their own
    scores = _Pass.apply(hidden, head.weight, head.bias, replace(head, weight=apart, bias=apart), job, eager)
    loss, token_loss, log_probs, entropy = scores
    if not differentiable_log_probs:
        log_probs, entropy = log_probs.detach(), None if entropy is None else entropy.detach()
    return HeadOutput(loss, token_loss, log_probs, entropy)


class _Pass(torch.autograd.Function):
    """A sweep over the rows. `eager` makes the gradients of the loss along the way, else a second sweep makes them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, job, eager):
        needed = ctx.needs_input_grad[:3] if eager else (False, False, False)
        upstream = _Upstream(loss=1.0) if any(needed) else _Upstream()
        outputs, gradients = _sweep(hidden, replace(head, weight=weight, bias=bias), job, upstream, needed)
        _, token_loss, log_probs, entropy = outputs
        fixed = (token_loss, log_probs, entropy) if eager else (token_loss,)
        ctx.mark_non_differentiable(*(x for x in fixed if x is not None))
        ctx.set_materialize_grads(False)
        ctx.head, ctx.eager, ctx.gradients = head, eager, gradients
        ctx.job = None if eager else job  # it holds the teachers' heads
        if not eager:
            ctx.save_for_backward(hidden, weight, bias)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, loss, _, log_probs, entropy):
        if loss is None and log_probs is None and entropy is None:
            return (None,) * 6
        keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        if ctx.eager:
            gradients = ctx.gradients
            if gradients is None:
                raise RuntimeError("this graph's gradients are used up: retain_graph=True, or compute the loss again")
            if keep_graph:
                gradients = tuple(None if gradient is None else gradient * loss for gradient in gradients)
            else:
                # Given away and scaled in place: a copy of the head's would be the largest tensor of the step.
                ctx.gradients = None
                for gradient in gradients if loss.item() != 1.0 else ():
                    if gradient is not None:
                        gradient.mul_(loss)
        else:
            hidden, weight, bias = ctx.saved_tensors
            distilled = ctx.job.distilled if loss is not None else None
            job = ctx.job._replace(distilled=None if distilled is None else distilled._replace(read=None))
            reached = [job.distilled.weights] if job.distilled is not None else []
            reached += [x for x in (log_probs, entropy) if x is not None]
            job = job._replace(rows=torch.stack([x != 0 for x in reached]).any(dim=0))
            head = replace(ctx.head, weight=weight, bias=bias)
            _, gradients = _sweep(hidden, head, job, _Upstream(loss, log_probs, entropy), ctx.needs_input_grad[:3])
            ctx.job = ctx.job if keep_graph else None
        return (*gradients, None, None, None)


def _sweep(hidden: Tensor, head: Head, job: _Job, upstream: _Upstream, needed: Sequence[bool]):
    """Visits the rows, a chunk of them at a time.

    Returns the outputs (loss, token_loss, log_probs, entropy) and, where `needed`, the gradients of hidden states,
    weight and bias for the `upstream` gradients of the outputs.
    """
    student_head, sums, n = head.effective(job.temperature), sum_dtype(head.weight), len(hidden)
    vocab = len(student_head.weight)
    teachers = () if job.distilled is None else job.distilled.teachers
    for teacher in teachers:
        if len(teacher.head.weight) != vocab:
            raise ValueError(
                f"the student's head has {vocab} tokens and the teacher's {len(teacher.head.weight)}: "
                "give both heads the same vocab_size"
            )
    token_loss = hidden.new_zeros(n, dtype=sums)
    log_probs = torch.zeros_like(token_loss)
    entropy = torch.zeros_like(token_loss) if job.with_entropy else None
    grad_hidden = torch.zeros_like(hidden) if needed[0] else None
    grad_weight = torch.zeros_like(head.weight, dtype=sums) if needed[1] else None
    grad_bias = torch.zeros_like(head.bias, dtype=sums) if needed[2] and head.bias is not None else None

    outputs, gradients = (token_loss, log_probs, entropy), (grad_hidden, grad_weight, grad_bias)
    _visit(hidden, student_head, job, upstream, outputs, gradients)
    loss = (token_loss * job.distilled.weights.to(sums)).sum() if job.distilled is not None else None
    grad_weight = None if grad_weight is None else grad_weight.to(head.weight.dtype)
    grad_bias = None if grad_bias is None or head.bias is None else grad_bias.to(head.bias.dtype)
    return (loss, token_loss, log_probs, entropy), (grad_hidden, grad_weight, grad_bias)


def _visit(
    hidden: Tensor, student_head: Head, job: _Job, upstream: _Upstream, outputs: Sequence[Tensor | None],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """The loop of `_sweep`, which fills in `outputs` (token_loss, log_probs, entropy) and adds to `gradients`."""
    dtype, teachers = sum_dtype(student_head.weight), () if job.distilled is None else job.distilled.teachers
    vocab = len(student_head.weight)
    chunk_rows, tile_rows = rows_at_a_time(hidden.device, vocab * dtype.itemsize)
    chunk_rows = min(job.chunk_size or chunk_rows, max(len(hidden), 1))
    student_buffer = hidden.new_empty(chunk_rows, vocab, dtype=dtype)
    teacher_buffers = [torch.empty_like(student_buffer) for _ in teachers]

    visited = hidden.new_ones(len(hidden), dtype=torch.bool) if job.rows is None else job.rows
    taught = torch.zeros_like(visited) if job.distilled is None else visited & (job.distilled.weights != 0)
    if job.distilled is not None and job.distilled.read is not None:
        taught |= visited & job.distilled.read
    untaught = (visited & ~taught, job._replace(distilled=None), upstream._replace(loss=None))
    for mask, part, arriving in ((taught, job, upstream), untaught):
        for rows in _split(mask.nonzero().squeeze(-1), chunk_rows):
            states = hidden[rows].to(product_dtype(student_head.weight))
            student = head_products(states, student_head, student_buffer)
            taught_by = [] if part.distilled is None else [
                head_products(teacher.hidden[rows], teacher.head, buffer)
                for teacher, buffer in zip(teachers, teacher_buffers, strict=True)
            ]  # fmt: skip
            for tile, scores in _scored(student, taught_by, rows, student_head, part, arriving, tile_rows):
                for output, values in zip(outputs, scores, strict=True):
                    if output is not None and values is not None:
                        output[tile] = values
            if any(x is not None for x in arriving):
                accumulate(student, states, student_head.weight, rows, *gradients)


def _scored(
    student: Tensor, taught_by: Sequence[Tensor], rows: Tensor, head: Head, job: _Job, upstream: _Upstream,
    tile_rows: int,
) -> Iterator[tuple[Tensor, Any]]:
    """A chunk in tiles: which rows, and their (token_loss, log_probs, entropy) `[r]`.

    Where an upstream gradient arrives, that of the student's products is written over them.
    """
    heads = [head, *(teacher.head for teacher in (job.distilled.teachers if job.distilled else ()))]
    if (kernels := by_row.kernels(student, heads)) is not None:
        try:
            yield rows, _score_by_row(kernels, student, taught_by, rows, heads, job, upstream)
            return
        except by_row.WholeDistribution:
            pass
    for start in range(0, len(rows), tile_rows):
        tile = slice(start, start + tile_rows)
        yield rows[tile], _score(student[tile], [x[tile] for x in taught_by], rows[tile], heads, job, upstream)


def _score(
    products: Tensor, teacher_products: Sequence[Tensor], rows: Tensor, heads: Sequence[Head], job: _Job,
    upstream: _Upstream,
) -> Any:
    """(token_loss, log_probs, entropy) `[r]` from log-probabilities `[r, V]`, which are differentiated by autograd."""
    distilled, differentiate = job.distilled, any(x is not None for x in upstream)
    with torch.set_grad_enabled(differentiate):
        leaf = products.detach().requires_grad_(differentiate)
        student, *teachers = (head.log_probs(x) for x, head in zip((leaf, *teacher_products), heads, strict=True))
        data, tables = (distilled.data, distilled.tables) if distilled else ({}, ())
        shown = Unread() if tables else teachers
        tokens = TokenBatch(student, shown, job.token_ids[rows], rows, data, tables)
        entropy = entropy_of(student) if job.with_entropy else None
        loss = None if distilled is None else distilled.objective(tokens)
        outputs = (loss, tokens.log_probs, entropy)
    if differentiate:
        reached, gradients = _reached(outputs, rows, job, upstream)
        (gradient,) = torch.autograd.grad(reached, leaf, gradients)
        products.copy_(gradient)  # they are not needed any more
    return outputs


def _score_by_row(
    kernels: Any, products: Tensor, teacher_products: Sequence[Tensor], rows: Tensor, heads: Sequence[Head],
    job: _Job, upstream: _Upstream,
) -> Any:
    """`_score` without a tensor `[r, V]`. Raises WholeDistribution where the objective reads one."""
    distilled, differentiate = job.distilled, any(x is not None for x in upstream)
    with torch.set_grad_enabled(differentiate):
        taught_by = list(zip(teacher_products, heads[1:], strict=True))
        data, tables = (distilled.data, distilled.tables) if distilled else ({}, ())
        ids = job.token_ids[rows]
        tokens = by_row.RowTokens(kernels, products, heads[0], taught_by, ids, rows, data, tables, differentiate)
        loss = None if distilled is None else distilled.objective(tokens)
        outputs = (loss, tokens.log_probs, tokens.entropy if job.with_entropy else None)
    if differentiate:
        tokens.write_gradient(*_reached(outputs, rows, job, upstream))
    return outputs


def _reached(outputs: Sequence[Tensor | None], rows: Tensor, job: _Job, upstream: _Upstream) -> Any:
    """Of a tile's outputs those that a gradient arrives at, and these gradients, `[r]` each."""
    loss = outputs[0]
    arriving = (
        None if upstream.loss is None or job.distilled is None or loss is None
        else upstream.loss * job.distilled.weights[rows].to(loss.dtype),
        None if upstream.log_probs is None else upstream.log_probs[rows],
        None if upstream.entropy is None else upstream.entropy[rows],
    )  # fmt: skip
    pairs = [(x, g) for x, g in zip(outputs, arriving, strict=True) if x is not None and g is not None]
    return [x for x, _ in pairs], [g for _, g in pairs]


def _split(rows: Tensor, size: int) -> Sequence[Tensor]:
    """`rows.split(size)`, but no chunk where there are no rows."""
    return rows.split(size) if len(rows) else ()
