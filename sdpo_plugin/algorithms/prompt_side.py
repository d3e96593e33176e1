"""The teacher's prompts of a batch, as token ids: the part of the controller's side that a variant may override."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from sdpo_plugin.algorithms.choices import Choices
from sdpo_plugin.algorithms.teacher_images import require_image_tokens
from sdpo_plugin.distillation.chat_arguments import teacher_chat_template_kwargs
from sdpo_plugin.distillation.context import TeacherContext
from sdpo_plugin.distillation.teacher_prompt import TeacherPrompts, TruncationOffsets
from sdpo_plugin.interface.rollout_batch import RolloutBatch


class TeacherPromptSide(Choices):
    """How a context becomes a teacher's prompt."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self._prompts: TeacherPrompts | None = None  # of the last batch

    def teacher_prompt(
        self, batch: RolloutBatch, i: int, context: TeacherContext, position_mask: torch.Tensor
    ) -> tuple[list[int], TruncationOffsets]:
        """The teacher's prompt for sample i as token ids, and where it is truncated.

        The prompt is truncated so that it fits into `max_seq_len` together with the response up to the last scored
        position. If no truncation of the sections is enough, the list of ids is empty.

        Args:
            position_mask: bool [A_i], the positions that are scored.
        """
        room = self.room(batch, i, position_mask)
        ids, offsets = self.prompts_of(batch).ids(context, int(max(min(self.reprompt.max_len, room), 1)))
        require_image_tokens(batch, i, context, ids)
        return (ids, offsets) if len(ids) <= room else ([], {})

    def room(self, batch: RolloutBatch, i: int, position_mask: torch.Tensor) -> float:
        """The model's positions that the tokens scored by `position_mask` leave to the teacher's prompt."""
        return batch.max_seq_len - (int(position_mask.nonzero()[-1] - batch.response_mask(i).nonzero()[0]) + 1)

    @cached_property
    def teacher_chat(self) -> dict[str, Any]:
        """The chat-template arguments of the teacher's prompts."""
        return teacher_chat_template_kwargs(self.args)

    def bare_prompt_ids(self, batch: RolloutBatch, i: int) -> list[int]:
        """Sample i's own prompt for the teacher, without a context.

        These are the student's tokens, unless the teacher has chat-template arguments of its own.
        """
        if self.reprompt.chat_template_kwargs is None:
            return batch.prompt_ids(i)
        return self.prompts_of(batch).ids(TeacherContext(batch.prompt(i), False))[0]

    def prompts_of(self, batch: RolloutBatch) -> TeacherPrompts:
        """What makes the teacher's prompts of a batch, and has those that were made already."""
        if self._prompts is None:
            self._prompts = TeacherPrompts(batch.tokenizer, self.reprompt, self.teacher_chat)
        return self._prompts
