"""The controller's side: builds the teacher prompts and loss masks of a rewarded batch, and monitors the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sdpo_plugin import plugins
from sdpo_plugin.algorithms import no_reward
from sdpo_plugin.algorithms.choices import PREFIX
from sdpo_plugin.algorithms.engine_scores import (
    attach_engine_scores,
    begin_scoring,
    context_kl,
    require_routes,
    scored_topk,
)
from sdpo_plugin.algorithms.prompt_side import TeacherPromptSide
from sdpo_plugin.algorithms.teacher_images import add_teacher_images
from sdpo_plugin.config import ConfigError, StopTraining
from sdpo_plugin.distillation.chat_arguments import teacher_chat_template_kwargs
from sdpo_plugin.distillation.consensus import CONSENSUS
from sdpo_plugin.distillation.context import Rollout, TeacherContext, build_teacher_contexts, context_metrics
from sdpo_plugin.distillation.prompts import require_user_text
from sdpo_plugin.distillation.teacher_prompt import TEXTS_AT_ONCE, teacher_prompt_ids
from sdpo_plugin.distillation.thinking import response_texts, tags_with
from sdpo_plugin.hookspecs import hookimpl
from sdpo_plugin.interface.rollout_batch import RolloutBatch, has_images, prompt_messages
from sdpo_plugin.interface.scoring import TeacherPrompt, attach_scoring_requests
from sdpo_plugin.monitoring.collapse import CHECKED_SAMPLES, CONTEXT_KL, CollapseMonitor, length_metrics
from sdpo_plugin.monitoring.recorder import Recorder

MONITOR_STATE = PREFIX + "collapse_monitor"
logger = logging.getLogger(__name__)


class PlannedScoring(NamedTuple):
    """A teacher context of a sample, and the action positions to score with it: bool [A_i]."""

    context: TeacherContext
    position_mask: torch.Tensor


def plan_teacher_scoring(batch: RolloutBatch, i: int, context: TeacherContext) -> list[PlannedScoring]:
    """Each distinct context of sample i: one for the whole response, or one for each turn with its own feedback."""
    response = batch.response_mask(i)
    if not context.by_turn:
        return [PlannedScoring(context, response)] if context.active else []
    found: dict[int, PlannedScoring] = {}
    for number, turn in enumerate(batch.samples[i].turns):
        if (own := context.of_turn(number)) is not None:
            planned = found.setdefault(id(own), PlannedScoring(own, torch.zeros_like(response)))
            planned.position_mask[turn.start : turn.stop] = True
    return list(found.values())


class ControllerSide(TeacherPromptSide):
    """Hooks that run on the controller, which has the whole batch; `openrlhf_dataset` also runs in the launcher."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.monitor = CollapseMonitor(self.diagnostics, self.reprompt, self.uses_policy_loss)
        self.recorder = Recorder(args) if self.diagnostics.log_samples else None

    # ── before a rollout ──

    @hookimpl
    def openrlhf_dataset(self, dataset: Any, evaluation: bool, args: Any) -> None:
        if evaluation:  # there is no teacher in an evaluation
            return
        require_routes(dataset, self.teacher_config)
        key = args.data.input_key
        for row, prompt in enumerate(dataset[key]):
            require_user_text(f"--data.input_key {key}: row {row}", prompt, images=has_images(args))
        if self._shows_privileged and self.reprompt.privileged_key in dataset.column_names:
            for row, shown in enumerate(dataset[self.reprompt.privileged_key]):
                if not isinstance(shown, str | None):
                    raise ConfigError(
                        f"--reprompt.privileged_key {self.reprompt.privileged_key}: row {row} has "
                        f"{type(shown).__name__} there, {shown!r:.80}; the teacher needs text: convert it, by "
                        "json.dumps(...) for a structure, and use null where there is none"
                    )

    @hookimpl
    def openrlhf_generation_prompt(
        self, prompt: str, record: dict[str, Any], tokenizer: Any, args: Any
    ) -> list[int] | None:
        if not self.distill.generate_from_teacher:
            return None
        shown = record.get(self.reprompt.privileged_key)
        rollout = Rollout(0, prompt_messages(record, args), "", None, privileged_context=shown)
        (context,) = build_teacher_contexts([rollout], self.reprompt)
        ids, _ = teacher_prompt_ids(context, tokenizer, self.reprompt, teacher_chat_template_kwargs(args))
        room = args.data.max_len - (args.rollout.max_new_tokens or 1)
        if len(ids) > room:
            raise ConfigError(
                f"--distill.generate_from_teacher: a teacher's prompt of {len(ids)} tokens leaves no room for a "
                f"response; give --data.max_len {args.data.max_len + len(ids) - room} or a smaller --reprompt.max_len"
            )
        return ids

    @property
    def _shows_privileged(self) -> bool:
        return "{privileged_context}" in self.reprompt.template

    @hookimpl
    def openrlhf_record_columns(self, args: Any) -> list[str]:
        images = [self.reprompt.teacher_images] if self.reprompt.teacher_images is not None else []
        route = [self.teacher_config.route_key] if self.teacher_config.route_key is not None else []
        return [*([self.reprompt.privileged_key] if self._shows_privileged else []), *images, *route]

    # ── the rewarded batch ──

    @hookimpl
    def openrlhf_rollout_group(self, batch: RolloutBatch) -> None:
        if self.teacher_config.scored_by == "engine" and self.reprompt.demonstration != "random":  # of a whole batch
            rollouts = self.rollouts(batch)
            prompts = self._attach_teacher_prompts(batch, rollouts, self.teacher_contexts(batch, rollouts))
            begin_scoring(batch, prompts, scored_topk(self.distill))

    @hookimpl
    def openrlhf_rollout_batch(self, batch: RolloutBatch) -> None:
        self._prompts = None  # of the last batch
        rollouts = self.rollouts(batch)
        contexts = self.teacher_contexts(batch, rollouts)
        if self.reprompt.teacher_images is not None:
            add_teacher_images(batch, rollouts, contexts, self.reprompt.teacher_images)
        prompts = self._attach_teacher_prompts(batch, rollouts, contexts)
        if self.teacher_config.scored_by == "engine":
            batch.engine_scores = attach_engine_scores(batch, prompts, scored_topk(self.distill))[0]
        masks = self._loss_masks(batch, prompts)
        batch.attach("loss_mask", masks)
        batch.attach("reward", [torch.tensor(float("nan") if r is None else float(r)) for r in batch.rewards])
        batch.metrics.update(context_metrics(rollouts, contexts[0], self.reprompt))
        groups = {rollout.group for rollout in rollouts}
        taught = {rollout.group for rollout, context in zip(rollouts, contexts[0], strict=True) if context.active}
        batch.metrics[PREFIX + "inactive_group_fraction"] = 1.0 - len(taught) / len(groups)
        batch.metrics.update(length_metrics(batch.samples))
        self._check_batch(batch, rollouts, contexts[0])
        batch.attach_scalar("step", self.monitor.steps)
        if self.recorder is not None:
            self.recorder.choose(batch, rollouts, [own[0] if own else None for own in prompts[0]], masks)
        self._prompts = None

    def rollouts(self, batch: RolloutBatch) -> list[Rollout]:
        """Each sample as a `Rollout`: its response, reward, feedback and privileged context."""
        found: list[Rollout] = []
        tags = tags_with(self.reprompt.thinking_tags)
        for start in range(0, len(batch), TEXTS_AT_ONCE):
            numbers = range(start, min(start + TEXTS_AT_ONCE, len(batch)))
            responses = [batch.response_ids(i) for i in numbers]
            texts = response_texts(responses, batch.tokenizer, tags)
            found += [
                self._rollout(batch, i, text if ids else None)
                for i, ids, text in zip(numbers, responses, texts, strict=True)
            ]
        return found

    def _rollout(self, batch: RolloutBatch, i: int, response: str | None) -> Rollout:
        sample = batch.samples[i]
        return Rollout(
            group=batch.group(i),
            messages=batch.prompt(i),
            response=response,
            reward=batch.rewards[i],
            feedback=sample.feedback,
            privileged_context=sample.record.get(self.reprompt.privileged_key) if self._shows_privileged else None,
            turn_feedback=[turn.feedback for turn in sample.turns],
            answer=self._answer(sample, response),
        )

    def _answer(self, sample: Any, response: str | None) -> str | None:
        """The final answer of a response that ended by itself, if answers are compared."""
        if self.reprompt.demonstration != CONSENSUS or response is None or bool(sample.truncated):
            return None
        hook = plugins.active().hook
        return hook.openrlhf_answer(response=response, record=sample.record, args=self.args) or None

    def _attach_teacher_prompts(
        self, batch: RolloutBatch, rollouts: Sequence[Rollout], contexts: list[list[TeacherContext]]
    ) -> list[list[list[TeacherPrompt]]]:
        """Attach the teacher prompts to the samples, and return them by teacher context and sample.

        A sample without a token in the loss, or with a prompt that leaves no room for its response, has no teacher
        prompt; its entry in `contexts` is replaced with an inactive context.
        """
        planned = [[plan_teacher_scoring(batch, i, own) for i, own in enumerate(shown)] for shown in contexts]
        masks = self._loss_masks(batch, planned)
        self.prompts_of(batch).prepare(
            context for shown in planned for i, own in enumerate(shown) for context, positions in own
            if bool((positions & masks[i]).any())
        )  # fmt: skip
        prompts: list[list[list[TeacherPrompt]]] = []
        truncated, too_long = 0, 0
        for k, shown in enumerate(contexts):
            prompts.append([])
            for i, mask in enumerate(masks):
                made = [
                    TeacherPrompt(*self.teacher_prompt(batch, i, context, positions), positions)
                    for context, positions in planned[k][i] if bool((positions & mask).any())
                ]  # fmt: skip
                truncated += any(prompt.truncated_at for prompt in made)
                too_long += not all(prompt.ids for prompt in made)
                prompts[k].append(own := [prompt for prompt in made if prompt.ids])
                shown[i] = shown[i] if own else TeacherContext(rollouts[i].messages, False)
            attach_scoring_requests(batch, k, prompts[k], by_turn=any(context.by_turn for context in shown))
        batch.metrics[PREFIX + "truncated_fraction"] = truncated / (len(batch) * len(contexts))
        batch.metrics[PREFIX + "too_long_fraction"] = too_long / (len(batch) * len(contexts))
        return prompts

    def _loss_masks(
        self, batch: RolloutBatch, scored: Sequence[Sequence[Sequence[PlannedScoring | TeacherPrompt]]]
    ) -> list[torch.Tensor]:
        """`loss_mask` of each sample, without the turns that are not scored with every active teacher context."""
        masks: list[torch.Tensor] = []
        for of_sample in zip(*scored, strict=True):
            mask = self.loss_mask(batch, len(masks), [bool(of_context) for of_context in of_sample])
            for of_context in filter(None, of_sample):
                mask = mask & torch.stack([own.position_mask for own in of_context]).any(dim=0)
            masks.append(mask)
        return masks

    # ── monitoring ──

    def _check_batch(self, batch: RolloutBatch, rollouts: list[Rollout], contexts: list[TeacherContext]) -> None:
        """If a check is due, warn about a degenerate batch and request the context KL from the policy workers."""
        due = self.monitor.due()
        if self.diagnostics.on_collapse == "slow" and self.teacher_config.kind == "ema":
            rate = self.teacher_config.update_rate
            batch.attach_scalar("update_rate", self.monitor.slowed(rate) if due else self.monitor.in_use(rate))
        if not due:
            return
        threshold = self.reprompt.success_threshold
        failed = [rollout.reward is None or rollout.reward < threshold for rollout in rollouts]
        if any(context.sections or context.by_turn for context in contexts):  # else the context KL is 0
            self._request_context_kl(batch, failed, contexts)
        lengths = [int(sample.action_mask.sum()) for sample in batch.samples]
        batch.metrics[PREFIX + "response_length_drift"] = self.monitor.drift(sum(lengths) / len(lengths))
        left_out = sum(bool(sample.truncated) for sample in batch.samples) if self.distill.mask_truncated else 0
        for warning in self.monitor.check_batch(rollouts, contexts, left_out):
            logger.warning(warning)

    def _request_context_kl(self, batch: RolloutBatch, failed: list[bool], contexts: list[TeacherContext]) -> None:
        if batch.engine_scores is not None:
            chosen = [i for i, own in enumerate(contexts) if own.active and failed[i]][:CHECKED_SAMPLES]
            batch.metrics |= context_kl(batch, {i: self.bare_prompt_ids(batch, i) for i in chosen})
            return
        batch.attach("failed", [torch.tensor(f) for f in failed])
        if self.reprompt.chat_template_kwargs is not None:
            bare = [self.bare_prompt_ids(batch, i) if own.active else [] for i, own in enumerate(contexts)]
            batch.attach("bare_prompt", [torch.tensor(ids, dtype=torch.long) for ids in bare])

    @hookimpl
    def openrlhf_after_training_step(self, batch: RolloutBatch) -> None:
        if self.recorder is not None:
            self.recorder.write(batch)

    @hookimpl
    def openrlhf_metrics(self, status: dict[str, Any], args: Any) -> None:
        warnings = []
        if CONTEXT_KL in status and no_reward.is_rewarded(args):
            teacher = f"{args.teacher.kind}, {args.teacher.update_rate}"
            warnings = self.monitor.check_context_kl(status[CONTEXT_KL], teacher)
        status.update(self.monitor.pop_metrics())
        for warning in warnings:
            if self.diagnostics.on_collapse == "stop":
                raise StopTraining(warning)
            logger.warning(warning)

    # ── checkpoints ──

    @hookimpl
    def openrlhf_save_controller_state(self, states: dict[str, Any], args: Any) -> None:
        states[MONITOR_STATE] = self.monitor.state()

    @hookimpl
    def openrlhf_load_controller_state(self, states: dict[str, Any], args: Any) -> None:
        if MONITOR_STATE in states:
            self.monitor.restore(states[MONITOR_STATE])
        if self.recorder is not None:
            self.recorder.begin(states.get("global_step", 0))
