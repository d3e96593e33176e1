"""RLVR with Self-Distillation (arXiv 2604.03128): the reward gives the direction, the teacher only the magnitude.

Read: sections 1 to 4 in a translation, and the code (github.com/iie-ycx/RLSD, `dp_opsd_actor.py`). With A the
group-relative advantage of a response, and T and S what teacher and student give its token y_t (13-15):

    D_t = sg(log T(y_t) - log S(y_t)),   w_t = clip(exp(sign(A) D_t), 1 - eps, 1 + eps)
    A_t = A (1 - lambda + lambda w_t)

A_t stands in for A in the policy loss, and nothing is distilled: no token's advantage changes its sign, so what the
teacher reads cannot leak. lambda falls from 0.5 to 0 within 50 rollout batches. The teacher is the student itself;
the authors' launch script has a copy, taken every 20 steps (`--teacher.kind ema --teacher.update_rate 1
--teacher.sync_steps 20`).

Interpretation: the equation that mixes in lambda is the code's. There the context is the answer, which every sample
has; here a sample without a context keeps its advantage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sdpo_plugin.algorithms.sdpo import SDPO
from sdpo_plugin.config import OptionGroup, option
from sdpo_plugin.interface.micro_batch import MicroBatch


@dataclass(frozen=True)
class RlsdConfig(OptionGroup):
    """How much the teacher changes a token's part of the advantage (`--algo rlsd`)."""

    prefix = "rlsd"

    clip: float = option(0.2, "eps: a token's weight is within 1 - eps and 1 + eps")
    mix: float = option(0.5, "lambda at the start: 0 leaves the advantage as it is, 1 multiplies it by the weight")
    decay_steps: int = option(50, "rollout batches until lambda is 0; 0: it stays")

    def check(self) -> None:
        self.in_unit_interval("clip")
        self.in_unit_interval("mix")
        if not isinstance(self.decay_steps, int) or self.decay_steps < 0:
            self.fail("decay_steps", "give an integer >= 0")


class RLSD(SDPO):
    """OpenRLHF's policy loss with a response's advantage that the teacher divides among its tokens."""

    name = "rlsd"
    options: tuple[type[OptionGroup], ...] = (RlsdConfig,)
    defaults: dict[str, Any] = SDPO.defaults | {"algo.advantage.estimator": "group_norm", "teacher.kind": "live"}
    uses_policy_loss, supports_hybrid_loss = True, False
    rlsd: RlsdConfig

    def loss_coefficients(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        ones = torch.ones(len(micro_batch.experience.sequences), device=micro_batch.experience.sequences.device)
        return ones, 0.0 * ones

    def token_advantages(
        self, log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, data: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        advantage, decay = data["advantage"], self.rlsd.decay_steps
        left = (1.0 - (data["step"] - 1.0) / decay).clamp(min=0.0) if decay else 1.0
        evidence = torch.exp(advantage.sign() * (teacher_log_probs[0] - log_probs))
        weight = evidence.clamp(1.0 - self.rlsd.clip, 1.0 + self.rlsd.clip)
        return torch.where(data["in_loss"], advantage * (1.0 + self.rlsd.mix * left * (weight - 1.0)), advantage)
