"""The kernels and the objectives made of their numbers, on a CPU: Triton's interpreter (TRITON_INTERPRET=1) runs them.

    TRITON_INTERPRET=1 python -m pytest tests/gpu/interpreted.py

Without that variable, on a GPU, the same tests run the compiled kernels.
"""

import pytest
import torch

from sdpo_plugin.config import DistillConfig
from sdpo_plugin.distillation import by_row, kernels
from sdpo_plugin.distillation.fused import linear_distillation, linear_log_probs
from sdpo_plugin.distillation.head import Head, TeacherStates
from sdpo_plugin.distillation.loss import objective_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, VOCAB, WIDTH = 3, kernels.BLOCK + 301, 8
FULL = [DistillConfig(mode="full", alpha=a, kl_clip=c) for a in (0.0, 0.3, 1.0) for c in (None, 1e-3)]
TOPK = [
    DistillConfig(topk=20, alpha=0.5), DistillConfig(topk=5, alpha=1.0, add_tail=False),
    DistillConfig(topk=5, alpha=0.0, support="union", kl_clip=0.02), DistillConfig(topk=9, support="teacher"),
    DistillConfig(topk=2 * VOCAB), DistillConfig(topk=4), DistillConfig(topk=3, support="union", add_tail=False),
]  # fmt: skip
CONFIGS = [*FULL, *TOPK, *(DistillConfig(mode="sampled", alpha=1.0, is_clip=c) for c in (2.0, 0.5))]


class Case:
    def __init__(self, **head):
        g = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=g).to(DEVICE)

        self.hidden, self.weight = normal(ROWS, WIDTH).requires_grad_(), normal(VOCAB, WIDTH).requires_grad_()
        self.head = Head(self.weight, **head)
        self.teachers = [TeacherStates(normal(ROWS, WIDTH + 1), Head(normal(VOCAB, WIDTH + 1), **head)) for _ in "ab"]
        self.ids = torch.randint(head.get("vocab_size", VOCAB), (ROWS,), generator=g).to(DEVICE)
        self.weights = torch.tensor([1.0, 0.0, 0.5], device=DEVICE)
        self.data = {"old_log_probs": -9.0 + normal(ROWS)}

    def found(self, objective, differentiable, known, monkeypatch):
        """Loss, token losses, log-probabilities, entropies, and gradients of a function of them; by `known` kernels."""
        monkeypatch.setattr(by_row, "_kernels", lambda device: known)
        scores = linear_distillation(
            self.hidden, self.head, self.teachers, self.ids, self.weights, objective, data=self.data, temperature=1.3,
            differentiable_log_probs=differentiable, with_entropy=True, chunk_size=2,
        )
        total = 2 * scores.loss
        if differentiable:
            total = total + (scores.log_probs * self.data["old_log_probs"]).sum() + (scores.entropy**2).sum()
        gradients = torch.autograd.grad(total, (self.hidden, self.weight))
        return [scores.loss, scores.token_loss, scores.log_probs, scores.entropy, *gradients]

    def same(self, objective, differentiable, monkeypatch):
        expected, got = (self.found(objective, differentiable, k, monkeypatch) for k in (None, kernels))
        for a, b in zip(got, expected, strict=True):
            assert (a - b).norm() <= 2e-5 * b.norm()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_what_kernels_find_is_what_autograd_finds(config, monkeypatch):
    Case().same(objective_of(config), True, monkeypatch)


@pytest.mark.parametrize("config", [FULL[2], TOPK[0], CONFIGS[-1]], ids=str)
def test_gradients_made_in_the_forward_pass(config, monkeypatch):
    Case().same(objective_of(config), False, monkeypatch)


@pytest.mark.parametrize("head", [{"scale": 0.5}, {"softcap": 20.0, "scale": 1.5}, {"vocab_size": VOCAB - 99}], ids=str)
@pytest.mark.parametrize("config", [FULL[2], TOPK[0]], ids=str)
def test_heads(config, head, monkeypatch):
    Case(**head).same(objective_of(config), True, monkeypatch)


def weighed(tokens):
    """What variants make of single numbers of a row."""
    weight = tokens.teacher_entropy + tokens.student_entropy * (tokens.teacher_log_probs - tokens.log_probs.detach())
    right, wrong = tokens.sampled_by_teachers
    return tokens.divergence(DistillConfig()) * weight + (right - wrong) * tokens.log_probs


def whole(tokens):
    return (tokens.teachers[1].exp() * (tokens.teachers[1] - tokens.student)).sum(-1) * tokens.log_probs.exp()


def two(tokens):
    return tokens.divergence(FULL[0]) + tokens.divergence(FULL[2])


@pytest.mark.parametrize("objective", [weighed, whole, two])
def test_any_objective(objective, monkeypatch):
    Case().same(objective, True, monkeypatch)


def test_log_probabilities_alone(monkeypatch):
    case, found = Case(), []
    for known in (None, kernels):
        monkeypatch.setattr(by_row, "_kernels", lambda device: known)  # noqa: B023
        log_probs, entropy = linear_log_probs(case.hidden, case.head, case.ids, with_entropy=True)
        found.append([log_probs, entropy, *torch.autograd.grad(log_probs.sum(), (case.hidden, case.weight))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab", [4 * kernels.PART, 2 * kernels.BLOCK + 77, 5 * kernels.PART - 1])
def test_the_largest_logits(vocab):
    x = torch.randn(ROWS, vocab, device=DEVICE)
    lse, entropy, maxima = kernels.statistics(kernels.Logits(x, 1.0, None))
    whole = vocab // kernels.PART * kernels.PART
    assert torch.equal(maxima, x[:, :whole].unflatten(1, (-1, kernels.PART)).amax(-1))
    torch.testing.assert_close(lse, x.logsumexp(-1))
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=x).entropy())
    k = max(1, maxima.shape[1] // 4)
    assert torch.equal(by_row.largest(x, k, maxima, kernels.PART), x.topk(k).indices)


def test_large_logits(monkeypatch):
    case = Case()
    with torch.no_grad():
        case.hidden.mul_(1e3)
    for config in (FULL[2], TOPK[0]):
        found = case.found(objective_of(config), True, kernels, monkeypatch)
        assert all(x.isfinite().all() for x in found)
