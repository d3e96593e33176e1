"""Tells whoever trains when the method has nothing to work with: a run that goes on is not a run that learns.

The way self-distillation fails is a teacher that forgets to read its context and agrees with the student: the loss
goes to zero, and so does the accuracy. Its measure is the context gain, how much the context still changes what the
teacher predicts, on samples that failed: where the policy succeeds, a teacher may well know the answer by itself.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdpo_plugin.config import DiagnosticsConfig, DistillConfig, RepromptConfig
from sdpo_plugin.distillation.context import Rollout, TeacherContext, has_feedback
from sdpo_plugin.distillation.fused import Head, TeacherStates, linear_distillation, linear_log_probs
from sdpo_plugin.distillation.loss import objective_of

GAIN = "teacher/context_gain"
ALARM = "alarm/"  # what it is about follows; 1 at the steps where the watch speaks of it, 0 where it looked
WATCHED_SAMPLES = 8  # in an optimizer step, over all ranks: each takes its share from its first micro-batch
REFERENCE_LOOKS = 3  # whose median context gain later ones are compared with: one look may err by a third
# Shares of the reference. A base teacher's gain stays within a few percent of it for as long as samples fail; once a
# seventh is gone for good, the collapsing quickstart (docs/benchmarks.md) has learned all it will ever learn.
COLLAPSED = 0.85
STANDSTILL = 0.9
RECOVERY = 1.1  # of the rate, a step
ROUNDING = 1e-6  # nats a token: a gain up to here is none

FULL_KL = objective_of(DistillConfig(mode="full", alpha=0.0, is_clip=None))


@torch.no_grad()
def measure(
    student_hidden: Tensor, student: Head, teacher_hidden: Tensor, without_context: Tensor, teacher: Head,
    token_ids: Tensor, failed: Tensor, temperature: float,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and numbers of tokens behind the metrics of a few samples.

    Hidden states `[N, H]` of the student, of the teacher and of the teacher behind the student's prompt; token_ids
    int64 `[N]`; failed bool `[N]`, of the token's sample.
    """
    gain = linear_distillation(
        without_context, teacher, [TeacherStates(teacher_hidden, teacher)], token_ids, failed.float(), FULL_KL,
        temperature=temperature,
    ).token_loss
    own, entropy = linear_log_probs(student_hidden, student, token_ids, temperature, with_entropy=True)
    assert entropy is not None
    advantage = linear_log_probs(teacher_hidden, teacher, token_ids, temperature)[0] - own
    every = torch.ones_like(failed)
    masked = {
        GAIN: (gain, failed), "teacher/advantage_on_failures": (advantage, failed),
        "teacher/advantage_on_successes": (advantage, ~failed), "self_distillation/student_entropy": (entropy, every),
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


class Watch:
    """Counts consecutive looks at a degenerate state; after `tolerance` of them it names evidence and remedy.

    uses_policy_loss: whether OpenRLHF's policy loss, which rewards teach, is part of the loss.
    """

    def __init__(self, config: DiagnosticsConfig, reprompt: RepromptConfig, uses_policy_loss: bool) -> None:
        self.config, self.reprompt, self.uses_policy_loss = config, reprompt, uses_policy_loss
        self.steps = 0
        self.consecutive: dict[str, int] = {}
        self.first: list[float] = []  # context gains
        self.last: list[float] = []
        self.rate: float | None = None  # what `slowed` found
        self.given: float | None = None  # --teacher.update_rate, when it did
        self.lengths: list[float] = []
        self.alarms: dict[str, float] = {}  # metrics of the looks since they were last handed over

    def state(self) -> dict[str, Any]:
        """What a restart must not begin anew, in plain values."""
        kept = ("steps", "consecutive", "first", "last", "rate", "given", "lengths")
        return copy.deepcopy({name: getattr(self, name) for name in kept})

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def due(self) -> bool:
        """Whether to look at this batch; call once for each."""
        self.steps += 1
        return self.config.guard != "off" and self.steps % self.config.interval == 0

    def at_contexts(
        self, rollouts: Sequence[Rollout], contexts: Sequence[TeacherContext], left_out: int = 0
    ) -> list[str]:
        """The warnings due about a batch; each symptom speaks once per `tolerance` looks.

        left_out: how many responses `mask_truncated` left out.
        """
        threshold = self.reprompt.success_threshold
        rewards = [r.reward for r in rollouts if r.reward is not None]
        told = sum(map(has_feedback, rollouts))
        evidence = f"{sum(r >= threshold for r in rewards)} of {len(rewards)} rewards reach"
        evidence += f" --reprompt.success_threshold {threshold}, {told} samples have feedback"
        if left_out:
            evidence += f", --distill.mask_truncated leaves out {left_out} responses that were cut at the length limit"
        flat = len(set(rewards)) == 1
        flat_successes = flat and any("solution" in c.sections for c in contexts)
        inactive = not any(c.active for c in contexts)
        return [
            *self._counted(
                "inactive", inactive, f"no sample has a teacher context, so nothing is distilled: {evidence}"
            ),
            *self._counted(
                "feedback off", bool(told) and not self.reprompt.use_feedback and not inactive,
                f"{told} samples have feedback, but --no-reprompt.use_feedback ignores it",
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
                "demonstrations do not tell right from wrong; if not all of them are right, raise "
                "--reprompt.success_threshold or look at the reward function, else give harder prompts",
            ),
        ]

    def drift(self, length: float) -> float:
        """A mean response length, relative to the first ones' that are not 0; 1 where there is none yet."""
        self.lengths = [known for known in (*self.lengths, length) if known > 0][:REFERENCE_LOOKS]
        return length / statistics.mean(self.lengths) if self.lengths else 1.0

    def at_gain(self, gain: float, teacher: str) -> list[str]:
        """The warnings due about a context gain."""
        self.first = [known for known in (*self.first, gain) if known > ROUNDING][:REFERENCE_LOOKS]
        self.last = [*self.last, gain][-REFERENCE_LOOKS:]
        share = self.share(self.last)
        return [
            *self._counted(
                "collapse", share < COLLAPSED,
                f"the teacher reads its context less and less: on failed samples it changes the prediction by "
                f"{gain:.3g} nats a token, over the last looks {share:.0%} of what it was at the start, so the student "
                "is taught what it does already; lower --teacher.update_rate or --actor.adam.lr, or give "
                f"--teacher.kind base (now {teacher})",
            ),
            *self._counted(
                "no gain", not self.first,
                f"the teacher's context changes nothing: on failed samples the context gain is {gain:.3g} nats a "
                "token, so the student is taught what it does already; look at what the teacher reads "
                "(--diagnostics.samples 1): --reprompt.max_len may leave no room for the context, or "
                "--reprompt.template may show none of it",
            ),
        ]

    def share(self, gains: list[float]) -> float:
        """The median of some context gains, relative to the first ones'; 1 where there was no gain yet."""
        reference = statistics.median(self.first) if self.first else 0.0
        return statistics.median(gains) / reference if reference > ROUNDING else 1.0

    def slowed(self, rate: float) -> float:
        """The EMA rate for the next step: less the more context gain is gone, hardly any below `STANDSTILL`.

        It goes down at once, for what the teacher has forgotten it does not learn again, and comes up slowly.
        """
        left = min(max((self.share(self.last[-1:]) - STANDSTILL) / (1.0 - STANDSTILL), 0.0), 1.0)
        floor = rate / 1000  # to come back from
        self.rate, self.given = max(min(rate * left**2, RECOVERY * self.in_use(rate)), floor), rate
        return self.rate

    def in_use(self, rate: float) -> float:
        """What `slowed` found, but where the flag says something else than it did then, the flag's."""
        return rate if self.rate is None or rate != self.given else self.rate

    def handed_over(self) -> dict[str, float]:
        """The metrics of its looks since the last call: whether it spoke, and of what."""
        alarms, self.alarms = self.alarms, {}
        return alarms

    def _counted(self, name: str, present: bool, text: str) -> list[str]:
        looks = self.consecutive[name] = self.consecutive.get(name, 0) + 1 if present else 0
        rings = looks > 0 and looks % self.config.tolerance == 0
        self.alarms[ALARM + name.replace(" ", "_")] = float(rings)
        if rings:
            return [f"self-distillation: {text} (for {looks} looks in a row)"]
        return []
