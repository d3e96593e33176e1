"""Sample-Routed Policy Optimization (arXiv 2604.02288): successes to GRPO, failures to self-distillation.

Read: the full text; its hyperparameters only in somebody's audit of a reproduction; no code of the authors was found.
With c = 1 for a correct response and m = 1 where a teacher context exists, z = (1 - c) m routes sample i (3.1):

    L = ( sum (1 - z_i) l_GRPO(i,t) + sum z_i w(i,t) l_SDPO(i,t) ) / number of all response tokens   (3.3)
    w(i,t) = exp(-beta H_T(i,t)) / mean of it over the routed tokens   (3.2)

H_T the entropy of the teacher: where it is uncertain, it should not teach. Correct is a reward of 0.5 and more
(`--reprompt.success_threshold`), beta is 1. A failure with a context gets no policy gradient, though its reward is in
its group's mean; where a whole group fails and nothing is shown, GRPO has no gradient either.

Interpretation: the mean of w is taken over a micro-batch, so it depends on `--train.micro_batch_size` a little; the
paper says over the routed tokens, and not of what. The paper shows siblings only; here feedback counts as a context,
too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdpo_plugin.algorithms.sdpo import SDPO
from sdpo_plugin.config import OptionGroup, option
from sdpo_plugin.distillation.context import Rollout, TeacherContext
from sdpo_plugin.distillation.loss import TokenBatch
from sdpo_plugin.interface.micro_batch import MicroBatch
from sdpo_plugin.interface.rollout_batch import RolloutBatch


@dataclass(frozen=True)
class SrpoConfig(OptionGroup):
    """How much Sample-Routed Policy Optimization (`--algo srpo`) trusts a teacher that is unsure."""

    prefix = "srpo"

    beta: float = option(1.0, "a token counts by exp(-beta x entropy of the teacher), in nats; 0: all alike")

    def check(self) -> None:
        if not self.beta >= 0.0:
            self.fail("beta", "give a number >= 0")


class SRPO(SDPO):
    """OpenRLHF's policy loss on successes, entropy-weighted distillation on failures that have a teacher context."""

    name = "srpo"
    options = (SrpoConfig,)
    # One mean over all tokens for both losses: OpenRLHF's default is the mean over tokens, too.
    defaults: dict[str, Any] = SDPO.defaults | {
        "algo.advantage.estimator": "group_norm", "distill.loss_agg_mode": "token-mean",
    }  # fmt: skip
    uses_policy_loss, supports_hybrid_loss = True, False
    normalizes_token_weights = reads_distributions = True
    srpo: SrpoConfig

    def teacher_contexts(self, batch: RolloutBatch, rollouts: Sequence[Rollout]) -> list[list[TeacherContext]]:
        (shown,) = super().teacher_contexts(batch, rollouts)
        failed = [r.reward is None or r.reward < self.reprompt.success_threshold for r in rollouts]
        return [[c if f else TeacherContext(c.messages, False) for c, f in zip(shown, failed, strict=True)]]

    def loss_mask(self, batch: RolloutBatch, i: int, active: Sequence[bool]) -> torch.Tensor:
        """All response tokens, so that both losses have their number for a denominator."""
        return batch.response_mask(i)

    def loss_coefficients(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        prompts, device = micro_batch.data["teacher_prompt"], micro_batch.experience.sequences.device
        routed = torch.tensor([float(len(ids) > 0) for ids in prompts], device=device)
        return 1.0 - routed, routed

    def token_weights(self, tokens: TokenBatch) -> torch.Tensor:
        return torch.exp(-self.srpo.beta * tokens.teacher_entropy)
