"""Replaces the LM head on a policy worker: computes the loss from student and teacher hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch

from sdpo_plugin.algorithms.choices import PREFIX, Choices
from sdpo_plugin.algorithms.teacher import Teacher
from sdpo_plugin.distillation.fused import HeadOutput, linear_distillation
from sdpo_plugin.distillation.head import Head, TeacherStates, match_vocab_size
from sdpo_plugin.distillation.loss import LOG_ZERO, TeacherTable, TokenBatch
from sdpo_plugin.interface.micro_batch import MicroBatch
from sdpo_plugin.monitoring.collapse import measure
from sdpo_plugin.monitoring.recorder import report_token_stats


class CollapseCheck(NamedTuple):
    """The inputs of the context KL on a micro-batch of N response tokens.

    Attributes:
        tokens: bool [N], which n response tokens are checked.
        without_context: [n, H], the teacher's hidden states at these tokens, conditioned on the student's prompt.
        failed: bool [n], whether the token's sample failed.
    """

    tokens: torch.Tensor
    without_context: torch.Tensor
    failed: torch.Tensor


class DistillationPass:
    """A `HeadFunction` for one micro-batch of N response tokens.

    Attributes:
        scored: for each of the K teacher contexts, the teacher's hidden states [N, H], or its table where engines
            score.
        weights: [N], each token's weight in the mean; 0 for tokens that are not in the loss.
        data: `token_data`, [N] each.
        correction: returns the factors of `--algo.advantage.is_correction_*` for r tokens, [r]; None: no correction.
        check: the inputs of the context KL, or None if it is not measured on this micro-batch.
    """

    def __init__(
        self,
        algorithm: Choices,
        teacher: Teacher,
        micro_batch: MicroBatch,
        scored: Sequence[torch.Tensor | TeacherTable],
        *,
        weights: torch.Tensor,
        data: dict[str, torch.Tensor],
        correction: Callable[[TokenBatch], torch.Tensor] | None,
        check: CollapseCheck | None,
    ) -> None:
        self.algorithm, self.teacher, self.micro_batch = algorithm, teacher, micro_batch
        self.scored, self.weights, self.data = scored, weights, data
        self.correction, self.check = correction, check
        self.temperature: float = micro_batch.worker.actor.temperature
        self._token_weights = torch.ones_like(weights)
        self._sampled = torch.zeros(len(scored), len(weights), device=weights.device)  # log-probs by teachers

    def __call__(self, hidden: torch.Tensor, student: Head, token_ids: torch.Tensor) -> HeadOutput:
        """Loss, log-probabilities and entropy of the N tokens.

        Args:
            hidden: [N, H], the student's hidden states.
            student: the student's LM head.
            token_ids: int64 [N], the sampled tokens.
        """
        micro_batch, required = self.micro_batch, self.micro_batch.required
        with self._teachers(student) as (student, teachers):
            self._measure_context_kl(hidden, student, teachers[0], token_ids)
            output = linear_distillation(
                hidden, student, teachers, token_ids,
                self.weights, self.objective, data=self.data, temperature=self.temperature,
                read=self.data["in_loss"] if self.algorithm.token_advantages is not None else None,
                differentiable_log_probs=required["log_probs"] or required["entropy"],
                with_entropy=required["entropy"] or self.algorithm.args.actor.entropy_coef is not None,
            )  # fmt: skip
            # From before the rollout batch's first update; with a single update, these are the student's own.
            before = self.data.get("old_log_probs", output.log_probs).detach()
            report_token_stats(micro_batch, before, teachers[0], token_ids, self.data["active"], self.temperature)
        output = self._weighted(output)
        if self.algorithm.token_advantages is not None:
            micro_batch.advantages = self._advantages(output.log_probs.detach())
        return output

    @contextmanager
    def _teachers(self, student: Head) -> Iterator[tuple[Head, list[TeacherStates | TeacherTable]]]:
        """The student's head and the teachers, over one vocabulary."""
        tables = [table for table in self.scored if isinstance(table, TeacherTable)]
        if tables:
            yield student, [within_vocab(table, student) for table in tables]
            return
        with self.teacher.head() as teacher:
            student, teacher = match_vocab_size(student, teacher)
            yield student, [TeacherStates(x, teacher) for x in self.scored if isinstance(x, torch.Tensor)]

    def objective(self, tokens: TokenBatch) -> torch.Tensor:
        """The loss of r of the N tokens, [r], including token weights and rollout correction."""
        algorithm = self.algorithm
        if type(algorithm).token_loss is Choices.token_loss:  # its value does not need whole distributions
            loss = tokens.divergence(algorithm.distill)
        else:
            loss = algorithm.token_loss(tokens.student, tokens.teachers[0], tokens)
        if algorithm.token_weights is not None:
            self._token_weights[tokens.rows] = factor = algorithm.token_weights(tokens).detach()
            loss = loss * factor
        if algorithm.token_advantages is not None:
            self._sampled[:, tokens.rows] = tokens.sampled_by_teachers
        return loss if self.correction is None else loss * self.correction(tokens)

    def _measure_context_kl(
        self, hidden: torch.Tensor, student: Head, teacher: TeacherStates | TeacherTable, token_ids: torch.Tensor
    ) -> None:
        if self.check is None or isinstance(teacher, TeacherTable):
            return
        tokens, without_context, failed = self.check
        measured = measure(
            hidden[tokens], student, teacher.hidden[tokens], without_context, teacher.head, token_ids[tokens],
            failed, self.temperature,
        )  # fmt: skip
        for name, (total, count) in measured.items():
            self.micro_batch.log_mean(name, total, count)

    def _weighted(self, output: HeadOutput) -> HeadOutput:
        """Log the loss per distilled token. Divide it by the mean token weight if the variant normalizes weights."""
        distilled = self.weights != 0
        self.micro_batch.log_mean(PREFIX + "loss", output.token_loss[distilled].sum(), distilled.sum())
        if self.algorithm.token_weights is not None:  # all ranks must log the same names
            total = self._token_weights[distilled].sum()
            self.micro_batch.log_mean(PREFIX + "token_weight", total, distilled.sum())
        if self.algorithm.normalizes_token_weights:
            ring = self.micro_batch.ring
            count, total = ring.sum(distilled.sum()), ring.sum(self._token_weights[distilled].sum())
            if count:
                output = replace(output, loss=output.loss / (total / count))
        return output

    def _advantages(self, log_probs: torch.Tensor) -> torch.Tensor:
        """[B, A]: OpenRLHF's advantages, replaced with those of `token_advantages` at the response tokens."""
        assert self.algorithm.token_advantages is not None
        given, of_ring = self.micro_batch.experience.advantages, self.micro_batch.of_ring
        data = {name: of_ring(values) for name, values in self.data.items()}
        found = self.algorithm.token_advantages(of_ring(log_probs), of_ring(self._sampled.T).T, data)
        return given.masked_scatter(self.micro_batch.response_of_ring, found.to(given.dtype))


def within_vocab(table: TeacherTable, student: Head) -> TeacherTable:
    """The table without tokens that the student's head does not have: a teacher's vocabulary may be padded."""
    unknown = table.ids >= len(student.weight)
    known = table.ids.masked_fill(unknown, 0), table.log_probs.masked_fill(unknown, LOG_ZERO)
    return TeacherTable(table.sampled, *known)
