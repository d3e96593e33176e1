"""`linear_distillation_loss` in each mode and dtype: values and gradients against the definition in float64, time and
memory against the matrix products alone, and against what else there is (TRL, Liger), where it is installed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from machine import CUDA, DEVICE, facts, milliseconds, peak_mib, relative, row, tell

from sdpo_plugin.config import DistillConfig
from sdpo_plugin.distillation.fused import (
    Head,
    TeacherStates,
    linear_distillation,
    linear_distillation_loss,
    linear_log_probs,
)
from sdpo_plugin.distillation.loss import distillation_loss, objective_of

MODES = {
    "full JSD": DistillConfig(mode="full"),
    "full KL": DistillConfig(mode="full", alpha=0.0),
    "top-100, tail": DistillConfig(),
    "top-20, reverse KL": DistillConfig(topk=20, alpha=1.0),
    "sampled": DistillConfig(mode="sampled", alpha=1.0),
}
# Relative errors of loss and gradients, by the digits of the inputs' products.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}


@dataclass
class Problem:
    """Hidden states of student and teacher, and the head of both: N tokens, one of which a model is rather sure of."""

    student: torch.Tensor
    head: torch.Tensor
    teacher: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, n: int, v: int, h: int, dtype: torch.dtype) -> Problem:
        """Logits of standard deviation 2, the sampled token's higher by 8 to 20: as unsure as a model is."""
        g = torch.Generator(DEVICE).manual_seed(0)
        head = torch.randn(v, h, generator=g, device=DEVICE).mul_(2 * h**-0.5)
        ids = torch.randint(v, (n,), generator=g, device=DEVICE)
        sure = 2 + 3 * torch.rand(n, 1, generator=g, device=DEVICE)
        states = torch.randn(n, h, generator=g, device=DEVICE) + sure * head[ids]
        teacher = states + 0.3 * torch.randn(n, h, generator=g, device=DEVICE)
        leaves = states.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
        return cls(*leaves, teacher.to(dtype), ids, torch.ones(n, device=DEVICE))

    def double(self) -> Problem:
        student, head = (x.detach().double().requires_grad_() for x in (self.student, self.head))
        return Problem(student, head, self.teacher.double(), self.ids, self.mask)

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.student, self.head

    def ours(self, config: DistillConfig) -> torch.Tensor:
        return linear_distillation_loss(
            self.student, self.head, self.teacher, self.head.detach(), self.ids, self.mask, config
        )

    def dense(self, config: DistillConfig) -> torch.Tensor:
        logits = (x @ self.head.T for x in (self.student, self.teacher))
        student, teacher = (x if x.dtype == torch.float64 else x.float() for x in logits)
        return distillation_loss(student, teacher.detach(), self.ids, self.mask, config)

    def policy(self, config: DistillConfig) -> torch.Tensor:
        """The distillation beside a policy loss and an entropy bonus, whose gradients a second sweep makes."""
        teacher = TeacherStates(self.teacher, Head(self.head.detach()))
        scores = linear_distillation(
            self.student, Head(self.head), [teacher], self.ids, self.mask / len(self.mask), objective_of(config),
            differentiable_log_probs=True, with_entropy=True,
        )  # fmt: skip
        assert scores.entropy is not None
        return scores.loss - scores.log_probs.mean() - 0.01 * scores.entropy.mean()

    def dense_policy(self, config: DistillConfig) -> torch.Tensor:
        log_probs = torch.log_softmax(self.student @ self.head.T, -1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        sampled = log_probs.gather(-1, self.ids[:, None])
        return self.dense(config) - sampled.mean() - 0.01 * entropy.mean()


def graded(loss: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Value and gradients, times a scale that fp16 needs and nothing else notices."""
    value = loss() * 2.0**14
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def values(n: int, v: int, h: int) -> None:
    """Errors of value, gradient of the hidden states and gradient of the head, relative to float64."""
    for dtype in TOLERANCE:
        problem = Problem.of(n, v, h, dtype)
        exact = problem.double()
        for name, config in MODES.items():
            with row("value", mode=name, dtype=str(dtype), n=n, v=v, h=h) as found:
                expected = graded(lambda: exact.dense(config), exact.leaves)  # noqa: B023
                runs = {"ours": problem.ours, "dense": problem.dense}
                for who, loss in runs.items():
                    got = graded(lambda: loss(config), problem.leaves)  # noqa: B023
                    found[who] = [relative(a, b) for a, b in zip(got, expected, strict=True)]
                found["ok"] = max(found["ours"]) < TOLERANCE[dtype]
        for who, name, loss in others(problem, with_liger=True) if dtype == torch.bfloat16 else ():
            with row("value of others", who=who, mode=name, dtype=str(dtype), n=n, v=v, h=h) as found:
                expected = graded(lambda: exact.dense(MODES[name]), exact.leaves)  # noqa: B023
                found["theirs"] = [relative(a, b) for a, b in zip(graded(loss, problem.leaves), expected, strict=True)]
        with row("value", mode="top-100 beside policy loss", dtype=str(dtype), n=n, v=v, h=h) as found:
            expected = graded(lambda: exact.dense_policy(DistillConfig()), exact.leaves)  # noqa: B023
            got = graded(lambda: problem.policy(DistillConfig()), problem.leaves)  # noqa: B023
            found["ours"] = [relative(a, b) for a, b in zip(got, expected, strict=True)]
            found["ok"] = max(found["ours"]) < TOLERANCE[dtype]


def products(problem: Problem) -> Callable[..., None]:
    """The products that a pass cannot do without, each over all tokens at once and in the dtype of its factors."""
    student, head, teacher = (x.detach() for x in (problem.student, problem.head, problem.teacher))
    logits = torch.empty(len(student), len(head), device=DEVICE, dtype=head.dtype)
    gradient = torch.randn_like(logits)

    def run(forward: int = 2, backward: int = 1, head_backward: int = 1) -> None:
        for i in range(forward):
            torch.mm((student, teacher)[i % 2], head.T, out=logits)
        for _ in range(backward):
            torch.mm(gradient, head)
        for _ in range(head_backward):
            torch.mm(gradient.T, student)

    return run


def step(loss: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return run


def timed(what: str, loss: Callable[[], torch.Tensor], problem: Problem, bound: float, **known: Any) -> None:
    """Milliseconds of a forward and backward pass, and the peak above inputs and gradients."""
    n, h = problem.student.shape
    dtype = str(problem.head.dtype)
    with row("time", who=what, dtype=dtype, n=n, v=len(problem.head), h=h, bound_ms=bound, **known) as found:
        run = step(loss, problem.leaves)
        found["ms"] = milliseconds(run)
        found["over_bound"] = found["ms"] / bound
        for leaf in problem.leaves:
            leaf.grad = None
        peak = peak_mib(run)
        gradients = sum(leaf.grad.nbytes for leaf in problem.leaves if leaf.grad is not None)
        found["peak_mib"] = None if peak is None else peak - gradients / 2**20
    for leaf in problem.leaves:
        leaf.grad = None


def others(problem: Problem, with_liger: bool) -> Iterator[tuple[str, str, Callable[[], torch.Tensor]]]:
    """Who, mode and loss: the definition, and what TRL and Liger have, if they are installed."""
    student, head, teacher = problem.student, problem.head, problem.teacher
    n, v = len(student), len(head)
    dense_fits = not CUDA or 18 * 4 * n * v < torch.cuda.mem_get_info()[0]
    modes = {"full JSD": 0.5, "full KL": 0.0}
    if dense_fits:
        for name, config in MODES.items():
            yield "whole logits", name, lambda config=config: problem.dense(config)
    try:
        from trl.experimental.sdpo import loss_utils as trl
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError as error:
        tell("left out", who="TRL", why=str(error))
    else:

        def logits() -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                of_teacher = (teacher @ head.T).float()
            return (student @ head.T).float(), of_teacher

        if dense_fits:
            full, topk = trl.compute_full_logit_self_distillation_loss, trl.compute_topk_self_distillation_loss
            yield "TRL SDPO", "full JSD", lambda: full(*logits(), distillation_alpha=0.5).mean()
            yield "TRL SDPO", "top-100, tail", lambda: topk(
                *logits(), distillation_topk=100, distillation_alpha=0.5, distillation_add_tail=True
            ).mean()
        for name, beta in modes.items():
            yield "TRL distillation", name, lambda beta=beta: ChunkedDivergenceFunction.apply(
                student, head, None, teacher, head.detach(), None, beta
            )[0].mean()
    if not with_liger:
        return
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        tell("left out", who="Liger", why=str(error))
    else:
        liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=CUDA)
        yield "Liger", "full JSD", lambda: liger(student, head, teacher, head.detach(), problem.ids)


def times(tokens: list[int], v: int, widths: list[int], dtype: torch.dtype, compared: bool) -> None:
    """`compared`: others take part; Liger, which compiles for every shape, at the most tokens only."""
    for n, h in itertools.product(tokens, widths):
        problem = Problem.of(n, v, h, dtype)
        alone = [products(problem)]
        bound = milliseconds(alone[0])
        without_head = milliseconds(lambda: alone[0](head_backward=0))  # noqa: B023
        policy = milliseconds(lambda: alone[0](forward=4))  # noqa: B023
        alone.clear()
        if CUDA:
            torch.cuda.empty_cache()
        for name, config in MODES.items():
            timed("ours", lambda: problem.ours(config), problem, bound, mode=name)  # noqa: B023
        timed("ours", lambda: problem.policy(DistillConfig()), problem, policy, mode="top-100 beside policy loss")  # noqa: B023
        plain = lambda: linear_log_probs(problem.student, Head(problem.head), problem.ids)[0].mean()  # noqa: B023, E731
        timed("ours", plain, problem, bound, mode="log-probabilities alone")
        if compared:
            for who, name, loss in others(problem, with_liger=n == tokens[-1]):
                timed(who, loss, problem, bound, mode=name)
        problem.head.requires_grad_(False)
        timed("ours", lambda: problem.ours(DistillConfig()), problem, without_head, mode="top-100, frozen head")  # noqa: B023


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="float32 without others")
    given = parser.parse_args()
    tell("machine", **facts())
    if given.tiny:
        values(40, 301, 16)
        times([48], 301, [16], torch.float32, compared=True)
        return
    values(640, given.vocab, 1024)
    for name in given.dtypes:
        tokens = given.tokens if name != "float32" else given.tokens[:1]
        times(tokens, given.vocab, given.widths, getattr(torch, name), compared=name != "float32")


if __name__ == "__main__":
    main()
