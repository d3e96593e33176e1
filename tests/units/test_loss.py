"""The readable loss against recorded cases, sums written out by hand, and what it must always satisfy."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo_plugin.config import DistillConfig
from sdpo_plugin.distillation.loss import distillation_loss, per_token_loss, token_divergence

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "self_distillation_loss.json").read_text())
ALPHAS = (0.0, 0.3, 0.5, 1.0)
quick = settings(deadline=None, max_examples=25, derandomize=True)


def config(mode: str = "full", alpha: float = 0.5, topk: int | None = 5, is_clip: float | None = None, **more):
    return DistillConfig(mode=mode, alpha=1.0 if mode == "sampled" else alpha, topk=topk, is_clip=is_clip, **more)


CONFIGS = [config("full", a) for a in ALPHAS] + [config("sampled")] + [
    config("topk", a, support=s, add_tail=t)
    for a, s, t in itertools.product(ALPHAS, ("student", "teacher", "union"), (True, False))
]
some_config = st.sampled_from(CONFIGS)
seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int, scale: float = 3.0, dtype: torch.dtype = torch.float64):
    """Student and teacher logits, sampled tokens and the rollout's log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).to(dtype)
    token_ids = torch.randint(shape[-1], shape[:-1], generator=generator)
    return student, teacher, token_ids, -5 * torch.rand(shape[:-1], generator=generator, dtype=torch.float64)


def with_gradient(loss_of, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.detach().requires_grad_()
    loss = loss_of(logits)
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


# Recorded cases


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['mode']}-{c['alpha']}-{c['topk']}-{c['loss_agg']}")
def test_recorded_cases(case, dtype):
    shape = case["shape"]
    student, teacher = (
        torch.tensor(case[name], dtype=dtype).view(shape) for name in ("student_logits", "teacher_logits")
    )
    token_ids = torch.tensor(case["token_ids"]).view(shape[:-1])
    old_log_probs = torch.tensor(case["old_log_probs"], dtype=dtype).view(shape[:-1])
    mask = torch.tensor(case["response_mask"]).view(shape[:-1])
    mask = mask * torch.tensor(case["self_distillation_mask"])[:, None]
    mode = {"sampled_token": "sampled"}.get(case["mode"], case["mode"])
    cfg = config(mode, case["alpha"], case["topk"], case["is_clip"], add_tail=case["add_tail"])

    def loss_of(logits):
        if case["loss_agg"] == "token-mean":
            return distillation_loss(logits, teacher, token_ids, mask, cfg, old_log_probs)
        losses = per_token_loss(logits, teacher, token_ids, cfg, old_log_probs) * mask
        means = losses.sum(-1) / mask.sum(-1).clamp(min=1)
        return means[mask.any(-1)].mean()

    loss, gradient = with_gradient(loss_of, student)
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(loss, torch.tensor(case["expected_loss"], dtype=dtype), **tolerance)
    expected = torch.tensor(case["expected_student_logits_grad"], dtype=dtype).view(shape)
    torch.testing.assert_close(gradient, expected, **tolerance)


# Sums written out by hand


def probabilities(logits: torch.Tensor) -> list[float]:
    top = logits.max().item()
    weights = [math.exp(x - top) for x in logits.tolist()]
    return [w / sum(weights) for w in weights]


def shares_by_hand(s: list[float], t: list[float], alpha: float) -> list[float]:
    def kl(p, q):
        return p * math.log(p / q)

    if alpha in (0.0, 1.0):
        return [kl(y, x) if alpha == 0.0 else kl(x, y) for x, y in zip(s, t, strict=True)]
    mixed = [(1 - alpha) * x + alpha * y for x, y in zip(s, t, strict=True)]
    return [(1 - alpha) * kl(x, m) + alpha * kl(y, m) for x, y, m in zip(s, t, mixed, strict=True)]


def loss_by_hand(student, teacher, token, old_log_prob, cfg):
    s, t = probabilities(student), probabilities(teacher)
    if cfg.mode == "sampled":
        loss = math.log(s[token] / t[token]) * math.log(s[token])
    else:
        keep = range(len(s))
        if cfg.mode == "topk":
            best = {name: sorted(keep, key=p.__getitem__)[-cfg.topk :] for name, p in (("student", s), ("teacher", t))}
            keep = sorted({i for name in best if cfg.support in (name, "union") for i in best[name]})
        x, y = ([p[i] for i in keep] for p in (s, t))
        if cfg.mode == "topk":
            x, y = ([*p, 1 - sum(p)] if cfg.add_tail else [v / sum(p) for v in p] for p in (x, y))
        shares = shares_by_hand(x, y, cfg.alpha)
        loss = sum(shares if cfg.kl_clip is None else (min(v, cfg.kl_clip) for v in shares))
    if cfg.is_clip is not None:
        loss *= min(math.exp(max(-20.0, min(20.0, math.log(s[token]) - old_log_prob))), cfg.is_clip)
    return loss


@pytest.mark.parametrize("is_clip", [None, 0.7, 2.0])
@pytest.mark.parametrize("kl_clip", [None, 0.02])
@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda c: f"{c.mode}-{c.alpha}-{c.support}-{c.add_tail}")
def test_equals_the_sums_written_out(cfg, kl_clip, is_clip):
    cfg = config(cfg.mode, cfg.alpha, 5, is_clip, support=cfg.support, add_tail=cfg.add_tail, kl_clip=kl_clip)
    student, teacher, token_ids, old = draw(0, 6, 17)
    losses = per_token_loss(student, teacher, token_ids, cfg, old)
    by_hand = [loss_by_hand(*row, cfg) for row in zip(student, teacher, token_ids.tolist(), old.tolist(), strict=True)]
    torch.testing.assert_close(losses, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("device")
def test_union_counts_a_shared_token_once():
    # Both put their top 2 on tokens 0 and 1: the union is {0, 1}, the same as either support alone.
    student = torch.tensor([[5.0, 4.0, 0.0, 0.1, 0.2]], dtype=torch.float64)
    teacher = torch.tensor([[4.0, 5.0, 0.3, 0.0, 0.1]], dtype=torch.float64)
    for add_tail in (True, False):
        union, alone = (
            per_token_loss(student, teacher, torch.tensor([0]), config("topk", topk=2, support=s, add_tail=add_tail))
            for s in ("union", "student")
        )
        torch.testing.assert_close(union, alone)


@pytest.mark.usefixtures("device")
def test_importance_ratio_is_one_without_old_log_probs():
    student, teacher, ids, _ = draw(1, 4, 9)
    own = torch.log_softmax(student, -1).gather(-1, ids[:, None]).squeeze(-1)
    for is_clip in (0.5, 2.0):
        cfg = config("full", is_clip=is_clip)
        torch.testing.assert_close(
            per_token_loss(student, teacher, ids, cfg), per_token_loss(student, teacher, ids, cfg, own)
        )


@pytest.mark.usefixtures("device")
def test_importance_ratio_is_bounded_and_detached():
    student, teacher, ids, _ = draw(1, 4, 9)
    plain, plain_gradient = with_gradient(lambda x: per_token_loss(x, teacher, ids, config("full")), student)
    for old, ratio in ((-1e4, 2.0), (1e4, math.exp(-20.0))):
        loss, gradient = with_gradient(
            lambda x, old=old: per_token_loss(x, teacher, ids, config("full", is_clip=2.0), torch.full((4,), old)),
            student,
        )
        torch.testing.assert_close(loss, plain * ratio)
        torch.testing.assert_close(gradient, plain_gradient * ratio)


@pytest.mark.usefixtures("device")
def test_token_weights_scale_tokens_but_not_the_denominator():
    student, teacher, ids, _ = draw(2, 2, 3, 7)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    weights = torch.tensor([[0.5, 2.0, math.nan], [0.0, 1.0, 1.0]], dtype=torch.float64)
    losses = per_token_loss(student, teacher, ids, config())
    expected = (losses * weights.nan_to_num()).sum() / 5
    torch.testing.assert_close(distillation_loss(student, teacher, ids, mask, config(), None, weights), expected)


# What must always hold


@quick
@given(seeds, st.sampled_from([c for c in CONFIGS if c.mode != "sampled"]), st.floats(0.0, 20.0))
def test_divergence_is_never_negative_and_zero_for_equal_logits(seed, cfg, scale):
    student, teacher, ids, _ = draw(seed, 8, 11, scale=scale)
    # A tail bucket is never below 1e-7, so that a support with all the mass sums to 1 + 1e-7.
    assert per_token_loss(student, teacher, ids, cfg).min() >= -1e-6
    torch.testing.assert_close(
        per_token_loss(student, student, ids, cfg), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-12
    )


@quick
@given(seeds, st.sampled_from(ALPHAS))
def test_divergence_of_different_distributions_is_positive(seed, alpha):
    student, teacher, ids, _ = draw(seed, 8, 11)
    assert per_token_loss(student, teacher, ids, config("full", alpha)).min() > 0


@quick
@given(seeds, some_config, st.floats(-50, 50), st.floats(-50, 50))
def test_a_shift_of_the_logits_changes_nothing(seed, cfg, a, b):
    student, teacher, ids, old = draw(seed, 8, 11)
    loss, gradient = with_gradient(lambda x: per_token_loss(x, teacher, ids, cfg, old), student)
    shifted, shifted_gradient = with_gradient(lambda x: per_token_loss(x + a, teacher + b, ids, cfg, old), student)
    torch.testing.assert_close(shifted, loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shifted_gradient, gradient, rtol=1e-6, atol=1e-6)


@quick
@given(
    seeds, st.sampled_from(ALPHAS), st.sampled_from(["student", "teacher", "union"]), st.booleans(),
    st.integers(0, 5), st.sampled_from([None, 0.05]),
)
def test_topk_of_the_whole_vocabulary_is_full(seed, alpha, support, add_tail, surplus, kl_clip):
    student, teacher, ids, old = draw(seed, 8, 11)
    topk = config("topk", alpha, 11 + surplus, 2.0, support=support, add_tail=add_tail, kl_clip=kl_clip)
    full = config("full", alpha, None, 2.0, kl_clip=kl_clip)
    results = (with_gradient(lambda x, c=c: per_token_loss(x, teacher, ids, c, old), student) for c in (topk, full))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@quick
@given(seeds, st.sampled_from(["full", "topk"]), st.sampled_from([None, 0.05]))
def test_alpha_one_half_is_symmetric(seed, mode, kl_clip):
    student, teacher, ids, _ = draw(seed, 8, 11)
    cfg = config(mode, 0.5, support="union", kl_clip=kl_clip)
    torch.testing.assert_close(
        per_token_loss(student, teacher, ids, cfg), per_token_loss(teacher, student, ids, cfg)
    )


@quick
@given(seeds, some_config, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_masked_tokens_are_inert(seed, cfg, poison):
    student, teacher, ids, old = draw(seed, 3, 5, 11)
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) < 0.5
    clean = with_gradient(lambda x: distillation_loss(x, teacher, ids, mask, cfg, old), student)
    hidden = ~mask[..., None]
    arguments = (teacher.masked_fill(hidden, poison), ids.masked_fill(~mask, -100), mask, cfg,
                 old.masked_fill(~mask, poison))
    poisoned = with_gradient(lambda x: distillation_loss(x, *arguments), student.masked_fill(hidden, poison))
    for got, expected in zip(poisoned, clean, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not poisoned[1][~mask].any()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda c: f"{c.mode}-{c.alpha}-{c.support}-{c.add_tail}")
def test_an_empty_mask_is_a_zero_that_backpropagates(cfg):
    student, teacher, ids, old = draw(0, 2, 3, 11)
    student = student.fill_(math.nan).requires_grad_()
    loss = distillation_loss(student, teacher, ids, torch.zeros(2, 3), cfg, old)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None and not student.grad.any()


ONE_HOT = [0.0] + [-math.inf] * 10
OTHER_HOT = [-math.inf] * 10 + [0.0]
EXTREMES = [
    [0.0] * 11, [1e4] + [-1e4] * 10, [-1e4] * 10 + [1e4], [1e4] * 6 + [-1e4] * 5, [1e4] * 11, ONE_HOT, OTHER_HOT,
    list(range(11)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda c: f"{c.mode}-{c.alpha}-{c.support}-{c.add_tail}")
def test_extreme_logits_stay_finite(cfg, dtype):
    pairs = [(s, t) for s, t in itertools.product(EXTREMES, EXTREMES)]
    student, teacher = (torch.tensor(x, dtype=dtype) for x in zip(*pairs, strict=True))
    for token in (0, 10):
        ids = torch.full((len(pairs),), token)
        loss, gradient = with_gradient(lambda x, ids=ids: per_token_loss(x, teacher, ids, cfg), student)
        assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("kl_clip", [None, 0.05])
@pytest.mark.parametrize("cfg", [c for c in CONFIGS if c.mode != "sampled"],
                         ids=lambda c: f"{c.mode}-{c.alpha}-{c.support}-{c.add_tail}")
def test_gradcheck(cfg, kl_clip):
    cfg = config(cfg.mode, cfg.alpha, 4, None, support=cfg.support, add_tail=cfg.add_tail, kl_clip=kl_clip)
    student, teacher, ids, _ = draw(3, 1, 3, 9)
    mask = torch.tensor([[1, 0, 1]])
    torch.autograd.gradcheck(
        lambda x: distillation_loss(x, teacher, ids, mask, cfg), (student.requires_grad_(),), eps=1e-7, atol=1e-6
    )


@pytest.mark.usefixtures("device")
def test_gradient_of_the_sampled_form_is_the_log_ratio_times_the_score():
    student, teacher, ids, _ = draw(3, 4, 9)
    _, gradient = with_gradient(lambda x: per_token_loss(x, teacher, ids, config("sampled")), student)
    s, t = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    ratio = (s - t).gather(-1, ids[:, None])
    torch.testing.assert_close(gradient, ratio * (torch.nn.functional.one_hot(ids, 9) - s.exp()))


@pytest.mark.usefixtures("device")
def test_the_teacher_gets_no_gradient():
    student, teacher, ids, _ = draw(0, 4, 9)
    per_token_loss(student.requires_grad_(), teacher.requires_grad_(), ids, config()).sum().backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_arithmetic_is_float32_or_float64(dtype):
    student, teacher, ids, old = draw(0, 2, 4, 9, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mask = torch.ones(2, 4, dtype=dtype)
    loss, gradient = with_gradient(lambda x: distillation_loss(x, teacher, ids, mask, config(), old), student)
    expected = distillation_loss(student.to(wide), teacher.to(wide), ids, mask, config(), old)
    assert loss.dtype == wide and gradient.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("device")
def test_the_mean_of_many_bf16_mask_entries_is_exact():
    student, teacher, ids, _ = draw(0, 1, 1001, 5, dtype=torch.bfloat16)
    losses = per_token_loss(student, teacher, ids, config())
    loss = distillation_loss(student, teacher, ids, torch.ones(1, 1001, dtype=torch.bfloat16), config())
    torch.testing.assert_close(loss, losses.mean())


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("alpha", ALPHAS)
def test_clip_bounds_each_share_from_above(alpha):
    student, teacher, _, _ = draw(5, 50, 30, scale=1.0)
    s, t = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    assert (token_divergence(s, t, alpha, 0.01) <= token_divergence(s, t, alpha) + 1e-12).all()
    assert (token_divergence(s, t, alpha, 0.01) <= 30 * 0.01 + 1e-12).all()
    torch.testing.assert_close(token_divergence(s, t, alpha, 1e3), token_divergence(s, t, alpha))
