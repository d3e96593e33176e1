"""Focal Self-Distillation: the mean belongs to the tokens on which student and teacher disagree. Ours; not published.

In SDPO's mean every token of a response has the same weight. Most carry no signal: the student has learned them, or
the context has nothing to add to them. What is left of their gradient is noise, of the teacher's other weights or of
rounding, and their weight in the mean is taken from the tokens that matter. Here a token counts by

    w = TV(S, T)^focus / mean of it over the distilled tokens,   TV = 1/2 sum_v |S(v) - T(v)|,

the probability that the two would sample different tokens under the best coupling. As the student
learns, the whole step goes to what it has not learned yet. The idea is that of the focal loss (arXiv 1708.02002),
whose weight is of a label's probability. Total variation is bounded by 1 and looks at likely tokens, so a token that
both find nearly impossible cannot take the step over, as it can with a weight made of log-ratios.

The mean of w is taken over a micro-batch. A focus of 0 is SDPO.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdpo_plugin.algorithms.sdpo import SDPO
from sdpo_plugin.config import OptionGroup, option
from sdpo_plugin.distillation.loss import TokenBatch


@dataclass(frozen=True)
class FsdConfig(OptionGroup):
    """How strongly Focal Self-Distillation (`--algo fsd`) prefers tokens of disagreement."""

    prefix = "fsd"

    focus: float = option(1.0, "power of the total variation between student and teacher; 0: all tokens alike")

    def check(self) -> None:
        if not self.focus >= 0.0:
            self.fail("focus", "give a number >= 0")


class FSD(SDPO):
    """SDPO whose tokens count by how far student and teacher are apart."""

    name = "fsd"
    options = (FsdConfig,)
    normalizes_token_weights = reads_distributions = True
    fsd: FsdConfig

    def token_weights(self, tokens: TokenBatch) -> torch.Tensor:
        distance = (tokens.student.detach().exp() - tokens.teachers[0].exp()).abs().sum(dim=-1) / 2
        return distance**self.fsd.focus
