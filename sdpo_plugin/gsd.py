"""Guided Self-Distillation: what the context alone changes, as in classifier-free guidance. Ours; not published.

A self-teacher differs from the student for two reasons: it reads a context, and it has other weights (initial ones, an
average). Distilling it teaches the hindsight, and pulls the student back to the weights of the teacher at every token.
The same weights also read the student's own prompt here, and only the difference is taught: with `T` behind the context
and `P` behind the plain prompt, the target is

    S (T / P)^scale,  normalised,

the student tilted by what the context says. The form is that of guidance (arXiv 2207.12598, 2306.17806), there for
sampling. Why it should work: where the context has nothing to say, T = P and the student is left alone, however old the
teacher. A teacher that has forgotten to read teaches nothing, where SDPO's collapses the student onto itself. And
`scale` makes a weak reader's hint strong.

It costs a second pass of the teacher. With a `live` teacher and scale 1 it is SDPO, since P = S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdpo_plugin.config import Group, option
from sdpo_plugin.context import Rollout, TeacherContext
from sdpo_plugin.interface import RolloutBatch
from sdpo_plugin.loss import Tokens
from sdpo_plugin.sdpo import SDPO


@dataclass(frozen=True)
class GuidanceConfig(Group):
    """How strongly Guided Self-Distillation (`--algo gsd`) follows the context."""

    prefix = "gsd"

    scale: float = option(1.0, "power of the context's likelihood ratio: 1 as the teacher reads it, more to exaggerate")

    def check(self) -> None:
        self.positive("scale")


class GSD(SDPO):
    """The student tilted by the teacher's ratio of its predictions with and without the context."""

    name = "gsd"
    options = (GuidanceConfig,)
    defaults: dict[str, Any] = SDPO.defaults
    gsd: GuidanceConfig

    def contexts(self, batch: RolloutBatch, rollouts: Sequence[Rollout]) -> list[list[TeacherContext]]:
        (shown,) = super().contexts(batch, rollouts)
        # Active exactly where the context is: there both are read.
        return [shown, [TeacherContext(rollout.messages, c.active) for rollout, c in zip(rollouts, shown, strict=True)]]

    def token_loss(self, student: torch.Tensor, teacher: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        _, plain = tokens.teachers
        target = torch.log_softmax(student.detach() + self.gsd.scale * (teacher - plain), dim=-1)
        return super().token_loss(student, target, tokens)
