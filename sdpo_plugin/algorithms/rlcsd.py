"""RL with Contrastive on-policy Self-Distillation (arXiv 2606.11709): a right hint against wrong ones.

Read: the opening, notes of the rest, and the code (github.com/THU-BPM/RLCSD: `core_algos.py`,
`self_distill_main.py`). Any hint makes a model more direct and shorter; what a right one does beyond a wrong one is
about the task. With T behind a correct sibling, T_k behind up to 4 failed ones (never the response itself), all in
one template:

    e_t = log T(y_t) - log mean_k T_k(y_t),   r_t = clip(beta lambda tanh(e_t / tau), -2, 2)
    A_t = A + r_t where |r_t| > delta, without changing A's sign; 0 stays 0

and the policy loss is the mean over the tokens that are left alone plus that over the changed ones. The teacher is a
copy of the student, taken every 10 steps.

Interpretation: the two means are of a micro-batch, as in the code; the notes have them of each response. A response
that lacks a right or any wrong hint keeps its advantage, where the code leaves it out of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdpo_plugin.algorithms.rlsd import RLSD
from sdpo_plugin.config import OptionGroup, option
from sdpo_plugin.distillation.context import Rollout, TeacherContext, context_showing
from sdpo_plugin.interface.rollout_batch import RolloutBatch


@dataclass(frozen=True)
class RlcsdConfig(OptionGroup):
    """How the contrast of hints changes a token's advantage (`--algo rlcsd`)."""

    prefix = "rlcsd"

    wrong_hints: int = option(4, "failed siblings that a teacher is shown, one at a time; fewer where there are fewer")
    temperature: float = option(0.02, "tau: the contrast, in nats, at which its effect begins to saturate")
    scale: float = option(0.5, "beta x lambda: the greatest change of an advantage")
    threshold: float = option(0.02, "delta: smaller changes are left out")

    def check(self) -> None:
        self.positive("wrong_hints", integer=True)
        for name in ("temperature", "scale"):
            self.positive(name)


class RLCSD(RLSD):
    """OpenRLHF's policy loss with advantages that right and wrong hints move, never past zero."""

    name = "rlcsd"
    options = (RlcsdConfig,)
    defaults: dict[str, Any] = RLSD.defaults | {
        "teacher.kind": "ema", "teacher.update_rate": 1.0, "teacher.sync_steps": 10,
        "reprompt.template": "{prompt}{solution}\n\nCorrectly solve the original question.",
        "reprompt.solution_template": "\nReference solution:\n\n{successful_previous_attempt}",
    }  # fmt: skip
    rlcsd: RlcsdConfig

    def teacher_contexts(self, batch: RolloutBatch, rollouts: Sequence[Rollout]) -> list[list[TeacherContext]]:
        (right,) = super().teacher_contexts(batch, rollouts)
        wrong: list[list[TeacherContext]] = [[] for _ in range(self.rlcsd.wrong_hints)]
        for i, rollout in enumerate(rollouts):
            failed = [
                other.response for j, other in enumerate(rollouts)
                if other.group == rollout.group and j != i and other.response is not None
                and not (other.reward is not None and other.reward >= self.reprompt.success_threshold)
            ]  # fmt: skip
            for k, shown in enumerate(wrong):
                sections = {"solution": failed[k]} if k < len(failed) and right[i].active else {}
                shown.append(context_showing(rollout, sections, self.reprompt))
        return [right, *wrong]

    def loss_mask(self, batch: RolloutBatch, i: int, active: Sequence[bool]) -> torch.Tensor:
        right, *wrong = active
        return super().loss_mask(batch, i, [right and any(wrong)])

    def token_advantages(
        self, log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, data: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        advantage, (right, *wrong) = data["advantage"], teacher_log_probs
        shown = torch.stack([data[f"active/{k}"] for k in range(1, len(wrong) + 1)])
        mean = torch.stack(wrong).masked_fill(~shown, -torch.inf).logsumexp(0) - shown.sum(0).log()
        moved = (self.rlcsd.scale * torch.tanh((right - mean) / self.rlcsd.temperature)).clamp(-2.0, 2.0)
        selected = data["in_loss"] & (moved.abs() > self.rlcsd.threshold)
        changed = torch.where(advantage > 0, (advantage + moved).clamp(min=0.0), (advantage + moved).clamp(max=0.0))
        result = torch.where(selected & (advantage != 0), changed, advantage)
        # Two means in the place of one: each path by its own number of tokens.
        count = torch.where(selected, selected.sum(), (~selected).sum())
        return result * len(selected) / count
