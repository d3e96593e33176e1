"""Self-Distillation Zero (arXiv 2604.12002): the teacher revises the student's own attempt and is given its reward.

Read: detailed notes of the paper, and the README and launch script of the authors' code (a fork of NeMo-RL); the rest
of the code was not. With the prompt x, a response y of the student and its binary reward r (equation 4):

    L = sum_t KL( S(. | x, y_<t) || T(. | x, y, P_r, y_<t) )
    P_1 = "Let me rephrase the above solution."   P_0 = "Wait, this response is not correct, let me start over."

The teacher's input is the authors' token by token: the student's prompt, y without its end, a blank line, P_r, a blank
line; then y is scored once more. All of it is the assistant's turn, so `--reprompt.template` has no part in it. An
attempt that is too long for `--reprompt.max_len` is truncated (`--reprompt.truncation`). Successes are taught, too:
their teacher rephrases, which shortened responses.

The teacher is the initial model (the paper's second round starts from the student of the first: `--teacher.kind ema
--teacher.update_rate 1 --teacher.sync_steps 400`). Published are one sample per prompt, 128 prompts an update, learning
rate 5e-6, temperature 0.7, which are left to you.

This is the paper's second phase. The first one, supervised training on the model's own successful revisions, makes the
reviser: without it the paper finds 51.4% where both phases reach 60.3% (49.8% before training). Start from such a
checkpoint; OpenRLHF's `train_sft` makes one.

Interpretation: the paper's divergence is KL(student||teacher), the script's default the mean of both directions; this
is the paper's. The code's top-k is the teacher's 64 tokens; whether it has a tail is not known, here it has. P_0 is the
paper's; the code's README has "Wait, this response is wrong. Let me correct it." Give the phrases that the checkpoint
was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdpo_plugin.algorithms.sdpo import SDPO
from sdpo_plugin.config import OptionGroup, RepromptConfig, option
from sdpo_plugin.distillation.context import Rollout, TeacherContext
from sdpo_plugin.distillation.teacher_prompt import TruncationOffsets, truncated_section
from sdpo_plugin.hookspecs import hookimpl
from sdpo_plugin.interface.rollout_batch import RolloutBatch


@dataclass(frozen=True)
class SdzeroConfig(OptionGroup):
    """Self-Distillation Zero (`--algo sdzero`): the phrase between an attempt and its revision."""

    prefix = "sdzero"

    right: str = option(
        "Let me rephrase the above solution.",
        "phrase that follows a successful response (--reprompt.success_threshold) in the teacher's context",
    )
    wrong: str = option(
        "Wait, this response is not correct, let me start over.",
        "phrase that follows a failed response in the teacher's context",
    )


class SDZERO(SDPO):
    """The teacher is conditioned on the response itself, and on whether it is correct."""

    name = "sdzero"
    options = (SdzeroConfig,)
    defaults: dict[str, Any] = SDPO.defaults | {
        "teacher.kind": "base", "distill.alpha": 1.0, "distill.topk": 64, "distill.support": "teacher",
    }  # fmt: skip
    uses_template = False
    sdzero: SdzeroConfig

    @hookimpl
    def openrlhf_configure(self, args: Any) -> None:
        super().openrlhf_configure(args)
        if self.reprompt.template != RepromptConfig.template:
            fix = "--algo sdzero does not use it; leave it out, or use {attempt} in it with --algo sdpo"
            self.reprompt.fail("template", fix)
        if self.reprompt.demonstration != RepromptConfig.demonstration:
            self.reprompt.fail("demonstration", "--algo sdzero shows no demonstration; leave it out")

    def teacher_contexts(self, batch: RolloutBatch, rollouts: Sequence[Rollout]) -> list[list[TeacherContext]]:
        contexts = []
        for rollout in rollouts:
            response, reward = rollout.response, rollout.reward
            if response is None or reward is None or math.isnan(reward):
                contexts.append(TeacherContext(rollout.messages, False))
                continue
            phrase = self.sdzero.right if reward >= self.reprompt.success_threshold else self.sdzero.wrong
            contexts.append(TeacherContext(rollout.messages, True, {"attempt": response, "feedback": phrase}))
        return [contexts]

    def teacher_prompt(
        self, batch: RolloutBatch, i: int, context: TeacherContext, position_mask: torch.Tensor
    ) -> tuple[list[int], TruncationOffsets]:
        tokenizer, prompt, attempt = batch.tokenizer, self.bare_prompt_ids(batch, i), batch.response_ids(i)
        if not tokenizer.decode(attempt[-1:], skip_special_tokens=True):  # the end of the turn, which continues here
            attempt = attempt[:-1]
        phrase = tokenizer(f"\n\n{context.sections['feedback']}\n\n", add_special_tokens=False)["input_ids"]
        room = min(self.reprompt.max_len, self.room(batch, i, position_mask)) - len(prompt) - len(phrase)
        if room < 0:
            return [], {}
        attempt, gaps = truncated_section(attempt, int(room), self.reprompt, tokenizer, "attempt")
        return [*prompt, *attempt, *phrase], {"attempt": [len(prompt) + gap for gap in gaps]} if gaps else {}
