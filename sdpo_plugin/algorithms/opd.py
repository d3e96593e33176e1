"""On-policy distillation from another model (GKD, arXiv 2306.13649; thinkingmachines.ai/blog/on-policy-distillation).

The student samples, a stronger model scores the same tokens, and its distribution is distilled. The
generalised Jensen-Shannon divergence of GKD is `--distill.alpha`; the default is the blog's, the reverse KL on the
student's own samples, without a reward. Known from abstracts and excerpts. OpenRLHF's open pull request 1276 does it
as a trainer of its own, without an engine or ZeRO-3, with the same loss: KL(student||teacher) over the student's
top-k and a tail.

With the template `{prompt}` the teacher reads what the student read, token by token, and every response is distilled;
`--reprompt.chat_template_kwargs` renders that prompt anew, for a teacher that thinks and a student that does not.
A template with sections also shows the teacher a context, and only samples that have one are distilled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sdpo_plugin.algorithms.base import SelfDistillation
from sdpo_plugin.distillation.context import Rollout, TeacherContext
from sdpo_plugin.distillation.teacher_prompt import TruncationOffsets
from sdpo_plugin.distillation.template import SECTIONS
from sdpo_plugin.hookspecs import hookimpl
from sdpo_plugin.interface.rollout_batch import RolloutBatch


class OPD(SelfDistillation):
    """Another model teaches: `--teacher.model_name_or_path`, with the student's tokenizer. No reward is needed."""

    name = "opd"
    needs_reward = False
    defaults: dict[str, Any] = {
        "algo.advantage.estimator": "reinforce",
        "algo.kl.init_coef": 0.0,
        "teacher.kind": "model",
        "distill.alpha": 1.0,
        "reprompt.template": "{prompt}",
    }

    @property
    def shows_context(self) -> bool:
        return any("{" + section + "}" in self.reprompt.template for section in SECTIONS)

    @hookimpl
    def openrlhf_dataset(self, dataset: Any, evaluation: bool, args: Any) -> None:
        if self.shows_context:  # else a prompt may end as it likes
            super().openrlhf_dataset(dataset, evaluation, args)

    def teacher_contexts(self, batch: RolloutBatch, rollouts: Sequence[Rollout]) -> list[list[TeacherContext]]:
        if self.shows_context:
            return super().teacher_contexts(batch, rollouts)
        return [[TeacherContext(rollout.messages, rollout.response is not None) for rollout in rollouts]]

    def teacher_prompt(
        self, batch: RolloutBatch, i: int, context: TeacherContext, position_mask: torch.Tensor
    ) -> tuple[list[int], TruncationOffsets]:
        if not context.sections and self.reprompt.chat_template_kwargs is None:
            return batch.prompt_ids(i), {}
        return super().teacher_prompt(batch, i, context, position_mask)
