"""Tells whoever trains when the method has nothing to work with: a run that goes on is not a run that learns."""

from __future__ import annotations

from collections.abc import Sequence

from sdpo_plugin.config import DiagnosticsConfig, RepromptConfig
from sdpo_plugin.context import Rollout, TeacherContext


class Watch:
    """Counts consecutive looks at a degenerate batch; after `tolerance` of them it names evidence and remedy."""

    def __init__(self, config: DiagnosticsConfig, reprompt: RepromptConfig) -> None:
        self.config, self.reprompt = config, reprompt
        self.steps = 0
        self.consecutive: dict[str, int] = {}

    def look(self, rollouts: Sequence[Rollout], contexts: Sequence[TeacherContext]) -> list[str]:
        """The warnings due after this batch; each symptom speaks once per `tolerance` looks."""
        self.steps += 1
        if self.config.guard == "off" or self.steps % self.config.interval:
            return []
        symptoms = self._symptoms(rollouts, contexts)
        self.consecutive = {name: self.consecutive.get(name, 0) + 1 for name in symptoms}
        return [
            f"self-distillation: {symptoms[name]} (for {looks} looks in a row)"
            for name, looks in self.consecutive.items()
            if looks % self.config.tolerance == 0
        ]

    def _symptoms(self, rollouts: Sequence[Rollout], contexts: Sequence[TeacherContext]) -> dict[str, str]:
        threshold = self.reprompt.success_threshold
        rewards = [r.reward for r in rollouts if r.reward is not None]
        told = sum(isinstance(r.feedback, str) and bool(r.feedback.strip()) for r in rollouts)
        found = {}
        if not any(c.active for c in contexts):
            found["inactive"] = (
                f"no sample has a teacher context, so nothing is distilled: {sum(r >= threshold for r in rewards)} of "
                f"{len(rewards)} rewards reach --reprompt.success_threshold {threshold}, {told} samples have feedback"
            )
        elif told and not self.reprompt.use_feedback:
            found["feedback off"] = f"{told} samples have feedback, but --no-reprompt.use_feedback ignores it"
        return found
