"""Self-distillation, from a rewarded batch to a loss: read top to bottom.

On the controller the whole batch is there: who teaches whom is decided (`context.py`) and each sample's teacher
prompt is sent along with it. On every policy worker the teacher scores the sample's own response behind that prompt,
and the divergence between teacher and student (`loss.py`, computed by `fused.py`) becomes the policy's loss.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from sdpo_plugin.algorithms import no_reward
from sdpo_plugin.algorithms.compatibility import (
    policy_loss_needs_log_probs,
    reads_old_log_probs,
    refuse,
    require_same_tokenizer,
)
from sdpo_plugin.algorithms.teacher import EmaTeacher, Teacher, make_teacher
from sdpo_plugin.config import (
    ConfigError,
    DiagnosticsConfig,
    DistillConfig,
    Group,
    RepromptConfig,
    StopTraining,
    TeacherConfig,
    chat_template_kwargs,
    from_namespace,
)
from sdpo_plugin.distillation.context import (
    Cuts,
    Rollout,
    TeacherContext,
    build_teacher_contexts,
    context_metrics,
    teacher_prompt_ids,
)
from sdpo_plugin.distillation.fused import Head, Scores, TeacherStates, linear_distillation, of_one_size
from sdpo_plugin.distillation.loss import Tokens, loss_from_log_probs
from sdpo_plugin.distillation.prompts import require_user_text
from sdpo_plugin.distillation.thinking import response_text, tags_with
from sdpo_plugin.hookspecs import hookimpl
from sdpo_plugin.interface.micro_batch import MicroBatch, Read, RolloutBatch, Worker, prompt_messages, teacher_inputs
from sdpo_plugin.monitoring.collapse import GAIN, WATCHED_SAMPLES, Watch, length_metrics, measure
from sdpo_plugin.monitoring.recorder import Recorder, tell

PREFIX = "self_distillation/"
logger = logging.getLogger(__name__)

# A token counts by min(policy before the update / engine, 2) (fengyao.notion.site/off-policy-rl): what trainer and
# engine compute differs, and the samples of an asynchronous run are of an older policy besides.
TRUNCATED_IMPORTANCE_SAMPLING: dict[str, Any] = {
    "algo.advantage.is_correction_level": "token",
    "algo.advantage.is_correction_mode": "clip",
    "algo.advantage.is_correction_threshold": [0.0, 2.0],
}


def numbered(name: str, k: int) -> str:
    """Of teacher context k, from 0: the first has no number."""
    return f"{name}/{k}" if k else name


def scored_behind(batch: RolloutBatch, i: int, context: TeacherContext) -> list[tuple[TeacherContext, torch.Tensor]]:
    """What the teacher is to read of sample i: each distinct context, and its action positions (bool [A_i])."""
    response = batch.response_mask(i)
    if not context.by_turn:
        return [(context, response)] if context.active else []
    found: dict[int, tuple[TeacherContext, torch.Tensor]] = {}
    for number, turn in enumerate(batch.samples[i].turns):
        if (own := context.of_turn(number)) is not None:
            _, at = found.setdefault(id(own), (own, torch.zeros_like(response)))
            at[turn.start : turn.stop] = True
    return list(found.values())


def attach_reads(
    batch: RolloutBatch, k: int, reads: Sequence[Sequence[tuple[list[int], torch.Tensor]]], by_turn: bool
) -> None:
    """Send along what the teacher reads of each sample: prompts, and the action positions (bool [A_i]) behind each.

    `teacher_prompt` are a sample's prompts, one after the other (int64 [P_i]). Where turns are scored apart,
    `teacher_spans` says where in it the prompt of each action position begins and ends (int64 [A_i, 2]; 0, 0: none).
    """
    prompts = [torch.tensor([token for ids, _ in own for token in ids], dtype=torch.long) for own in reads]
    batch.attach(numbered("teacher_prompt", k), prompts)
    if by_turn:
        every_span = []
        for i, own in enumerate(reads):
            spans, begin = torch.zeros(len(batch.response_mask(i)), 2, dtype=torch.long), 0
            for ids, at in own:
                spans[at] = torch.tensor([begin, begin := begin + len(ids)])
            every_span.append(spans)
        batch.attach(numbered("teacher_spans", k), every_span)


def teacher_reads(micro_batch: MicroBatch) -> list[list[Read]]:
    """Of each teacher context, what `attach_reads` sent along."""
    action_mask = micro_batch.experience.action_mask.bool()
    found: list[list[Read]] = []
    names = (numbered("teacher_prompt", k) for k in itertools.count())
    for k, name in enumerate(itertools.takewhile(micro_batch.data.__contains__, names)):
        found.append(reads := [])
        spans = micro_batch.data.get(numbered("teacher_spans", k))
        for i, prompts in enumerate(micro_batch.data[name]):
            if spans is None:
                reads += [Read(i, prompts, action_mask[i])] if len(prompts) else []
                continue
            for begin, end in spans[i].unique(dim=0).tolist():
                if end:
                    at = torch.zeros_like(action_mask[i])
                    at[: len(spans[i])] = spans[i][:, 1] == end
                    reads.append(Read(i, prompts[begin:end], at))
    return found


class SelfDistillation:
    """What SDPO, SDFT and their variants share: a variant overrides the choices in which it differs.

    One is made in each process of a run, with OpenRLHF's nested arguments. At `--distill.weight 0` none is: the run is
    OpenRLHF's own.

    Attributes:
        name: of `--algo`.
        defaults: what replaces OpenRLHF's and the option groups' defaults, by dotted flag name.
        options: the variant's own flag groups; `self.PREFIX` is the instance with the values given.
        corrects_rollouts: whether `--algo.advantage.is_correction_*` are those of truncated importance sampling, if
            nothing else is said.
        needs_reward: whether there must be a reward; else OpenRLHF, which insists on one, is given zeros.
        mixes: whether `--distill.weight` between 0 and 1 has a meaning; not where `join` has weights of its own.
    """

    name: str
    defaults: dict[str, Any] = {}
    options: tuple[type[Group], ...] = ()
    corrects_rollouts = True
    needs_reward = True
    mixes = True

    def __init__(self, args: Any) -> None:
        self.args = args
        self.distill: DistillConfig = from_namespace(DistillConfig, args)
        self.reprompt: RepromptConfig = from_namespace(RepromptConfig, args)
        self.teacher_config: TeacherConfig = from_namespace(TeacherConfig, args)
        self.diagnostics: DiagnosticsConfig = from_namespace(DiagnosticsConfig, args)
        for group in self.options:
            setattr(self, group.prefix, from_namespace(group, args))
        self.watch = Watch(self.diagnostics, self.reprompt, self.uses_policy_loss)
        self.recorder = Recorder(args) if self.diagnostics.samples else None
        self.first_micro_batch = True

    # ── the choices of a paper ──

    def contexts(self, batch: RolloutBatch, rollouts: Sequence[Rollout]) -> list[list[TeacherContext]]:
        """Who is shown what: for each teacher context, one `TeacherContext` per sample. Here there is one."""
        return [build_teacher_contexts(rollouts, self.reprompt)]

    def loss_mask(self, batch: RolloutBatch, i: int, active: Sequence[bool]) -> torch.Tensor:
        """Which tokens count: bool [A_i] over sample i's action positions. `active`: which of its contexts are.

        Here the response tokens of a sample with a teacher context, but for the first `skip_tokens`; with
        `mask_truncated` none of a response that OpenRLHF counts as truncated.
        """
        left_out = not all(active) or (self.distill.mask_truncated and bool(batch.samples[i].truncated))
        response = batch.response_mask(i)
        return response & (response.cumsum(0) > self.distill.skip_tokens) & (not left_out)

    # How much each token counts is 1, but in a variant that defines a method `token_weights(tokens)`: [r], without a
    # gradient. The mean's denominator does not change; `normalizes_token_weights` divides them by their mean over the
    # distilled tokens of the micro-batch.
    token_weights: Callable[[Tokens], torch.Tensor] | None = None
    normalizes_token_weights = False

    # A variant that has the teacher decide how much of its sample's advantage a token gets defines a method
    # `token_advantages(log_probs, teacher_log_probs, data)`: of the N sampled tokens the student's log-probabilities
    # [N], those of each teacher context [K, N] (0 where `data["in_loss"]` is not), and `token_data`; returns what
    # OpenRLHF's policy loss takes for advantages, [N].
    token_advantages: Callable[..., torch.Tensor] | None = None

    def token_loss(self, student: torch.Tensor, teacher: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """The loss of each token, [r], from the log-probabilities of the student and of its first teacher, [r, V] each.

        Those of further teacher contexts are in `tokens.teachers`.
        """
        return loss_from_log_probs(student, teacher, tokens.ids, self.distill, tokens.get("old_log_probs"))

    def make_teacher(self, worker: Worker) -> Teacher:
        """Whose weights teach."""
        return make_teacher(self.teacher_config, worker)

    def join(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Each sample's weight in OpenRLHF's policy loss and in the distillation, [B] and [B], both >= 0."""
        ones = torch.ones(len(micro_batch.experience.sequences), device=micro_batch.experience.sequences.device)
        return (1.0 - self.distill.weight) * ones, self.distill.weight * ones

    @property
    def uses_policy_loss(self) -> bool:
        """Whether OpenRLHF's policy loss has any part in the loss; else its log-probabilities need no gradient."""
        return self.distill.weight < 1.0

    @cached_property
    def reads_old_log_probs(self) -> bool:
        return reads_old_log_probs(self.args, self.uses_policy_loss)

    # ── the launcher ──

    @classmethod
    def acts(cls, args: Any) -> bool:
        return args.distill.weight > 0.0

    @classmethod
    def defaults_for(cls, args: Any) -> dict[str, Any]:
        """Defaults that depend on what was asked for.

        At weight 0 OpenRLHF's loss is to be its own, and behind the teacher's prompt the ratio to the engine is no
        error.
        """
        corrected = cls.corrects_rollouts and cls.acts(args) and not args.distill.generate_from_teacher
        found = dict(TRUNCATED_IMPORTANCE_SAMPLING) if corrected else {}
        if not cls.needs_reward:
            reward = args.reward.remote_url or args.reward.model_name_or_path or args.train.agent_func_path
            found |= {} if reward else {"reward.remote_url": no_reward.PATH}
        return found

    @hookimpl
    def openrlhf_configure(self, args: Any) -> None:
        refuse(args)
        if self.recorder is not None and not args.logger.tensorboard_dir:
            self.diagnostics.fail("samples", "they are written beside the event files; give --logger.tensorboard_dir")
        if self.teacher_config.model_name_or_path is not None:
            require_same_tokenizer(args.actor.model_name_or_path, self.teacher_config.model_name_or_path)
        if not self.mixes and self.distill.weight != 1.0:
            raise ConfigError(
                f"--distill.weight {self.distill.weight}: --algo {self.name} joins OpenRLHF's policy loss in its own "
                "way; give 1, or 0 for OpenRLHF alone"
            )
        if not self.uses_policy_loss and args.algo.kl.init_coef > 0.0 and not args.algo.kl.use_loss:
            logger.warning(
                f"--algo.kl.init_coef {args.algo.kl.init_coef}: a penalty on rewards, which nothing reads with "
                "--distill.weight 1; give --algo.kl.use_loss to hold the student to the reference model, or 0"
            )

    # ── the controller: contexts for the whole batch ──

    @hookimpl
    def openrlhf_dataset(self, dataset: Any, evaluation: bool, args: Any) -> None:
        if evaluation:  # only students answer there
            return
        key = args.data.input_key
        for row, prompt in enumerate(dataset[key]):
            require_user_text(f"--data.input_key {key}: row {row}", prompt)
        if "{privileged_context}" in self.reprompt.template and self.reprompt.privileged_key in dataset.column_names:
            for row, shown in enumerate(dataset[self.reprompt.privileged_key]):
                if not isinstance(shown, str | None):
                    raise ConfigError(
                        f"--reprompt.privileged_key {self.reprompt.privileged_key}: row {row} has "
                        f"{type(shown).__name__} there, {shown!r:.80}; the teacher reads text: write it out, by "
                        "json.dumps(...) for a structure, and null where there is none"
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
        ids, _ = teacher_prompt_ids(context, tokenizer, self.reprompt, chat_template_kwargs(args))
        room = args.data.max_len - (args.rollout.max_new_tokens or 1)
        if len(ids) > room:
            raise ConfigError(
                f"--distill.generate_from_teacher: a teacher's prompt of {len(ids)} tokens leaves no room for a "
                f"response; give --data.max_len {args.data.max_len + len(ids) - room} or a smaller --reprompt.max_len"
            )
        return ids

    @hookimpl
    def openrlhf_needs(self, args: Any) -> dict[str, bool]:
        log_probs = self.uses_policy_loss or policy_loss_needs_log_probs(args)
        return {
            "old_log_probs": self.reads_old_log_probs,
            "log_probs": log_probs,
            # Else the student need not read what it learns nothing from.
            "samples": log_probs or args.actor.entropy_coef is not None or args.actor.aux_loss_coef > 0.0,
        }

    @hookimpl
    def openrlhf_batch(self, batch: RolloutBatch) -> None:
        every = range(len(batch))
        rollouts = [self.rollout(batch, i) for i in every]
        contexts = self.contexts(batch, rollouts)
        wanted = [[scored_behind(batch, i, shown[i]) for i in every] for shown in contexts]
        masks = self._loss_masks(batch, wanted)
        reads: list[list[list[tuple[list[int], torch.Tensor]]]] = []
        first_reads: list[tuple[list[int], Cuts] | None] = []
        truncated, too_long = 0, 0
        for k, shown in enumerate(contexts):
            reads.append([])
            for i in every:
                asked = [(context, at) for context, at in wanted[k][i] if bool((at & masks[i]).any())]
                prompts = [self.teacher_prompt(batch, i, context, at) for context, at in asked]
                truncated += any(cuts for _, cuts in prompts)
                if k == 0:
                    first_reads.append(next((prompt for prompt in prompts if prompt[0]), None))
                too_long += not all(ids for ids, _ in prompts)
                reads[k].append([(ids, at) for (ids, _), (_, at) in zip(prompts, asked, strict=True) if ids])
                # Without a token in the loss, or a prompt that leaves room for the response, a sample has no teacher.
                shown[i] = shown[i] if reads[k][i] else TeacherContext(rollouts[i].messages, False)
            attach_reads(batch, k, reads[k], by_turn=any(context.by_turn for context in shown))
        masks = self._loss_masks(batch, reads)
        batch.attach("loss_mask", masks)
        batch.attach("reward", [torch.tensor(float("nan") if r is None else float(r)) for r in batch.rewards])
        batch.metrics.update(context_metrics(rollouts, contexts[0], self.reprompt))
        groups = {rollout.group for rollout in rollouts}
        taught = {rollout.group for rollout, context in zip(rollouts, contexts[0], strict=True) if context.active}
        batch.metrics[PREFIX + "inactive_group_fraction"] = 1.0 - len(taught) / len(groups)
        batch.metrics[PREFIX + "truncated_fraction"] = truncated / (len(batch) * len(contexts))
        batch.metrics[PREFIX + "too_long_fraction"] = too_long / (len(batch) * len(contexts))
        batch.metrics.update(length_metrics(batch.samples))
        self._watch(batch, rollouts, contexts[0])
        batch.attach_scalar("step", self.watch.steps)
        if self.recorder is not None:
            self.recorder.choose(batch, rollouts, first_reads, masks)

    def _loss_masks(
        self, batch: RolloutBatch, reads: Sequence[Sequence[Sequence[tuple[Any, torch.Tensor]]]]
    ) -> list[torch.Tensor]:
        """Of each sample, `loss_mask` without the turns that a teacher of the sample does not score."""
        masks: list[torch.Tensor] = []
        for own in zip(*reads, strict=True):
            mask = self.loss_mask(batch, len(masks), [bool(of_context) for of_context in own])
            for of_context in filter(None, own):
                mask = mask & torch.stack([at for _, at in of_context]).any(dim=0)
            masks.append(mask)
        return masks

    def _watch(self, batch: RolloutBatch, rollouts: list[Rollout], contexts: list[TeacherContext]) -> None:
        due = self.watch.due()
        if self.diagnostics.guard == "slow" and self.teacher_config.kind == "ema":
            given = self.teacher_config.update_rate
            batch.attach_scalar("update_rate", self.watch.slowed(given) if due else self.watch.in_use(given))
        if not due:
            return
        threshold = self.reprompt.success_threshold
        failed = [rollout.reward is None or rollout.reward < threshold for rollout in rollouts]
        if any(context.sections or context.by_turn for context in contexts):  # else there is no effect to watch
            batch.attach("failed", [torch.tensor(f) for f in failed])
        lengths = [int(sample.action_mask.sum()) for sample in batch.samples]
        batch.metrics[PREFIX + "response_length_drift"] = self.watch.drift(sum(lengths) / len(lengths))
        left_out = sum(bool(sample.truncated) for sample in batch.samples) if self.distill.mask_truncated else 0
        for warning in self.watch.at_contexts(rollouts, contexts, left_out):
            logger.warning(warning)

    @hookimpl
    def openrlhf_trained(self, batch: RolloutBatch) -> None:
        if self.recorder is not None:
            self.recorder.write(batch)

    @hookimpl
    def openrlhf_save_states(self, states: dict[str, Any], args: Any) -> None:
        states[PREFIX + "watch"] = self.watch.state()

    @hookimpl
    def openrlhf_load_states(self, states: dict[str, Any], args: Any) -> None:
        if PREFIX + "watch" in states:
            self.watch.restore(states[PREFIX + "watch"])
        if self.recorder is not None:
            self.recorder.begin(states.get("global_step", 0))

    def rollout(self, batch: RolloutBatch, i: int) -> Rollout:
        """What sample i can teach and be taught with."""
        sample, ids = batch.samples[i], batch.response_ids(i)
        return Rollout(
            group=batch.group(i),
            messages=batch.prompt(i),
            response=response_text(ids, batch.tokenizer, tags_with(self.reprompt.thinking_tags)) if ids else None,
            reward=batch.rewards[i],
            feedback=sample.feedback,
            privileged_context=sample.record.get(self.reprompt.privileged_key),
            turn_feedback=[turn.feedback for turn in sample.turns],
        )

    def teacher_prompt(
        self, batch: RolloutBatch, i: int, context: TeacherContext, at: torch.Tensor
    ) -> tuple[list[int], Cuts]:
        """Token ids for the teacher to read before sample i's response, and what was cut from them.

        at: bool [A_i], the action positions that are scored behind them. Prompt and response, as far as the last of
        these, fit the model's positions together. Where nothing that can be cut makes them fit: no ids.
        """
        replayed = int(at.nonzero()[-1] - batch.response_mask(i).nonzero()[0]) + 1
        room = batch.max_positions - replayed
        config = replace(self.reprompt, max_len=int(max(min(self.reprompt.max_len, room), 1)))
        ids, cuts = teacher_prompt_ids(context, batch.tokenizer, config, chat_template_kwargs(batch.args))
        return (ids, cuts) if len(ids) <= room else ([], {})

    # ── the policy worker: teacher, loss, update ──

    @hookimpl
    def openrlhf_model(self, actor: Any, args: Any) -> None:
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
    def openrlhf_before_forward(self, micro_batch: MicroBatch) -> None:
        if "update_rate" in micro_batch.scalars:
            self.teacher.rate = micro_batch.scalars["update_rate"]
        needs, temperature = micro_batch.needs, micro_batch.worker.actor.temperature
        if not needs["samples"]:
            micro_batch.samples = micro_batch.loss_mask.any(dim=1)
        taught = [self._teacher_hidden(micro_batch, reads) for reads in teacher_reads(micro_batch)]
        watched = self._watched(micro_batch)
        policy_weights, shares = self.join(micro_batch)
        if self.uses_policy_loss:
            micro_batch.policy_weights = policy_weights
        mean = micro_batch.sample_weights if self.distill.mean == "samples" else micro_batch.loss_weights
        weights = micro_batch.per_token(mean * micro_batch.loss_mask * shares[:, None])
        distilled, data = weights != 0, self.token_data(micro_batch)
        token_weights = torch.ones_like(weights)
        sampled = torch.zeros(len(taught), len(weights), device=weights.device)  # log-probabilities by the teachers
        correction = self._rollout_correction(micro_batch)

        def objective(tokens: Tokens) -> torch.Tensor:
            if type(self).token_loss is SelfDistillation.token_loss:  # which can do without whole distributions
                loss = tokens.divergence(self.distill)
            else:
                loss = self.token_loss(tokens.student, tokens.teachers[0], tokens)
            if self.token_weights is not None:
                token_weights[tokens.rows] = factor = self.token_weights(tokens).detach()
                loss = loss * factor
            if self.token_advantages is not None:
                sampled[:, tokens.rows] = tokens.sampled_by_teachers
            return loss if correction is None else loss * correction(tokens)

        def head(hidden: torch.Tensor, student: Head, token_ids: torch.Tensor) -> Scores:
            with self.teacher.head() as teacher:
                student, teacher = of_one_size(student, teacher)
                if watched is not None:
                    tokens, without, failed = watched
                    looks = measure(
                        hidden[tokens], student, taught[0][tokens], without, teacher, token_ids[tokens], failed,
                        temperature,
                    )
                    for name, (total, count) in looks.items():
                        micro_batch.mean(name, total, count)
                scores = linear_distillation(
                    hidden, student, [TeacherStates(states, teacher) for states in taught], token_ids, weights,
                    objective, data=data, temperature=temperature,
                    read=data["in_loss"] if self.token_advantages is not None else None,
                    differentiable_log_probs=needs["log_probs"] or needs["entropy"],
                    with_entropy=needs["entropy"] or self.args.actor.entropy_coef is not None,
                )
                # Before the rollout's first update; where there is only one, that is the student itself.
                before = data.get("old_log_probs", scores.log_probs).detach()
                tell(micro_batch, before, TeacherStates(taught[0], teacher), token_ids, data["active"], temperature)
            micro_batch.mean(PREFIX + "loss", scores.token_loss[distilled].sum(), distilled.sum())
            if self.token_weights is not None:  # not where a rank has weighed some: all ranks must report alike
                micro_batch.mean(PREFIX + "token_weight", token_weights[distilled].sum(), distilled.sum())
            if self.normalizes_token_weights and distilled.any():
                scores = replace(scores, loss=scores.loss / token_weights[distilled].mean())
            if self.token_advantages is not None:
                micro_batch.advantages = self._advantages(micro_batch, scores.log_probs.detach(), sampled, data)
            return scores

        micro_batch.head = head

    def token_data(self, micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
        """What is known of the N tokens besides their distributions, [N] each; a variant may add to it.

        `position` in the response, `reward` of the sample, `advantage` by OpenRLHF's estimator, `step` (number of the
        rollout batch, from 1), `old_log_probs` where a rollout makes several updates, whether the token is `in_loss`
        (the loss mask), and whether it is scored behind the teacher context: `active`, of further ones `active/1`, ...
        """
        batch, active = micro_batch.experience, {}
        for k, reads in enumerate(teacher_reads(micro_batch)):
            active[numbered("active", k)] = scored = torch.zeros_like(batch.action_mask, dtype=torch.bool)
            for i, _, at in reads:
                scored[i] |= at
        found = active | {
            "in_loss": micro_batch.loss_mask,
            "position": batch.action_mask.cumsum(dim=1) - 1,
            "step": torch.full((len(batch.sequences),), micro_batch.scalars.get("step", 0.0)),
            "advantage": batch.advantages,
            "reward": torch.stack(micro_batch.data["reward"]) if "reward" in micro_batch.data else None,
            # The policy before the rollout's first update; where there is only one, the student itself.
            "old_log_probs": batch.action_log_probs if self.reads_old_log_probs else None,
        }  # fmt: skip
        return {name: micro_batch.per_token(values) for name, values in found.items() if values is not None}

    def _advantages(
        self, micro_batch: MicroBatch, log_probs: torch.Tensor, sampled: torch.Tensor, data: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """[B, A]: those of `token_advantages` at the response tokens."""
        assert self.token_advantages is not None
        own = micro_batch.experience.advantages
        return own.masked_scatter(micro_batch.response, self.token_advantages(log_probs, sampled, data).to(own.dtype))

    def _rollout_correction(self, micro_batch: MicroBatch) -> Callable[[Tokens], torch.Tensor] | None:
        """Each token's factor by `--algo.advantage.is_correction_*`, [r]; None: 1."""
        batch, level = micro_batch.experience, self.args.algo.advantage.is_correction_level
        if level == "off":
            return None
        if batch.rollout_log_probs is None:
            raise ConfigError(
                f"--algo.advantage.is_correction_level {level}: the rollout brought no log-probabilities; give off, or "
                "an agent that returns rollout_log_probs"
            )
        if self.reads_old_log_probs:
            factors = micro_batch.per_token(
                micro_batch.rollout_correction(batch.action_log_probs, batch.rollout_log_probs, batch.action_mask)
            )
            return lambda tokens: factors[tokens.rows]
        # The student is the old policy. It knows single tokens in the head's pass, which is all that the level needs.
        of_rollout = micro_batch.per_token(batch.rollout_log_probs)

        def correction(tokens: Tokens) -> torch.Tensor:
            student = tokens.log_probs.detach()
            one_sample = [x[None] for x in (student, of_rollout[tokens.rows], torch.ones_like(student))]
            return micro_batch.rollout_correction(*one_sample)[0]

        return correction

    def _teacher_hidden(self, micro_batch: MicroBatch, reads: Sequence[Read]) -> torch.Tensor:
        """A teacher's hidden states [N, H] at the response tokens; zero where the loss has no use for them."""
        batch = micro_batch.experience
        *inputs, scored = teacher_inputs(batch.sequences, batch.action_mask, reads)
        hidden = self.teacher.hidden_states(*inputs, self.teacher_config.max_tokens_per_gpu)
        full = hidden.new_zeros(*batch.action_mask.shape, hidden.shape[1])
        full[scored] = hidden
        return full[micro_batch.response]

    def _watched(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Of the first micro-batch of an optimizer step that is looked at: a few samples, failed ones first.

        Which of the N response tokens they have (bool [N]), the teacher's hidden states there without its context
        [n, H], and whether each token's sample failed (bool [n]).
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
        chosen[order[: math.ceil(WATCHED_SAMPLES / micro_batch.worker.ranks)]] = True
        watched = micro_batch.loss_mask & chosen[:, None]
        own = [
            Read(i, batch.sequences[i, : int(batch.action_mask[i].nonzero()[0]) + 1], watched[i])
            for i in chosen.nonzero()[:, 0].tolist()
        ]
        tokens = watched[micro_batch.response]
        without = self._teacher_hidden(micro_batch, own)[tokens]
        return tokens, without, failed[:, None].expand_as(watched)[watched]

    @hookimpl
    def openrlhf_policy_loss(self, micro_batch: MicroBatch) -> None:
        own, scores = micro_batch.loss, micro_batch.scores
        assert own is not None and scores is not None
        micro_batch.loss = own + scores.loss if self.uses_policy_loss else scores.loss
        in_loss, tokens = micro_batch.loss_mask.sum(), micro_batch.experience.action_mask.sum()
        micro_batch.mean(PREFIX + "token_fraction", in_loss, tokens)
        micro_batch.metrics[PREFIX + "empty_target_batch"] = float(in_loss == 0)
        if self.diagnostics.guard != "off":
            micro_batch.metrics |= self.teacher.metrics()

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
            assert isinstance(self.teacher, EmaTeacher)  # `compatibility.refuse`
            self.teacher.model.export(os.path.join(path, "teacher"))

    @hookimpl
    def openrlhf_metrics(self, status: dict[str, Any], args: Any) -> None:
        warnings = []
        if GAIN in status and no_reward.is_rewarded(args):
            warnings = self.watch.at_gain(status[GAIN], f"{args.teacher.kind}, {args.teacher.update_rate}")
        status.update(self.watch.handed_over())
        for warning in warnings:
            if self.diagnostics.guard == "stop":
                raise StopTraining(warning)
            logger.warning(warning)
