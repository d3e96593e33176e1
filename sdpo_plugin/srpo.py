"""Sample-Routed Policy Optimization (arXiv 2604.02288): successes to GRPO, failures to self-distillation.

Read: the abstract, and the implementation that the authors of RLCSD made for comparison (github.com/THU-BPM/RLCSD,
`compute_policy_loss_srpo`), which cites the paper's L_final and section 3.2. With c = 1 for a correct response, m = 1
where a teacher context exists, z = (1 - c) m routes sample i:

    L = ( sum (1 - z_i) l_GRPO(i,t) + sum z_i w(i,t) l_SDPO(i,t) ) / number of all response tokens
    w(i,t) = exp(-beta H_T(i,t)) / mean of it over the routed tokens,

H_T the entropy of the teacher: what it does not know itself it should not teach.

Interpretation: a response is correct if its reward reaches `--reprompt.success_threshold` (there: if its advantage is
positive). The mean of w is taken over a micro-batch, as there, so it depends on `--train.micro_batch_size` a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdpo_plugin.config import Group, option
from sdpo_plugin.context import Rollout, TeacherContext
from sdpo_plugin.interface import MicroBatch, RolloutBatch
from sdpo_plugin.loss import Tokens
from sdpo_plugin.sdpo import SDPO


@dataclass(frozen=True)
class SrpoConfig(Group):
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
    defaults: dict[str, Any] = SDPO.defaults | {"algo.advantage.estimator": "group_norm", "distill.mean": "tokens"}
    uses_policy_loss, mixes = True, False
    normalizes_token_weights = True
    srpo: SrpoConfig

    def contexts(self, batch: RolloutBatch, rollouts: Sequence[Rollout]) -> list[list[TeacherContext]]:
        (shown,) = super().contexts(batch, rollouts)
        failed = [r.reward is None or r.reward < self.reprompt.success_threshold for r in rollouts]
        return [[c if f else TeacherContext(c.messages, False) for c, f in zip(shown, failed, strict=True)]]

    def loss_mask(self, batch: RolloutBatch, i: int, active: Sequence[bool]) -> torch.Tensor:
        """All response tokens, so that both losses have their number for a denominator."""
        return batch.response_mask(i)

    def join(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        prompts, device = micro_batch.data["teacher_prompt"], micro_batch.experience.sequences.device
        routed = torch.tensor([float(len(ids) > 0) for ids in prompts], device=device)
        return 1.0 - routed, routed

    def token_weights(self, tokens: Tokens) -> torch.Tensor:
        return torch.exp(-self.srpo.beta * tokens.teacher_entropy)
