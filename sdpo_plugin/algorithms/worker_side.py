"""The policy worker's side: creates, updates and saves the teacher, and sets up the loss of each micro-batch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sdpo_plugin.algorithms.choices import PREFIX, Choices
from sdpo_plugin.algorithms.compatibility import policy_loss_needs_log_probs
from sdpo_plugin.algorithms.distillation_pass import CollapseCheck, DistillationPass
from sdpo_plugin.algorithms.engine_scores import teacher_tables
from sdpo_plugin.algorithms.teacher import EmaTeacher, Teacher
from sdpo_plugin.config import ConfigError
from sdpo_plugin.distillation.loss import TeacherTable, TokenBatch
from sdpo_plugin.hookspecs import hookimpl
from sdpo_plugin.interface.micro_batch import MicroBatch
from sdpo_plugin.interface.models import Images, Worker
from sdpo_plugin.interface.scoring import (
    ScoringRequest,
    numbered,
    scoring_requests,
    teacher_images,
    teacher_inputs,
)
from sdpo_plugin.monitoring.collapse import CHECKED_SAMPLES


class WorkerSide(Choices):
    """Hooks that run on every policy worker.

    Attributes:
        teacher: set by `openrlhf_worker_setup`.
    """

    teacher: Teacher

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.first_micro_batch = True  # of an optimizer step

    @hookimpl
    def openrlhf_requirements(self, args: Any) -> dict[str, bool]:
        log_probs = self.uses_policy_loss or policy_loss_needs_log_probs(args)
        return {
            "old_log_probs": self.reads_old_log_probs,
            "log_probs": log_probs,
            # If False, the student skips samples that are not in the loss.
            "all_samples": log_probs or args.actor.entropy_coef is not None or args.actor.aux_loss_coef > 0.0,
        }

    # ── the teacher ──

    @hookimpl
    def openrlhf_model_built(self, actor: Any, args: Any) -> None:
        if args.ds.lora.rank > 0 and self.teacher_config.kind == "ema":
            actor.add_teacher_adapter()

    @hookimpl
    def openrlhf_worker_setup(self, worker: Worker) -> None:
        worker.actor.tap_head()
        self.teacher = self.make_teacher(worker)

    @hookimpl
    def openrlhf_device_tensors(self, worker: Worker) -> list[torch.Tensor]:
        return self.teacher.device_tensors()

    @hookimpl
    def openrlhf_optimizer_step(self, worker: Worker) -> None:
        self.first_micro_batch = True
        self.teacher.after_optimizer_step()

    @hookimpl
    def openrlhf_save_checkpoint(self, worker: Worker, path: str) -> None:
        self.teacher.save(path)

    @hookimpl
    def openrlhf_load_checkpoint(self, worker: Worker, path: str) -> None:
        self.teacher.load(path)

    @hookimpl
    def openrlhf_save_model(self, worker: Worker, path: str) -> None:
        if self.teacher_config.save:
            assert isinstance(self.teacher, EmaTeacher)  # `compatibility.reject_unsupported`
            self.teacher.model.export(os.path.join(path, "teacher"))

    # ── a micro-batch ──

    @hookimpl
    def openrlhf_before_forward(self, micro_batch: MicroBatch) -> None:
        if "update_rate" in micro_batch.scalars:
            self.teacher.rate = micro_batch.scalars["update_rate"]
        if not micro_batch.required["all_samples"]:
            micro_batch.sample_mask = micro_batch.loss_mask.any(dim=1)
        scored: Sequence[torch.Tensor | TeacherTable]
        if self.teacher_config.scored_by == "engine":
            scored, check = teacher_tables(micro_batch), None
        else:
            images = teacher_images(micro_batch)
            scored = [self._teacher_hidden(micro_batch, asked, images) for asked in scoring_requests(micro_batch)]
            check = self._collapse_check(micro_batch)
        policy_weights, distill_weights = self.loss_coefficients(micro_batch)
        if self.uses_policy_loss:
            micro_batch.policy_weights = policy_weights
        by_sample = self.distill.loss_agg_mode == "seq-mean-token-mean"
        mean = micro_batch.sample_weights if by_sample else micro_batch.loss_weights
        micro_batch.head_fn = DistillationPass(
            self,
            self.teacher,
            micro_batch,
            scored,
            weights=micro_batch.to_response_tokens(mean * micro_batch.loss_mask * distill_weights[:, None]),
            data=self.token_data(micro_batch),
            correction=self._rollout_correction(micro_batch),
            check=check,
        )

    @hookimpl
    def openrlhf_policy_loss(self, micro_batch: MicroBatch) -> None:
        own, output = micro_batch.loss, micro_batch.head_output
        assert own is not None and output is not None
        micro_batch.loss = own + output.loss if self.uses_policy_loss else output.loss
        in_loss, tokens = micro_batch.loss_mask.sum(), micro_batch.experience.action_mask.sum()
        micro_batch.log_mean(PREFIX + "token_fraction", in_loss, tokens)
        micro_batch.metrics[PREFIX + "empty_target_batch"] = float(in_loss == 0)
        if self.diagnostics.on_collapse != "off":
            micro_batch.metrics |= self.teacher.metrics()

    def token_data(self, micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Per-token data for the loss besides the distributions, [N] each, by name; a variant may add entries.

        `position`: in the response, from 0. `reward`: of the sample. `advantage`: from OpenRLHF's estimator. `step`:
        number of the rollout batch, from 1. `old_log_probs`: only where they are needed, for example with several
        updates per rollout batch. `in_loss`: the loss mask. `active`: whether the teacher scores the token with the
        first teacher context; `active/1`, ... for further teacher contexts.
        """
        batch, active = micro_batch.experience, {}
        for k, requests in enumerate(scoring_requests(micro_batch)):
            active[numbered("active", k)] = scored = torch.zeros_like(batch.action_mask, dtype=torch.bool)
            for request in requests:
                scored[request.sample] |= request.position_mask
        found = active | {
            "in_loss": micro_batch.loss_mask,
            "position": batch.action_mask.cumsum(dim=1) - 1,
            "step": torch.full((len(batch.sequences),), micro_batch.scalars.get("step", 0.0)),
            "advantage": batch.advantages,
            "reward": torch.stack(micro_batch.data["reward"]) if "reward" in micro_batch.data else None,
            # From before the rollout batch's first update; with a single update, the student's own are used.
            "old_log_probs": batch.action_log_probs if self.reads_old_log_probs else None,
        }  # fmt: skip
        return {name: micro_batch.to_response_tokens(values) for name, values in found.items() if values is not None}

    def _teacher_hidden(
        self, micro_batch: MicroBatch, requests: Sequence[ScoringRequest], images: Images | None
    ) -> torch.Tensor:
        """The teacher's hidden states [N, H] at the response tokens; zero where no request covers the token."""
        batch, response = micro_batch.experience, micro_batch.response
        lengths = None
        if images is not None:
            lengths = batch.attention_mask.sum(dim=1).tolist()
            images = [images[request.sample] for request in requests] or images[:1]
        *inputs, scored = teacher_inputs(batch.sequences, batch.action_mask, requests, lengths)
        here = response[scored]  # with ring attention, the teacher's states of these may be on another rank
        hidden = self.teacher.hidden_states(*inputs, self.teacher_config.max_tokens_per_gpu, here, images)
        number = response.reshape(-1).cumsum(0).view_as(response) - 1
        found = hidden.new_zeros(int(response.sum()), hidden.shape[1])
        found[number[scored][here]] = hidden
        return found

    def _collapse_check(self, micro_batch: MicroBatch) -> CollapseCheck | None:
        """The teacher's scores without its context on a few samples, failed ones first.

        Once per optimizer step, if the controller requested it; otherwise None.
        """
        if not self.first_micro_batch or "failed" not in micro_batch.data:
            return None
        self.first_micro_batch = False
        batch = micro_batch.experience
        taught = torch.tensor([len(ids) > 0 for ids in micro_batch.data["teacher_prompt"]])
        active = micro_batch.loss_mask.any(dim=1) & taught.to(micro_batch.loss_mask.device)
        failed = torch.stack(micro_batch.data["failed"]).to(active.device)
        order = sorted(active.nonzero()[:, 0].tolist(), key=lambda i: not failed[i])
        chosen = torch.zeros_like(active)
        micro_batches = micro_batch.worker.ranks // micro_batch.ring.size  # at the same time
        chosen[order[: math.ceil(CHECKED_SAMPLES / micro_batches)]] = True
        checked = micro_batch.loss_mask & chosen[:, None]
        prompts = micro_batch.data.get("bare_prompt")  # where the teacher's chat-template arguments are its own
        own_prompts = [
            ScoringRequest(i, self._student_prompt(batch, i) if prompts is None else prompts[i], checked[i])
            for i in chosen.nonzero()[:, 0].tolist()
        ]
        tokens = checked[micro_batch.response]
        without_context = self._teacher_hidden(micro_batch, own_prompts, micro_batch.images)[tokens]
        return CollapseCheck(tokens, without_context, micro_batch.to_response_tokens(failed)[tokens])

    @staticmethod
    def _student_prompt(batch: Any, i: int) -> torch.Tensor:
        return batch.sequences[i, : int(batch.action_mask[i].nonzero()[0]) + 1]

    def _rollout_correction(self, micro_batch: MicroBatch) -> Callable[[TokenBatch], torch.Tensor] | None:
        """A function that returns the factors of `--algo.advantage.is_correction_*`, [r]; None if it is off.

        Raises:
            ConfigError: the rollout has no log-probabilities.
        """
        batch, level = micro_batch.experience, self.args.algo.advantage.is_correction_level
        if level == "off":
            return None
        if batch.rollout_log_probs is None:
            raise ConfigError(
                f"--algo.advantage.is_correction_level {level}: the rollout has no log-probabilities; give off, or "
                "an agent that returns rollout_log_probs"
            )
        if self.reads_old_log_probs:
            factors = micro_batch.to_response_tokens(
                micro_batch.rollout_correction(batch.action_log_probs, batch.rollout_log_probs, batch.action_mask)
            )
            return lambda tokens: factors[tokens.rows]
        # The student is the old policy. The loss is computed in batches of single tokens, which is enough because
        # `reads_old_log_probs` holds for corrections of whole samples.
        of_rollout = micro_batch.to_response_tokens(batch.rollout_log_probs)

        def correction(tokens: TokenBatch) -> torch.Tensor:
            student = tokens.log_probs.detach()
            one_sample = [x[None] for x in (student, of_rollout[tokens.rows], torch.ones_like(student))]
            return micro_batch.rollout_correction(*one_sample)[0]

        return correction
