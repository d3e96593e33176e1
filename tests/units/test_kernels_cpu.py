"""The loss by in-place passes, as a CPU has it in float32, against the general form, which autograd differentiates."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "gpu"))
from interpreted import CONFIGS, FULL, TOPK, Case, two, weighed, whole  # noqa: E402

from sdpo_plugin.distillation import by_row, kernels_cpu  # noqa: E402
from sdpo_plugin.distillation.fused import linear_log_probs  # noqa: E402
from sdpo_plugin.distillation.loss import objective_of  # noqa: E402

HEADS = [{"scale": 0.5}, {"softcap": 20.0, "scale": 1.5}, {"vocab_size": 2250}]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr("interpreted.DEVICE", "cpu")


def test_a_cpu_has_them():
    assert by_row._kernels(torch.device("cpu")) is kernels_cpu


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_they_find_what_autograd_finds(config, differentiable, monkeypatch):
    Case().same(objective_of(config), differentiable, monkeypatch, kernels_cpu)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("config", [FULL[0], FULL[2], FULL[4], TOPK[0]], ids=str)
def test_heads(config, head, monkeypatch):
    Case(**head).same(objective_of(config), True, monkeypatch, kernels_cpu)


@pytest.mark.parametrize("objective", [weighed, whole, two])
def test_any_objective(objective, monkeypatch):
    Case().same(objective, True, monkeypatch, kernels_cpu)


def test_log_probabilities_and_entropy_alone(monkeypatch):
    case, found = Case(), []
    for known in (None, kernels_cpu):
        monkeypatch.setattr(by_row, "_kernels", lambda device: known)  # noqa: B023
        log_probs, entropy = linear_log_probs(case.hidden, case.head, case.ids, with_entropy=True)
        total = log_probs.sum() + entropy.square().sum()
        found.append([log_probs, entropy, *torch.autograd.grad(total, (case.hidden, case.weight))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_probabilities_of_zero(monkeypatch):
    """Both models rule out most of the vocabulary: no 0 / 0."""
    case = Case()
    with torch.no_grad():
        case.weight *= 60
    expected, got = (case.found(objective_of(FULL[2]), False, known, monkeypatch) for known in (None, kernels_cpu))
    for a, b in zip(got, expected, strict=True):
        assert a.isfinite().all() and (a - b).norm() <= 1e-3 * b.norm()
