"""The flat-memory loss against the readable one: values, gradients, and what it allocates."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sdpo_plugin.config import DistillConfig
from sdpo_plugin.distillation import fused, products
from sdpo_plugin.distillation.fused import linear_distillation_loss, linear_log_probs
from sdpo_plugin.distillation.head import Head, TeacherStates
from sdpo_plugin.distillation.loss import LOG_ZERO, TokenBatch, distillation_loss, objective_of, per_token_loss

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "self_distillation_loss.json").read_text())
quick = settings(deadline=None, max_examples=25, derandomize=True)

CONFIGS = [DistillConfig(mode="full", alpha=a, is_clip=None) for a in (0.0, 0.3, 1.0)]
CONFIGS += [DistillConfig(mode="full", kl_clip=0.02, is_clip=2.0), DistillConfig(mode="sampled", alpha=1.0)]
CONFIGS += [
    DistillConfig(mode="topk", alpha=a, topk=5, support=s, add_tail=t, kl_clip=c, is_clip=2.0)
    for a, s, t, c in itertools.product(
        (0.0, 0.5, 1.0), ("student", "teacher", "union"), (True, False), (None, 0.02)
    )
]
some_config = st.sampled_from(CONFIGS)
seeds = st.integers(0, 2**31)
HEADS = {
    "bare": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 2.0},
    "padded": {"vocab_size": 17},
    "everything": {"bias": True, "scale": 1.5, "softcap": 3.0, "vocab_size": 17},
}


def linear_distillation(
    student_hidden, student_head, teacher_hidden, teacher_head, token_ids, weights, config, old=None, temperature=1.0,
    *, reweigh=None, **options,
):
    """The pass with the loss of `config`, times `reweigh(log_probs, rows)`."""

    def objective(tokens):
        loss = objective_of(config)(tokens)
        return loss if reweigh is None else loss * reweigh(tokens.log_probs.detach(), tokens.rows)

    teachers, data = [TeacherStates(teacher_hidden, teacher_head)], {} if old is None else {"old_log_probs": old}
    return fused.linear_distillation(
        student_hidden, student_head, teachers, token_ids, weights, objective, data=data, temperature=temperature,
        **options,
    )


class Case:
    """Random hidden states and heads, and what the readable loss makes of them."""

    def __init__(self, seed=0, n=13, h=6, v=21, dtype=torch.float64, bias=False, **options):
        g = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        self.hidden, self.teacher_hidden = normal(n, h).requires_grad_(), normal(n, h + 1)
        self.head = Head(normal(v, h).requires_grad_(), normal(v).requires_grad_() if bias else None, **options)
        self.teacher_head = Head(normal(v, h + 1), normal(v) if bias else None, **options)
        self.token_ids = torch.randint(options.get("vocab_size") or v, (n,), generator=g)
        self.mask = (torch.rand(n, generator=g) < 0.6).to(dtype)
        self.weights = self.mask * torch.rand(n, generator=g, dtype=torch.float64).to(dtype)
        self.old = -4 * torch.rand(n, generator=g, dtype=torch.float64)

    def widen(self):
        """The same numbers in float32."""
        self.hidden, self.teacher_hidden = self.hidden.detach().float().requires_grad_(), self.teacher_hidden.float()
        self.head, self.teacher_head = (
            Head(h.weight.detach().float(), h.bias.detach().float()) for h in (self.head, self.teacher_head)
        )
        self.head.weight.requires_grad_()
        self.head.bias.requires_grad_()

    @property
    def leaves(self):
        return [x for x in (self.hidden, self.head.weight, self.head.bias) if x is not None]

    @property
    def arguments(self):
        return self.hidden, self.head, self.teacher_hidden, self.teacher_head, self.token_ids

    def contract(self, cfg):
        """Arguments of `linear_distillation_loss`."""
        return (self.hidden, self.head.weight, self.teacher_hidden, self.teacher_head.weight, self.token_ids,
                self.mask, cfg)

    def dense(self, cfg, temperature):
        """Loss, log-probabilities and entropies from whole logits."""
        student, teacher = (
            dense_logits(h, head) / temperature
            for h, head in ((self.hidden, self.head), (self.teacher_hidden, self.teacher_head))
        )
        losses = per_token_loss(student, teacher, self.token_ids, cfg, self.old)
        log_probs = torch.log_softmax(student, -1)
        entropy = torch.distributions.Categorical(logits=student).entropy()
        return (losses * self.weights).sum(), log_probs.gather(-1, self.token_ids[:, None]).squeeze(-1), entropy


def dense_logits(hidden, head):
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    if head.vocab_size is not None:
        logits = logits.masked_fill(torch.arange(logits.shape[-1]) >= head.vocab_size, -math.inf)
    return logits


def assert_same(got, expected, tolerance=1e-9):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# The same value and gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['mode']}-{c['alpha']}-{c['topk']}-{c['loss_agg']}")
def test_recorded_cases(case, dtype):
    b, t, v = case["shape"]
    # A head that is the identity: the hidden states are the logits.
    student, teacher = (torch.tensor(case[k], dtype=dtype).view(-1, v) for k in ("student_logits", "teacher_logits"))
    student.requires_grad_()
    mask = torch.tensor(case["response_mask"]).view(b, t) * torch.tensor(case["self_distillation_mask"])[:, None]
    cfg = DistillConfig(
        mode={"sampled_token": "sampled"}.get(case["mode"], case["mode"]), alpha=case["alpha"], topk=case["topk"],
        add_tail=case["add_tail"], is_clip=case["is_clip"],
    )
    old, ids, eye = torch.tensor(case["old_log_probs"], dtype=dtype), torch.tensor(case["token_ids"]), torch.eye(v)
    eye = eye.to(dtype)
    if case["loss_agg"] == "token-mean":
        loss = linear_distillation_loss(student, eye, teacher, eye, ids, mask.flatten(), cfg, old)
    else:
        weights = mask / mask.sum(-1, keepdim=True).clamp(min=1) / mask.any(-1).sum()
        loss = linear_distillation(student, Head(eye), teacher, Head(eye), ids, weights.flatten(), cfg, old).loss
    loss.backward()
    assert_same([loss, student.grad], [
        torch.tensor(case["expected_loss"], dtype=dtype),
        torch.tensor(case["expected_student_logits_grad"], dtype=dtype).view(-1, v),
    ], 1e-6)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("cfg", CONFIGS, ids=str)
def test_contract_equals_the_dense_loss(cfg, temperature):
    case = Case()
    loss = linear_distillation_loss(*case.contract(cfg), case.old, temperature)
    student = case.hidden @ case.head.weight.T / temperature
    teacher = case.teacher_hidden @ case.teacher_head.weight.T / temperature
    expected = distillation_loss(*(x[None] for x in (student, teacher, case.token_ids, case.mask)), cfg, case.old[None])
    assert_same(
        [loss, *torch.autograd.grad(3 * loss, case.leaves)],
        [expected, *torch.autograd.grad(3 * expected, case.leaves)],
    )


@pytest.mark.parametrize("head", HEADS)
@quick
@given(seeds, some_config, st.floats(0.3, 3.0), st.integers(1, 14), st.booleans())
def test_distillation_equals_the_dense_loss(head, seed, cfg, temperature, chunk_size, with_entropy):
    case = Case(seed, **HEADS[head])
    scores = linear_distillation(*case.arguments, case.weights, cfg, case.old, temperature,
                                 with_entropy=with_entropy, chunk_size=chunk_size)
    loss, log_probs, entropy = case.dense(cfg, temperature)
    assert_same([scores.loss, scores.log_probs], [loss, log_probs])
    assert_same([scores.entropy] if with_entropy else [], [entropy] if with_entropy else [])
    assert_same([scores.loss, *torch.autograd.grad(3 * scores.loss, case.leaves)],
                [loss, *torch.autograd.grad(3 * loss, case.leaves)])
    torch.testing.assert_close((scores.token_loss * case.weights).sum(), loss)
    assert not scores.token_loss[case.weights == 0].any()
    assert not any(x.requires_grad for x in (scores.token_loss, scores.log_probs))


@pytest.mark.parametrize("head", HEADS)
@quick
@given(seeds, some_config, st.floats(0.3, 3.0), st.integers(1, 14), st.sampled_from([
    lambda loss, log_probs, entropy: 0.3 * loss + (log_probs.exp() * log_probs).sum() - (entropy**2).mean(),
    lambda loss, log_probs, entropy: log_probs[::2].sum(),
    lambda loss, log_probs, entropy: 2 * loss,
    lambda loss, log_probs, entropy: entropy[1] + loss,
]))
def test_any_function_of_loss_log_probs_and_entropy_is_differentiated(head, seed, cfg, temperature, chunk_size, f):
    case = Case(seed, **HEADS[head])
    scores = linear_distillation(*case.arguments, case.weights, cfg, case.old, temperature,
                                 differentiable_log_probs=True, with_entropy=True, chunk_size=chunk_size)
    got, expected = f(scores.loss, scores.log_probs, scores.entropy), f(*case.dense(cfg, temperature))
    assert_same([got, *torch.autograd.grad(got, case.leaves)], [expected, *torch.autograd.grad(expected, case.leaves)])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("head", HEADS)
def test_log_probs_alone(head):
    case = Case(**HEADS[head])
    _, log_probs, entropy = case.dense(CONFIGS[0], 1.3)
    got = linear_log_probs(case.hidden, case.head, case.token_ids, 1.3, with_entropy=True, chunk_size=4)
    assert_same(got, [log_probs, entropy])
    sums = (got[0] * case.old).sum() + got[1].sum(), (log_probs * case.old).sum() + entropy.sum()
    assert_same(*(torch.autograd.grad(x, case.leaves) for x in sums))
    assert linear_log_probs(case.hidden, case.head, case.token_ids)[1] is None


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("cfg", CONFIGS[:6], ids=str)
def test_gradcheck(cfg, differentiable):
    case = Case(n=5, h=3, v=8, bias=True, softcap=3.0)
    cfg = replace(cfg, is_clip=None)  # the ratio is detached, so that differences of the loss would not agree

    def f(hidden, weight, bias):
        scores = linear_distillation(
            hidden, replace(case.head, weight=weight, bias=bias), *case.arguments[2:], case.weights, cfg, chunk_size=2,
            differentiable_log_probs=differentiable, with_entropy=differentiable,
        )
        return (scores.loss, scores.log_probs, scores.entropy) if differentiable else scores.loss

    if cfg.mode != "sampled":  # there, too, a factor is detached
        torch.autograd.gradcheck(f, case.leaves, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("cfg", CONFIGS[:7], ids=str)
def test_chunk_size_changes_nothing(cfg, dtype, monkeypatch):
    case = Case(n=40, dtype=dtype)
    results = []
    for chunk_size, unit in ((None, products.MIB), (1, 1), (7, 1), (16, 8), (39, 64), (1000, 1)):
        monkeypatch.setattr(products, "MIB", unit)  # tiles of all sizes, too
        loss = linear_distillation(*case.arguments, case.weights, cfg, case.old, chunk_size=chunk_size).loss
        results.append([loss, *torch.autograd.grad(loss, case.leaves)])
    for result in results[1:]:
        assert_same(result, results[0], 1e-6)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("cfg", CONFIGS[:7], ids=str)
def test_one_tensor_may_be_both_heads(cfg):
    case = Case()
    case.teacher_hidden, case.teacher_head = case.teacher_hidden[:, :-1], case.head
    loss = linear_distillation_loss(*case.contract(cfg), case.old)
    student, teacher = (h @ case.head.weight.T for h in (case.hidden, case.teacher_hidden))
    expected = distillation_loss(student, teacher, case.token_ids, case.mask, cfg, case.old)
    assert_same(
        [loss, *torch.autograd.grad(loss, case.leaves)], [expected, *torch.autograd.grad(expected, case.leaves)]
    )


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("cfg", CONFIGS[:5], ids=str)
def test_weights_may_depend_on_the_student_s_own_log_probabilities(cfg, differentiable):
    case, engine = Case(), Case(1).old
    scores = linear_distillation(*case.arguments, case.weights, cfg, case.old, chunk_size=4,
                                 reweigh=lambda log_probs, rows: (log_probs - engine[rows]).exp().clamp(max=2.0),
                                 differentiable_log_probs=differentiable)
    factors = (case.dense(cfg, 1.0)[1].detach() - engine).exp().clamp(max=2.0)
    case.weights = case.weights * factors
    expected = case.dense(cfg, 1.0)[0]
    assert factors.min() < 1 < factors.max()
    assert_same([scores.loss, *torch.autograd.grad(scores.loss, case.leaves)],
                [expected, *torch.autograd.grad(expected, case.leaves)])


# 16-bit parameters


# Rounded logits choose other top-k tokens, so that mode is compared where the products are float32.
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "cfg, native", [(CONFIGS[1], False), (CONFIGS[1], True), (CONFIGS[4], True), (CONFIGS[5], False)], ids=str
)
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_is_close_to_float32(cfg, dtype, differentiable, native, monkeypatch):
    if native:  # products as on a GPU
        for module, name in ((fused, "product_dtype"), (products, "product_dtype"), (products, "factor_dtype")):
            monkeypatch.setattr(module, name, lambda weight: weight.dtype)
    monkeypatch.setattr(products, "MIB", 16)  # several blocks of the head
    case, exact = (Case(n=30, bias=True, dtype=dtype) for _ in range(2))
    exact.widen()
    results = []
    for c in (case, exact):
        scores = linear_distillation(*c.arguments, case.weights.float(), cfg, chunk_size=8,
                                     differentiable_log_probs=differentiable)
        assert scores.loss.dtype == scores.log_probs.dtype == scores.token_loss.dtype == torch.float32
        total = scores.loss + scores.log_probs.sum() if differentiable else scores.loss
        results.append([total, *torch.autograd.grad(total, c.leaves)])
    assert [x.dtype for x in results[0][1:]] == [dtype] * 3
    for got, expected in zip(*results, strict=True):
        assert (got.float() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.usefixtures("device")
def test_only_gradients_of_fp16_are_products_of_float32_factors(monkeypatch):
    """On a GPU: logits are products of fp16 factors, gradients of float32 ones with 11 bits of each."""
    seen = []
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, noting(getattr(torch, name), name, seen))
    monkeypatch.setattr(torch.Tensor, "addmm_", noting(torch.Tensor.addmm_, "addmm_", seen))
    case = Case(n=4, dtype=torch.float16)
    scores = linear_distillation(*case.arguments, torch.ones(4), CONFIGS[0])
    torch.autograd.grad(scores.loss, case.leaves)
    logits = torch.float32 if case.hidden.device.type == "cpu" else torch.float16
    assert {(dtype, precision) for name, dtype, precision in seen if name == "mm"} == {(logits, "highest")}
    assert {(dtype, precision) for name, dtype, precision in seen if name == "addmm_"} == {(torch.float32, "high")}
    assert torch.get_float32_matmul_precision() == "highest"


def noting(product, name, seen):
    def call(*args, **kwargs):
        seen.append((name, args[-1].dtype, torch.get_float32_matmul_precision()))
        return product(*args, **kwargs)

    return call


@pytest.mark.usefixtures("device")
def test_16_bit_gradients_are_summed_in_float32():
    # 4096 equal rows: a bf16 sum would stall long before the end.
    case = Case(n=1, dtype=torch.bfloat16)
    rows = [x.detach().expand(4096, *x.shape[1:]) for x in (case.hidden, case.teacher_hidden, case.token_ids)]
    gradients = []
    for n in (1, 4096):
        loss = linear_distillation_loss(rows[0][:n], case.head.weight, rows[1][:n], case.teacher_head.weight,
                                        rows[2][:n], torch.ones(n), CONFIGS[0])
        gradients += torch.autograd.grad(loss, case.head.weight)
    torch.testing.assert_close(*gradients, rtol=0.01, atol=0)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("tokens", [2_000, 100_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_gradients_are_rounded_after_the_loss_scale(dtype, tokens):
    """Each token's share of a mean over many is less than fp16 can hold, until DeepSpeed's loss scale multiplies it."""
    case, exact, scale = Case(n=30, bias=True, dtype=dtype), Case(n=30, bias=True, dtype=dtype), torch.tensor(65536.0)
    with torch.no_grad():
        for c, x in itertools.product((case, exact), ("weight", "bias")):
            getattr(c.head, x).mul_(0.1)  # student and teacher nearly agree
            getattr(c.teacher_head, x).mul_(0.1)
    exact.widen()
    case.weights = exact.weights = torch.full((30,), 1.0 / tokens)
    scores = linear_distillation(*case.arguments, case.weights, CONFIGS[1])
    assert not scores.log_probs.requires_grad
    got = torch.autograd.grad(scores.loss, case.leaves, scale)
    exact.old = None
    expected = torch.autograd.grad(exact.dense(CONFIGS[1], 1.0)[0], exact.leaves, scale)
    for a, b in zip(got, expected, strict=True):
        error = ((a.float() - b).norm() / b.norm()).item()
        print(f"{dtype}, {tokens} tokens: relative error {error:.1e}")
        assert a.dtype == dtype and error <= torch.finfo(dtype).eps


# Rows that do not count


@quick
@given(seeds, some_config, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_masked_rows_are_inert(seed, cfg, poison):
    case = Case(seed)
    clean = linear_distillation_loss(*case.contract(cfg), case.old)
    clean = [clean, *torch.autograd.grad(clean, case.leaves)]
    with torch.no_grad():
        out = case.mask == 0
        for x in (case.hidden, case.teacher_hidden, case.old):
            x[out] = poison
        case.token_ids[out] = -100
    poisoned = linear_distillation_loss(*case.contract(cfg), case.old)
    assert_same([poisoned, *torch.autograd.grad(poisoned, case.leaves)], clean, 0)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("differentiable", [False, True])
def test_rows_without_weight_or_gradient_are_inert(differentiable):
    case, cfg = Case(), CONFIGS[3]
    out = case.weights == 0

    def run():
        scores = linear_distillation(*case.arguments, case.weights, cfg, case.old, with_entropy=True,
                                     differentiable_log_probs=differentiable)
        total = scores.loss + (scores.log_probs[~out].sum() if differentiable else 0)
        return [total, *torch.autograd.grad(total, case.leaves)]

    clean = run()
    with torch.no_grad():
        for x in (case.hidden, case.teacher_hidden, case.old):
            x[out] = math.nan
    assert_same(run(), clean, 0)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("cfg", CONFIGS[:7], ids=str)
def test_an_empty_mask_is_a_zero_that_backpropagates(cfg):
    case = Case()
    case.mask.zero_()
    loss = linear_distillation_loss(*case.contract(cfg), case.old)
    loss.backward()
    assert loss.item() == 0.0
    assert all(x.grad is not None and not x.grad.any() for x in case.leaves)


@pytest.mark.usefixtures("device")
def test_no_rows_at_all():
    case = Case(n=0)
    scores = linear_distillation(*case.arguments, case.weights, CONFIGS[0], with_entropy=True)
    scores.loss.backward()
    assert scores.loss.item() == 0.0 and len(scores.log_probs) == len(scores.entropy) == 0
    assert not case.head.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("cfg", CONFIGS, ids=str)
def test_extreme_logits_stay_finite(cfg, dtype):
    extremes = [[0.0] * 11, [1e4] + [-1e4] * 10, [-1e4] * 10 + [1e4], [1e4] * 6 + [-1e4] * 5, list(range(11))]
    student, teacher = (
        torch.tensor(x, dtype=dtype) for x in zip(*itertools.product(extremes, extremes), strict=True)
    )
    head = torch.eye(11, dtype=dtype).requires_grad_()
    for token in (0, 10):
        ids, mask = torch.full((len(student),), token), torch.ones(len(student))
        loss = linear_distillation_loss(student.requires_grad_(), head, teacher, head, ids, mask, cfg)
        assert all(x.isfinite().all() for x in (loss, *torch.autograd.grad(loss, (student, head))))


@pytest.mark.parametrize("head", ["bias", "everything"])
@quick
@given(seeds, some_config, st.floats(0.3, 3.0), st.booleans(), st.data())
def test_tokens_that_a_bias_forbids_count_as_in_the_definition(head, seed, cfg, temperature, differentiable, data):
    """A bias of -inf on either side, or on both: log 0 is `loss.LOG_ZERO`, and 0 * log 0 is 0."""
    case = Case(seed, **HEADS[head])
    some_tokens = st.sets(st.integers(0, 16), max_size=11)  # the rest are more than top-k
    with torch.no_grad():
        for bias in (case.head.bias, case.teacher_head.bias):
            bias[list(data.draw(some_tokens))] = -math.inf
    scores = linear_distillation(*case.arguments, case.weights, cfg, case.old, temperature, chunk_size=4,
                                 differentiable_log_probs=differentiable, with_entropy=True)
    loss, log_probs, entropy = case.dense(cfg, temperature)
    assert_same([scores.loss, scores.log_probs, scores.entropy], [loss, log_probs.clamp(min=LOG_ZERO), entropy])
    for got, expected in zip(*(torch.autograd.grad(x, case.leaves) for x in (scores.loss, loss)), strict=True):
        # Entries cancel from some 1e14 where one side forbids what the other expects.
        assert (got - expected).abs().max() <= 1e-9 * max(expected.abs().max(), 1.0)


# Gradients and nothing more


@pytest.mark.usefixtures("device")
def test_only_what_needs_a_gradient_gets_one():
    case, cfg = Case(bias=True), CONFIGS[0]
    loss = linear_distillation(*case.arguments, case.weights, cfg).loss
    expected = torch.autograd.grad(loss, case.leaves)
    for i, leaf in enumerate(case.leaves):
        for other in case.leaves:
            other.requires_grad_(other is leaf)
        for differentiable in (False, True):
            scores = linear_distillation(*case.arguments, case.weights, cfg, differentiable_log_probs=differentiable)
            assert_same(torch.autograd.grad(scores.loss, leaf), expected[i : i + 1])
    case.leaves[-1].requires_grad_(False)
    assert not linear_distillation(*case.arguments, case.weights, cfg).loss.requires_grad


@pytest.mark.usefixtures("device")
def test_a_loss_can_be_backpropagated_as_long_as_its_graph_is_kept():
    case = Case()
    loss = linear_distillation_loss(*case.contract(CONFIGS[0]))
    plain = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    halves = [x / 2 for x in plain]
    assert_same(torch.autograd.grad(loss, case.leaves, torch.tensor(0.5), retain_graph=True), halves)
    assert_same(torch.autograd.grad(loss, case.leaves, torch.tensor(0.5)), halves)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        torch.autograd.grad(loss, case.leaves)


@pytest.mark.usefixtures("device")
def test_the_second_weight_of_a_teacher_s_head_adds_its_logits():
    case, cfg = Case(bias=True), DistillConfig(mode="full", alpha=0.5)
    other_hidden, other = torch.randn_like(case.hidden), torch.randn_like(case.head.weight)
    combined = torch.cat([case.teacher_hidden, other_hidden], -1)
    head = replace(case.teacher_head, second_weight=other)
    got = linear_distillation(case.hidden, case.head, combined, head, case.token_ids, case.weights, cfg, case.old)
    teacher = case.teacher_hidden @ case.teacher_head.weight.T + case.teacher_head.bias + other_hidden @ other.T
    student = case.hidden @ case.head.weight.T + case.head.bias
    expected = (per_token_loss(student, teacher, case.token_ids, cfg, case.old) * case.weights).sum()
    torch.testing.assert_close(got.loss, expected)


def test_heads_of_different_size_are_rejected():
    case = Case()
    teacher = Head(case.teacher_head.weight, vocab_size=17)
    with pytest.raises(ValueError, match="21 tokens and the teacher's 17"):
        linear_distillation(case.hidden, case.head, case.teacher_hidden, teacher, case.token_ids, case.weights,
                            CONFIGS[0])


# Memory and work


class Tracer(TorchDispatchMode):
    """Watches tensors with a dimension of size `vocab`, heads excepted: their rows, and their bytes alive at a time."""

    def __init__(self, vocab, width):
        super().__init__()
        self.vocab, self.width, self.rows, self.peak, self.alive, self.products = vocab, width, 0, 0, {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and self.vocab in x.shape and self.width not in x.shape:
                self.rows = max(self.rows, x.numel() // self.vocab)
                storage = x.untyped_storage()
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
                self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
                self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        if func.name().startswith(("aten::mm", "aten::addmm")):
            self.products.append(tuple(out.shape))
        return out


def trace(n, cfg, run, **options):
    case = Case(n=n, h=5, v=1009, dtype=torch.float32)
    with Tracer(1009, 5) as tracer:
        run(case, cfg, **options).backward()
    return tracer


def run_contract(case, cfg):
    case.mask.fill_(1)
    case.teacher_hidden, case.teacher_head = case.teacher_hidden[:, :5], case.head
    return linear_distillation_loss(*case.contract(cfg), case.old)


def run_hybrid(case, cfg, **options):
    case.weights.fill_(1)
    case.teacher_hidden, case.teacher_head = case.teacher_hidden[:, :5], case.head
    scores = linear_distillation(*case.arguments, case.weights, cfg, case.old, with_entropy=True,
                                 differentiable_log_probs=True, **options)
    return scores.loss + scores.log_probs.sum() + scores.entropy.sum()


@pytest.mark.parametrize("run", [run_contract, run_hybrid])
@pytest.mark.parametrize("cfg", [CONFIGS[1], CONFIGS[4], CONFIGS[5]], ids=str)
def test_memory_does_not_grow_with_the_rows(cfg, run):
    short, long = trace(1024, cfg, run), trace(4096, cfg, run)
    assert long.rows <= 256
    assert long.peak <= 1.05 * short.peak


def test_chunk_size_bounds_the_rows():
    assert trace(300, CONFIGS[0], run_hybrid, chunk_size=32).rows == 32


def test_rows_without_a_mask_cost_nothing():
    case = Case(n=500)
    case.mask.zero_()[100:110] = 1
    with Tracer(21, 6) as tracer:
        linear_distillation_loss(*case.contract(CONFIGS[0])).backward()
    # Both heads' logits, the gradient of the head, the gradient of the hidden states: of the ten rows.
    assert tracer.products == [(10, 21), (10, 21), (21, 6), (10, 6)]


def test_rows_without_weight_are_not_taught():
    case = Case(n=200)
    case.weights.zero_()[100:110] = 1
    with Tracer(21, 6) as tracer:
        linear_distillation(*case.arguments, case.weights, CONFIGS[0]).loss.backward()
    assert tracer.products == [(10, 21), (10, 21), (21, 6), (10, 6), (190, 21)]


def test_without_gradients_only_logits_are_made():
    case = Case(n=50)
    case.weights.fill_(1)
    with Tracer(21, 6) as tracer, torch.no_grad():
        linear_distillation(*case.arguments, case.weights, CONFIGS[0])
        linear_log_probs(case.hidden, case.head, case.token_ids)
    assert tracer.products == [(50, 21)] * 3


# The seam: any loss of single tokens


def by_entropy(tokens):
    """Forward KL, weighted by both entropies, the log-probabilities of the sampled token and what is known besides."""
    weight = (-tokens.teacher_entropy).exp() + tokens.student_entropy * tokens["reward"]
    weight = weight * (tokens.teacher_log_probs - tokens.log_probs).exp().clamp(max=2.0)
    return (tokens.teachers[0].exp() * (tokens.teachers[0] - tokens.student)).sum(-1) * weight.detach()


def against_a_wrong_one(tokens):
    """A policy gradient by the difference of two teachers."""
    right, wrong = map(tokens.gather_sampled, tokens.teachers)
    return -(right - wrong) * tokens.log_probs


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("objective", [by_entropy, against_a_wrong_one])
def test_any_loss_of_tokens_has_the_gradient_of_its_definition(objective, differentiable):
    case = Case(v=17, bias=True)
    second = Case(seed=1, v=17, bias=True)
    teachers = [TeacherStates(c.teacher_hidden, c.teacher_head) for c in (case, second)]
    reward = torch.arange(13.0, dtype=torch.float64)
    scores = fused.linear_distillation(
        case.hidden, case.head, teachers, case.token_ids, case.weights, objective, data={"reward": reward},
        temperature=0.7, differentiable_log_probs=differentiable, chunk_size=4,
    )
    logits = [(h.logits(x @ h.weight.T) / 0.7).log_softmax(-1) for x, h in ((case.hidden, case.head), *teachers)]
    teachers = [x.detach() for x in logits[1:]]
    tokens = TokenBatch(logits[0], teachers, case.token_ids, torch.arange(13), {"reward": reward})
    losses = objective(tokens)
    torch.testing.assert_close(scores.token_loss[case.weights != 0], losses[case.weights != 0].detach())
    dense = torch.autograd.grad((losses * case.weights).sum(), case.leaves)
    assert any(g.abs().sum() > 0 for g in dense)
    assert_same(torch.autograd.grad(scores.loss, case.leaves), dense)


@pytest.mark.parametrize("objective", [by_entropy, against_a_wrong_one])
def test_memory_does_not_grow_with_the_rows_for_any_loss(objective):
    def run(case, _):
        teachers = [TeacherStates(case.teacher_hidden[:, :5], case.head)] * 2
        return fused.linear_distillation(
            case.hidden, case.head, teachers, case.token_ids, torch.ones_like(case.weights), objective,
            data={"reward": case.weights},
        ).loss

    short, long = trace(1024, None, run), trace(4096, None, run)
    assert long.rows <= 256 and long.peak <= 1.05 * short.peak


def test_only_what_a_loss_asks_for_is_computed():
    """Entropies are sums over the vocabulary."""
    case, asked = Case(), []

    def objective(tokens):
        asked.append(tokens)
        return tokens.log_probs * tokens.student_entropy

    teacher = TeacherStates(case.teacher_hidden, case.teacher_head)
    fused.linear_distillation(case.hidden, case.head, [teacher], case.token_ids, case.weights, objective)
    assert asked and not any("teacher_entropy" in vars(tokens) for tokens in asked)
