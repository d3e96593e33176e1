"""The choices of a paper: everything in which SDPO, SDFT and their variants differ.

These are the teacher's context (`teacher_contexts`), the tokens in the loss and their weights (`loss_mask`,
`token_weights`), the divergence between teacher and student (`token_loss`), the teacher's weights (`make_teacher`), and
the weight of OpenRLHF's policy loss (`loss_coefficients`). `controller_side.py` and `worker_side.py` implement them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from sdpo_plugin.algorithms.compatibility import reads_old_log_probs
from sdpo_plugin.algorithms.teacher import Teacher, make_teacher
from sdpo_plugin.config import (
    DiagnosticsConfig,
    DistillConfig,
    OptionGroup,
    RepromptConfig,
    TeacherConfig,
    from_namespace,
)
from sdpo_plugin.distillation.context import Rollout, TeacherContext, build_teacher_contexts
from sdpo_plugin.distillation.loss import TokenBatch, loss_from_log_probs
from sdpo_plugin.interface.micro_batch import MicroBatch
from sdpo_plugin.interface.models import Worker
from sdpo_plugin.interface.rollout_batch import RolloutBatch

PREFIX = "self_distillation/"


class Choices:
    """The members that a variant overrides. The defaults here are SDPO's (arXiv 2601.20802).

    Attributes:
        name: the variant's `--algo` name.
        defaults: values that replace the defaults of OpenRLHF and of the option groups, by dotted flag name.
        options: additional flag groups of the variant; the parsed values of a group are in the attribute named by its
            `prefix`.
        uses_rollout_correction: whether `--algo.advantage.is_correction_*` default to truncated importance sampling.
        needs_reward: whether the algorithm needs a reward. If it does not, and no reward function is given, OpenRLHF,
            which requires one, gets rewards of zero.
        uses_template: whether the teacher's prompts are made from `--reprompt.template`.
        supports_hybrid_loss: whether `--distill.weight` may be between 0 and 1; False where `loss_coefficients` sets
            its own weights.
    """

    name: str
    defaults: dict[str, Any] = {}
    options: tuple[type[OptionGroup], ...] = ()
    uses_rollout_correction = True
    needs_reward = True
    uses_template = True
    supports_hybrid_loss = True

    def __init__(self, args: Any) -> None:
        self.args = args
        self.distill: DistillConfig = from_namespace(DistillConfig, args)
        self.reprompt: RepromptConfig = from_namespace(RepromptConfig, args)
        self.teacher_config: TeacherConfig = from_namespace(TeacherConfig, args)
        self.diagnostics: DiagnosticsConfig = from_namespace(DiagnosticsConfig, args)
        for group in self.options:
            setattr(self, group.prefix, from_namespace(group, args))

    def teacher_contexts(self, batch: RolloutBatch, rollouts: Sequence[Rollout]) -> list[list[TeacherContext]]:
        """What the teacher is conditioned on: K lists with one `TeacherContext` per sample each. Here K is 1."""
        return [build_teacher_contexts(rollouts, self.reprompt)]

    def loss_mask(self, batch: RolloutBatch, i: int, active: Sequence[bool]) -> torch.Tensor:
        """The tokens in the loss: bool [A_i] over sample i's action positions.

        By default these are all response tokens but the first `skip_tokens`, if all teacher contexts of the sample are
        active. With `mask_truncated`, a response that OpenRLHF marks as truncated has no token in the loss.

        Args:
            active: for each of the K teacher contexts, whether it is active for sample i.
        """
        left_out = not all(active) or (self.distill.mask_truncated and bool(batch.samples[i].truncated))
        response = batch.response_mask(i)
        return response & (response.cumsum(0) > self.distill.skip_tokens) & (not left_out)

    # Every token has weight 1 unless a variant defines a method `token_weights(tokens)`, which returns [r] without a
    # gradient. The weights do not change the denominator of the mean; `normalizes_token_weights` divides them by their
    # mean over the distilled tokens of the micro-batch.
    # `reads_distributions` says that they are made of the teacher's whole distribution, which no engine returns.
    token_weights: Callable[[TokenBatch], torch.Tensor] | None = None
    reads_distributions = False
    normalizes_token_weights = False

    # A variant in which the teacher changes the advantage of single tokens defines a method
    # `token_advantages(log_probs, teacher_log_probs, data)`. Its arguments are, for the N sampled tokens, the student's
    # log-probabilities [N], those of each teacher context [K, N] (0 where `data["in_loss"]` is False), and
    # `token_data`. It returns the advantages for OpenRLHF's policy loss, [N].
    token_advantages: Callable[..., torch.Tensor] | None = None

    def token_loss(self, student: torch.Tensor, teacher: torch.Tensor, tokens: TokenBatch) -> torch.Tensor:
        """The loss of each token, [r].

        Args:
            student: log-probabilities [r, V].
            teacher: log-probabilities [r, V] with the first teacher context; `tokens.teachers` has those with every
                teacher context.
            tokens: the sampled tokens and their `token_data`.
        """
        return loss_from_log_probs(student, teacher, tokens.ids, self.distill, tokens.get("old_log_probs"))

    def make_teacher(self, worker: Worker) -> Teacher:
        """The teacher of this rank: whose weights score the response."""
        return make_teacher(self.teacher_config, worker)

    def loss_coefficients(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Each sample's weights in OpenRLHF's policy loss and in the distillation loss, [B] and [B], both >= 0."""
        ones = torch.ones(len(micro_batch.experience.sequences), device=micro_batch.experience.sequences.device)
        return (1.0 - self.distill.weight) * ones, self.distill.weight * ones

    @property
    def uses_policy_loss(self) -> bool:
        """Whether OpenRLHF's policy loss is part of the loss; if not, its log-probabilities need no gradient."""
        return self.distill.weight < 1.0

    @cached_property
    def reads_old_log_probs(self) -> bool:
        """Whether the policy's log-probabilities from before the rollout batch's first update are used anywhere."""
        return reads_old_log_probs(self.args, self.uses_policy_loss)
