"""The collapse monitor: warns when the method has nothing to work with, which a run's loss does not show.

Self-distillation collapses when the teacher no longer uses its context and agrees with the student: the loss goes to
zero, and so does the accuracy. The measure is the context KL, KL(teacher with context || teacher without it) per token,
on samples that failed: where the policy succeeds, a teacher may find the answer without the context.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdpo_plugin.config import DiagnosticsConfig, DistillConfig, RepromptConfig
from sdpo_plugin.distillation.consensus import CONSENSUS
from sdpo_plugin.distillation.context import Rollout, TeacherContext, has_feedback
from sdpo_plugin.distillation.fused import linear_distillation, linear_log_probs
from sdpo_plugin.distillation.head import Head, TeacherStates
from sdpo_plugin.distillation.loss import objective_of

CONTEXT_KL = "teacher/context_kl"
WARNING = "warning/"  # and its name; 1 at the steps of a warning, 0 at those that were checked without one
CHECKED_SAMPLES = 8  # in an optimizer step, over all ranks: each takes its part from its first micro-batch
REFERENCE_CHECKS = 3  # whose median context KL later ones are compared with: one check may err by a third
# Fractions of the reference. A base teacher's KL stays within a few percent of it for as long as samples fail; once a
# seventh is lost, the collapsing quickstart (docs/validation/benchmarks.md) has learned all it will learn.
COLLAPSED = 0.85
STANDSTILL = 0.9
RECOVERY = 1.1  # of the rate, a step
ROUNDING = 1e-6  # nats a token: a KL up to here is zero

FULL_KL = objective_of(DistillConfig(mode="full", alpha=0.0, is_clip=None))


@torch.no_grad()
def measure(
    student_hidden: Tensor, student: Head, teacher_hidden: Tensor, without_context: Tensor, teacher: Head,
    token_ids: Tensor, failed: Tensor, temperature: float,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and token counts from which the metrics of a few samples are computed.

    Hidden states `[N, H]` of the student, of the teacher and of the teacher after the student's prompt; token_ids
    int64 `[N]`; failed bool `[N]`, of the token's sample.
    """
    kl = linear_distillation(
        without_context, teacher, [TeacherStates(teacher_hidden, teacher)], token_ids, failed.float(), FULL_KL,
        temperature=temperature,
    ).token_loss
    own, entropy = linear_log_probs(student_hidden, student, token_ids, temperature, with_entropy=True)
    assert entropy is not None
    advantage = linear_log_probs(teacher_hidden, teacher, token_ids, temperature)[0] - own
    every = torch.ones_like(failed)
    masked = {
        CONTEXT_KL: (kl, failed), "teacher/log_ratio_on_failures": (advantage, failed),
        "teacher/log_ratio_on_successes": (advantage, ~failed), "self_distillation/student_entropy": (entropy, every),
    }  # fmt: skip
    return {name: ((values * mask).sum(), mask.sum()) for name, (values, mask) in masked.items()}


def length_metrics(samples: Sequence[Any]) -> dict[str, float]:
    """Numbers of sampled tokens, and of those responses that ended before the length limit; their mean OpenRLHF logs.

    Names and meaning as TRL's `completions/min_length` and `completions/mean_terminated_length`.
    """
    lengths = [int(sample.action_mask.sum()) for sample in samples]
    metrics: dict[str, float] = {"response_length_min": min(lengths), "response_length_max": max(lengths)}
    ended = [n for n, sample in zip(lengths, samples, strict=True) if n and not sample.truncated]
    if ended:
        metrics |= {
            "terminated_length_mean": statistics.mean(ended), "terminated_length_min": min(ended),
            "terminated_length_max": max(ended),
        }  # fmt: skip
    return {"self_distillation/" + name: float(value) for name, value in metrics.items()}


class CollapseMonitor:
    """Counts consecutive checks that find a degenerate state; after `patience` of them it warns, with evidence and fix.

    uses_policy_loss: whether OpenRLHF's policy loss, which rewards teach, is part of the loss.
    """

    def __init__(self, config: DiagnosticsConfig, reprompt: RepromptConfig, uses_policy_loss: bool) -> None:
        self.config, self.reprompt, self.uses_policy_loss = config, reprompt, uses_policy_loss
        self.steps = 0
        self.consecutive: dict[str, int] = {}
        self.first: list[float] = []  # context KLs
        self.last: list[float] = []
        self.rate: float | None = None  # what `slowed` found
        self.given: float | None = None  # --teacher.update_rate, when it did
        self.lengths: list[float] = []
        self.warnings: dict[str, float] = {}  # the metrics since `pop_metrics`

    def state(self) -> dict[str, Any]:
        """What a resumed run continues with, in plain values."""
        kept = ("steps", "consecutive", "first", "last", "rate", "given", "lengths")
        return copy.deepcopy({name: getattr(self, name) for name in kept})

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def due(self) -> bool:
        """Whether to check this batch; call once for each."""
        self.steps += 1
        return self.config.on_collapse != "off" and self.steps % self.config.interval == 0

    def check_batch(
        self, rollouts: Sequence[Rollout], contexts: Sequence[TeacherContext], left_out: int = 0
    ) -> list[str]:
        """The warnings due about a batch; one of each kind per `patience` checks.

        left_out: how many responses `mask_truncated` left out.
        """
        threshold = self.reprompt.success_threshold
        rewards = [r.reward for r in rollouts if r.reward is not None]
        with_feedback = sum(map(has_feedback, rollouts))
        by_consensus = self.reprompt.demonstration == CONSENSUS
        evidence = f"{sum(r >= threshold for r in rewards)} of {len(rewards)} rewards reach"
        evidence += f" --reprompt.success_threshold {threshold}, {with_feedback} samples have feedback"
        if by_consensus:
            evidence = f"{len({r.answer for r in rollouts} - {None})} different answers in {len(rollouts)} responses"
        if left_out:
            evidence += f", --distill.mask_truncated leaves out {left_out} responses truncated at the length limit"
        flat = len(set(rewards)) == 1
        flat_successes = flat and any("solution" in c.sections for c in contexts) and not by_consensus
        inactive = not any(c.active for c in contexts)
        return [
            *self._counted(
                "inactive", inactive, f"no sample has a teacher context, so nothing is distilled: {evidence}"
            ),
            *self._counted(
                "feedback off", bool(with_feedback) and not self.reprompt.use_feedback and not inactive,
                f"{with_feedback} samples have feedback, but --no-reprompt.use_feedback ignores it",
            ),
            *self._counted(
                "flat rewards", self.uses_policy_loss and flat,
                f"all rewards are {rewards[0] if rewards else None}, so OpenRLHF's policy loss, which is part of the "
                "loss, teaches nothing",
            ),
            # Without a success among them, flat rewards teach nothing (inactive), or feedback alone teaches.
            *self._counted(
                "flat successes", not self.uses_policy_loss and flat_successes,
                f"all rewards are {rewards[0] if rewards else None}, so every response counts as a success and "
                "demonstrations do not separate right from wrong; if not all of them are right, raise "
                "--reprompt.success_threshold or look at the reward function, else give harder prompts",
            ),
        ]

    def drift(self, length: float) -> float:
        """A mean response length, relative to the first ones' that are not 0; 1 where there is none yet."""
        self.lengths = [known for known in (*self.lengths, length) if known > 0][:REFERENCE_CHECKS]
        return length / statistics.mean(self.lengths) if self.lengths else 1.0

    def check_context_kl(self, kl: float, teacher: str) -> list[str]:
        """The warnings due about a context KL."""
        self.first = [known for known in (*self.first, kl) if known > ROUNDING][:REFERENCE_CHECKS]
        self.last = [*self.last, kl][-REFERENCE_CHECKS:]
        fraction = self.fraction(self.last)
        return [
            *self._counted(
                "collapse", fraction < COLLAPSED,
                f"the teacher uses its context less and less: on failed samples the context KL is {kl:.3g} nats a "
                f"token, over the last checks {fraction:.0%} of what it was at the start, so the student learns "
                "what it does already; lower --teacher.update_rate or --actor.adam.lr, or give "
                f"--teacher.kind base (now {teacher})",
            ),
            *self._counted(
                "no context kl", not self.first,
                f"the teacher's context changes nothing: on failed samples the context KL is {kl:.3g} nats a "
                "token, so the student learns what it does already; look at the teacher's prompts "
                "(--diagnostics.log_samples 1): --reprompt.max_len may leave no room for the context, or "
                "--reprompt.template may show none of it",
            ),
        ]

    def fraction(self, kls: list[float]) -> float:
        """The median of some context KLs, relative to the first ones'; 1 where none was above zero yet."""
        reference = statistics.median(self.first) if self.first else 0.0
        return statistics.median(kls) / reference if reference > ROUNDING else 1.0

    def slowed(self, rate: float) -> float:
        """The EMA rate for the next step: the lower the context KL, the smaller, down to almost zero at `STANDSTILL`.

        It falls at once, since a collapsed teacher does not recover, and rises slowly.
        """
        left = min(max((self.fraction(self.last[-1:]) - STANDSTILL) / (1.0 - STANDSTILL), 0.0), 1.0)
        floor = rate / 1000  # to come back from
        self.rate, self.given = max(min(rate * left**2, RECOVERY * self.in_use(rate)), floor), rate
        return self.rate

    def in_use(self, rate: float) -> float:
        """The rate of the last `slowed`, or the flag's where the flag has changed since."""
        return rate if self.rate is None or rate != self.given else self.rate

    def pop_metrics(self) -> dict[str, float]:
        """The `warning/*` metrics of the checks since the last call."""
        warnings, self.warnings = self.warnings, {}
        return warnings

    def _counted(self, name: str, present: bool, text: str) -> list[str]:
        checks = self.consecutive[name] = self.consecutive.get(name, 0) + 1 if present else 0
        due = checks > 0 and checks % self.config.patience == 0
        self.warnings[WARNING + name.replace(" ", "_")] = float(due)
        if due:
            return [f"self-distillation: {text} (for {checks} checks in a row)"]
        return []
