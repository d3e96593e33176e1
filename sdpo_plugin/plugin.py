"""Self-distillation, from a rewarded batch to a loss: read top to bottom.

On the controller the whole batch is there: who teaches whom is decided (`context.py`) and each sample's teacher
prompt is sent along with it. On every policy worker the teacher scores the sample's own response behind that prompt,
and the divergence between teacher and student (`loss.py`, computed by `fused.py`) becomes the policy's loss.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sdpo_plugin import no_reward
from sdpo_plugin.config import (
    GROUPS,
    ConfigError,
    DiagnosticsConfig,
    DistillConfig,
    RepromptConfig,
    StopTraining,
    TeacherConfig,
    chat_template_kwargs,
    from_namespace,
)
from sdpo_plugin.context import (
    FramedText,
    Messages,
    Rollout,
    TeacherContext,
    build_teacher_contexts,
    context_metrics,
    prompt_as_read,
    teacher_prompt_ids,
)
from sdpo_plugin.diagnostics import GAIN, WATCHED_SAMPLES, Watch, measure
from sdpo_plugin.fused import Head, Reweigh, Scores, linear_distillation
from sdpo_plugin.host.hookspecs import hookimpl
from sdpo_plugin.teacher import make_teacher

PREFIX = "self_distillation/"
OF_TOKENS = " of tokens"  # beside a metric: the share of the response tokens that it is a sum over
logger = logging.getLogger(__name__)

# A token counts by min(policy before the update / engine, 2) (fengyao.notion.site/off-policy-rl): what trainer and
# engine compute differs, and the samples of an asynchronous run are of an older policy besides.
TRUNCATED_IMPORTANCE_SAMPLING: dict[str, Any] = {
    "algo.advantage.is_correction_level": "token",
    "algo.advantage.is_correction_mode": "clip",
    "algo.advantage.is_correction_threshold": [0.0, 2.0],
}


@hookimpl
def openrlhf_algorithms() -> list[type]:
    from sdpo_plugin.sdft import OPSD, SDFT
    from sdpo_plugin.sdpo import SDPO

    return [SDPO, SDFT, OPSD]


@hookimpl
def openrlhf_add_arguments(parser: Any) -> None:
    from sdpo_plugin.host.cli import add_group

    for group in GROUPS:
        add_group(parser, group)


class SelfDistillation:
    """What SDPO, SDFT and their variants share. A variant overrides `defaults` and what it does differently."""

    name: str
    defaults: dict[str, Any] = {}
    corrects_rollouts = True  # by default
    watch: Watch | None = None
    first_micro_batch = True

    # ── the launcher ──

    @classmethod
    def defaults_for(cls, args: Any) -> dict[str, Any]:
        """Defaults that depend on what was asked for (OpenRLHF's nested arguments).

        At weight 0 its loss is to be its own, and behind the teacher's prompt the ratio to the engine is no error.
        """
        corrected = cls.corrects_rollouts and args.distill.weight > 0.0 and not args.distill.generate_from_teacher
        return TRUNCATED_IMPORTANCE_SAMPLING if corrected else {}

    @hookimpl
    def openrlhf_configure(self, args: Any) -> None:
        for group in GROUPS:
            from_namespace(group, args)
        self._read(args)
        refuse(args)
        if self.distill.weight == 1.0 and args.algo.kl.init_coef > 0.0 and not args.algo.kl.use_loss:
            logger.warning(
                f"--algo.kl.init_coef {args.algo.kl.init_coef}: a penalty on rewards, which nothing reads with "
                "--distill.weight 1; give --algo.kl.use_loss to hold the student to the reference model, or 0"
            )

    def _read(self, args: Any) -> None:
        self.distill: DistillConfig = from_namespace(DistillConfig, args)
        self.reprompt: RepromptConfig = from_namespace(RepromptConfig, args)
        self.teacher_config: TeacherConfig = from_namespace(TeacherConfig, args)
        self.diagnostics: DiagnosticsConfig = from_namespace(DiagnosticsConfig, args)

    # ── the controller: contexts for the whole batch ──

    @hookimpl
    def openrlhf_dataset(self, dataset: Any, evaluation: bool, args: Any) -> None:
        if evaluation:  # only students answer there
            return
        for row, record in enumerate(dataset):
            messages = record[args.data.input_key]
            if isinstance(messages, list) and (not messages or messages[-1].get("role") != "user"):
                raise ConfigError(
                    f"--data.input_key {args.data.input_key}: row {row} has no user turn at its end, which is where "
                    "the teacher's context goes; end every prompt with a user message"
                )

    @hookimpl
    def openrlhf_generation_prompt(
        self, prompt: str, record: dict[str, Any], tokenizer: Any, args: Any
    ) -> list[int] | None:
        self._read(args)
        if not self.distill.generate_from_teacher or self.distill.weight == 0.0:
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
    def openrlhf_batch(self, batch: Any) -> None:
        self._read(batch.args)
        if self.distill.weight == 0.0:
            return
        rollouts = [self.rollout(batch, i) for i in range(len(batch.samples))]
        contexts = build_teacher_contexts(rollouts, self.reprompt)
        masks = [self.loss_mask(sample, c.active) for sample, c in zip(batch.samples, contexts, strict=True)]
        prompts, truncated, too_long = [], 0, 0
        for i, mask in enumerate(masks):
            ids, cut = self.teacher_prompt(batch, i, contexts[i]) if mask.any() else ([], False)
            prompts.append(torch.tensor(ids, dtype=torch.long))
            truncated += cut
            too_long += bool(mask.any()) and not ids
        # Without a token in the loss, or a prompt that leaves room for the response, a sample has no teacher.
        contexts = [
            context if len(prompt) else TeacherContext(rollout.messages, False)
            for rollout, context, prompt in zip(rollouts, contexts, prompts, strict=True)
        ]
        masks = [mask & context.active for mask, context in zip(masks, contexts, strict=True)]
        batch.attach("teacher_prompt", prompts)
        batch.attach("loss_mask", masks)
        batch.metrics.update(context_metrics(rollouts, contexts, self.reprompt))
        groups = {rollout.group for rollout in rollouts}
        taught = {rollout.group for rollout, context in zip(rollouts, contexts, strict=True) if context.active}
        batch.metrics[PREFIX + "inactive_group_fraction"] = 1.0 - len(taught) / len(groups)
        batch.metrics[PREFIX + "truncated_fraction"] = truncated / len(contexts)
        batch.metrics[PREFIX + "too_long_fraction"] = too_long / len(contexts)
        batch.metrics.update(length_metrics(batch.samples))
        self._watch(batch, rollouts, contexts)

    def _watch(self, batch: Any, rollouts: list[Rollout], contexts: list[TeacherContext]) -> None:
        watch = self._watcher()
        due = watch.due()
        if self.diagnostics.guard == "slow" and self.teacher_config.kind == "ema":
            given = self.teacher_config.update_rate
            rate = torch.tensor(watch.slowed(given) if due else watch.in_use(given), dtype=torch.float64)
            batch.attach("update_rate", [rate] * len(rollouts))
        if not due:
            return
        threshold = self.reprompt.success_threshold
        failed = [rollout.reward is None or rollout.reward < threshold for rollout in rollouts]
        batch.attach("failed", [torch.tensor(f) for f in failed])
        lengths = [int(sample.action_mask.sum()) for sample in batch.samples]
        batch.metrics[PREFIX + "response_length_drift"] = watch.drift(sum(lengths) / len(lengths))
        left_out = sum(bool(sample.truncated) for sample in batch.samples) if self.distill.mask_truncated else 0
        for warning in watch.at_contexts(rollouts, contexts, left_out):
            logger.warning(warning)

    def _watcher(self) -> Watch:
        self.watch = self.watch or Watch(self.diagnostics, self.reprompt, self.distill)
        return self.watch

    @hookimpl
    def openrlhf_save_states(self, states: dict[str, Any], args: Any) -> None:
        if self.watch is not None:
            states[PREFIX + "watch"] = self.watch.state()

    @hookimpl
    def openrlhf_load_states(self, states: dict[str, Any], args: Any) -> None:
        self._read(args)
        if PREFIX + "watch" in states:
            self._watcher().restore(states[PREFIX + "watch"])

    def rollout(self, batch: Any, i: int) -> Rollout:
        """What sample i can teach and be taught with."""
        sample, args, ids = batch.samples[i], batch.args, batch.response_ids(i)
        return Rollout(
            group=i // args.rollout.n_samples_per_prompt,
            messages=prompt_as_read(
                prompt_messages(sample.record, args), batch.prompt_ids(i), batch.tokenizer, chat_template_kwargs(args)
            ),
            response=batch.tokenizer.decode(ids, skip_special_tokens=True) if ids else None,
            reward=batch.rewards[i],
            feedback=sample.feedback,
            privileged_context=sample.record.get(self.reprompt.privileged_key),
        )

    def teacher_prompt(self, batch: Any, i: int, context: TeacherContext) -> tuple[list[int], bool]:
        """Token ids for the teacher to read before sample i's response, and whether what they show had to be cut.

        Prompt and response together fit the model's positions. Where nothing that can be cut makes them fit: no ids.
        """
        room = batch.max_positions - len(batch.response_ids(i))
        config = replace(self.reprompt, max_len=max(min(self.reprompt.max_len, room), 1))
        ids, cut = teacher_prompt_ids(context, batch.tokenizer, config, chat_template_kwargs(batch.args))
        return (ids, cut) if len(ids) <= room else ([], False)

    def loss_mask(self, sample: Any, active: bool) -> torch.Tensor:
        """Bool [A]: response tokens of a sample with a teacher context, but for the first `skip_tokens`.

        With `mask_truncated` none of a response that OpenRLHF counts as truncated.
        """
        active = active and not (self.distill.mask_truncated and bool(sample.truncated))
        response = sample.action_mask[0].bool()
        return response & (response.cumsum(0) > self.distill.skip_tokens) & active

    # ── the policy worker: teacher, loss, update ──

    @hookimpl
    def openrlhf_model(self, actor: Any, args: Any) -> None:
        self._read(args)
        if args.ds.lora.rank > 0 and self.distill.weight > 0.0 and self.teacher_config.kind == "ema":
            actor.add_teacher_adapter()

    @hookimpl
    def openrlhf_needs(self, args: Any) -> dict[str, bool] | None:
        if args.distill.weight == 0.0:
            return None
        log_probs = host_needs_log_probs(args, args.distill.weight)
        return {
            "old_log_probs": reads_old_log_probs(args),
            "log_probs": log_probs,
            # Else the student need not read what it learns nothing from.
            "samples": log_probs or args.actor.entropy_coef is not None or args.actor.aux_loss_coef > 0.0,
        }

    @hookimpl
    def openrlhf_worker_setup(self, worker: Any) -> None:
        self._read(worker.args)
        if self.distill.weight > 0.0:
            worker.actor.tap_head()
            self.teacher = make_teacher(self.teacher_config, worker)

    @hookimpl
    def openrlhf_before_forward(self, step: Any) -> None:
        if self.distill.weight == 0.0:
            return
        batch, actor, args = step.experience, step.worker.actor, step.worker.args
        if "update_rate" in step.data:
            self.teacher.rate = float(step.data["update_rate"][0])
        differentiable = step.needs["log_probs"] or step.needs["entropy"]
        with_entropy = step.needs["entropy"] or args.actor.entropy_coef is not None
        if not step.needs["samples"]:
            step.samples = step.loss_mask.any(dim=1)
        teacher_hidden = self._teacher_hidden(step)
        look = self._look(step)
        weights = step.sample_weights if self.distill.mean == "samples" else step.loss_weights
        weights = (weights * step.loss_mask)[step.response]
        # The policy before the rollout's first update; where there is only one, the student itself.
        old_log_probs = batch.action_log_probs if reads_old_log_probs(args) else None
        reweigh = self._rollout_correction(step, old_log_probs)
        if old_log_probs is not None:
            old_log_probs = old_log_probs[step.response]

        def head(hidden: torch.Tensor, student: Head, token_ids: torch.Tensor) -> Scores:
            with self.teacher.head() as teacher:
                if look is not None:
                    tokens, without, failed = look
                    step.sums = measure(
                        hidden[tokens], student, teacher_hidden[tokens], without, teacher, token_ids[tokens], failed,
                        actor.temperature,
                    )
                return linear_distillation(
                    hidden, student, teacher_hidden, teacher, token_ids, weights, self.distill, old_log_probs,
                    actor.temperature, reweigh=reweigh, differentiable_log_probs=differentiable,
                    with_entropy=with_entropy,
                )

        step.head = head

    def _rollout_correction(self, step: Any, old_log_probs: torch.Tensor | None) -> Reweigh | None:
        """Each response token's factor by `--algo.advantage.is_correction_*`; old_log_probs [B, A] or None."""
        batch, level = step.experience, step.worker.args.algo.advantage.is_correction_level
        if level == "off":
            return None
        if batch.rollout_log_probs is None:
            raise ConfigError(
                f"--algo.advantage.is_correction_level {level}: the rollout brought no log-probabilities; give off, or "
                "an agent that returns rollout_log_probs"
            )
        if old_log_probs is not None:
            factors = step.rollout_correction(old_log_probs, batch.rollout_log_probs, batch.action_mask)[step.response]
            return lambda log_probs, rows: factors[rows]
        # The student is the old policy. It knows single tokens in the head's pass, which is all that the level needs.
        of_rollout = batch.rollout_log_probs[step.response]

        def reweigh(log_probs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            one_sample = [x[None] for x in (log_probs, of_rollout[rows], torch.ones_like(log_probs))]
            return step.rollout_correction(*one_sample)[0]

        return reweigh

    def _teacher_hidden(self, step: Any) -> torch.Tensor:
        """The teacher's hidden states [N, H] at the response tokens; zero where the loss has no use for them."""
        batch = step.experience
        sequences, attention_mask, rows, taught = teacher_inputs(
            batch.sequences, batch.attention_mask, batch.action_mask, step.data["teacher_prompt"]
        )
        hidden = self.teacher.hidden_states(sequences, attention_mask, rows, self.teacher_config.max_tokens_per_gpu)
        full = hidden.new_zeros(*batch.action_mask.shape, hidden.shape[1])
        full[taught] = hidden
        return full[step.response]

    def _look(self, step: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Of the first micro-batch of an optimizer step that is looked at: a few samples, failed ones first.

        Which of the N response tokens they have (bool [N]), the teacher's hidden states there without its context
        [n, H], and whether each token's sample failed (bool [n]).
        """
        if not self.first_micro_batch or "failed" not in step.data:
            return None
        self.first_micro_batch = False
        batch, failed = step.experience, torch.stack(step.data["failed"]).to(step.loss_mask.device)
        active = step.loss_mask.any(dim=1)
        order = sorted(active.nonzero()[:, 0].tolist(), key=lambda i: not failed[i])
        chosen = torch.zeros_like(active)
        chosen[order[: math.ceil(WATCHED_SAMPLES / step.worker.ranks)]] = True
        watched = step.loss_mask & chosen[:, None]
        own = [
            sequence[: int(response.nonzero()[0]) + 1] if here else sequence[:0]
            for sequence, response, here in zip(batch.sequences, batch.action_mask, chosen, strict=True)
        ]
        sequences, attention_mask, rows, read = teacher_inputs(
            batch.sequences, batch.attention_mask, batch.action_mask, own
        )
        hidden = self.teacher.hidden_states(sequences, attention_mask, rows, self.teacher_config.max_tokens_per_gpu)
        tokens = watched[step.response]
        return tokens, hidden[watched[read]], failed[:, None].expand_as(watched)[watched]

    @hookimpl
    def openrlhf_policy_loss(self, step: Any) -> None:
        w = self.distill.weight
        if w == 0.0:
            return
        step.loss = step.scores.loss if w == 1.0 else (1.0 - w) * step.loss + w * step.scores.loss
        tokens = step.experience.action_mask.sum().clamp(min=1)
        in_loss = step.loss_mask[step.response]
        # Sums over the micro-batch per response token: both averages have the same denominator (see metrics).
        step.metrics[PREFIX + "loss"] = torch.where(in_loss, step.scores.token_loss, 0.0).sum() / tokens
        step.metrics[PREFIX + "token_fraction"] = step.loss_mask.sum() / tokens
        step.metrics[PREFIX + "empty_target_batch"] = float(not in_loss.any())
        for name, (total, number) in step.sums.items():
            step.metrics |= {name: total / tokens, name + OF_TOKENS: number / tokens}
        if self.diagnostics.guard != "off":
            step.metrics |= self.teacher.metrics()

    @hookimpl
    def openrlhf_optimizer_step(self, worker: Any) -> None:
        if self.distill.weight > 0.0:
            self.first_micro_batch = True
            self.teacher.after_optimizer_step()

    @hookimpl
    def openrlhf_save_checkpoint(self, worker: Any, path: str) -> None:
        if self.distill.weight > 0.0:
            self.teacher.save(path)

    @hookimpl
    def openrlhf_load_checkpoint(self, worker: Any, path: str) -> None:
        if self.distill.weight > 0.0:
            self.teacher.load(path)

    @hookimpl
    def openrlhf_save_model(self, worker: Any, path: str) -> None:
        if self.distill.weight > 0.0 and self.teacher_config.save:
            worker.export(self.teacher.model, os.path.join(path, "teacher"))

    @hookimpl
    def openrlhf_metrics(self, status: dict[str, Any], args: Any) -> None:
        fraction = status.get(PREFIX + "token_fraction")
        if fraction:  # from a mean over response tokens to the mean over the tokens in the loss
            status[PREFIX + "loss"] /= fraction
        for weight in [name for name in status if name.endswith(OF_TOKENS)]:
            name, share = weight.removesuffix(OF_TOKENS), status.pop(weight)
            total = status.pop(name)
            if share:
                status[name] = total / share
        if self.watch is not None and GAIN in status and rewarded(args):
            for warning in self.watch.at_gain(status[GAIN], f"{args.teacher.kind}, {args.teacher.update_rate}"):
                if args.diagnostics.guard == "stop":
                    raise StopTraining(warning)
                logger.warning(warning)


def prompt_messages(record: dict[str, Any], args: Any) -> Messages:
    """The data-set row's chat, or its text in the frame of `--data.input_template`."""
    prompt = record[args.data.input_key]
    if args.data.apply_chat_template:
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not args.data.input_template:
        return prompt
    before, after = args.data.input_template.format("\0").split("\0")
    return FramedText(before, prompt, after)


def length_metrics(samples: Sequence[Any]) -> dict[str, float]:
    """Numbers of sampled tokens, and of those responses that ended before the length limit; their mean OpenRLHF logs.

    Names and meaning as TRL's `completions/min_length` and `completions/mean_terminated_length`.
    """
    lengths = [int(sample.action_mask.sum()) for sample in samples]
    metrics = {"response_length_min": min(lengths), "response_length_max": max(lengths)}
    ended = [n for n, sample in zip(lengths, samples, strict=True) if n and not sample.truncated]
    if ended:
        metrics |= {
            "terminated_length_mean": statistics.mean(ended), "terminated_length_min": min(ended),
            "terminated_length_max": max(ended),
        }  # fmt: skip
    return {PREFIX + name: float(value) for name, value in metrics.items()}


def teacher_inputs(
    sequences: torch.Tensor,
    attention_mask: torch.Tensor,
    action_mask: torch.Tensor,
    teacher_prompts: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The samples that have a teacher prompt, with it in place of their own.

    Everything behind the student's prompt is replayed as it is, so response tokens keep their order and number. If
    no sample has a teacher prompt, two tokens stand in: other ranks may wait for this one (ZeRO-3).

    Args:
        sequences, attention_mask: [B, S], right-padded. action_mask: [B, A]. teacher_prompts: B of int64 [P_i].

    Returns:
        sequences, attention_mask [B', S'], rows bool [B', S'] of the N' positions that predict response tokens, and
        bool [B, A], which of the micro-batch's action positions those are.
    """
    response = action_mask.bool()
    chosen = [i for i, prompt in enumerate(teacher_prompts) if len(prompt)]
    taught = torch.zeros_like(response)
    taught[chosen] = response[chosen]
    if not chosen:
        stand_in = sequences[:1, :2]
        return stand_in, torch.ones_like(stand_in), torch.zeros_like(stand_in, dtype=torch.bool), taught
    replayed, positions = [], []
    for i in chosen:
        length = int(attention_mask[i].sum())
        first = int(response[i].nonzero()[0]) + 1  # action position p predicts token p + 1
        prompt = teacher_prompts[i]
        replayed.append(torch.cat([prompt, sequences[i, first:length]]))
        positions.append(response[i].nonzero()[:, 0] - first + len(prompt))
    pad = torch.nn.utils.rnn.pad_sequence
    batch = pad(replayed, batch_first=True)
    mask = pad([torch.ones_like(r) for r in replayed], batch_first=True)
    rows = torch.zeros_like(batch, dtype=torch.bool)
    for row, at in zip(rows, positions, strict=True):
        row[at] = True
    return batch, mask, rows, taught


def rewarded(args: Any) -> bool:
    """Whether rewards say anything about the samples; without, all count as failed, and some must not be."""
    return args.reward.remote_url != [os.path.abspath(no_reward.__file__)]


def host_needs_log_probs(args: Any, weight: float) -> bool:
    """Whether any of the host's own loss terms backpropagates through the student's log-probabilities."""
    return weight < 1.0 or args.algo.kl.use_loss or bool(args.actor.entropy_coef)


def reads_old_log_probs(args: Any) -> bool:
    """Whether anything needs log-probabilities from before the update that the student's own cannot stand in for."""
    samples = args.rollout.batch_size * args.rollout.n_samples_per_prompt
    several_updates = args.train.max_epochs > 1 or args.train.batch_size < samples
    of_whole_samples = args.algo.advantage.is_correction_level == "seq"
    return args.distill.weight < 1.0 or args.algo.kl.init_coef > 0.0 or several_updates or of_whole_samples


def refuse(args: Any) -> None:
    """Stop, before anything loads, where self-distillation and the host's options do not go together yet."""
    if args.distill.weight == 0.0:
        return
    if args.distill.generate_from_teacher and "{privileged_context}" not in args.reprompt.template:
        raise ConfigError(
            "--distill.generate_from_teacher True: before a rollout only the data set's context is known; name "
            "{privileged_context} in --reprompt.template, or use --algo sdft"
        )
    if args.distill.generate_from_teacher and args.algo.advantage.is_correction_level != "off":
        raise ConfigError(
            f"--algo.advantage.is_correction_level {args.algo.advantage.is_correction_level}: with "
            "--distill.generate_from_teacher the engine's log-probabilities are those of another prompt, and the "
            "correction would take the samples' point away; give off"
        )
    if args.teacher.save and args.teacher.kind != "ema":
        raise ConfigError(
            f"--teacher.save True: a {args.teacher.kind} teacher is made of the initial and the final model, nothing "
            "else is there to save; leave it out, or train with --teacher.kind ema"
        )
    if args.train.enable_ema and args.ds.lora.rank > 0:
        raise ConfigError(
            f"--train.enable_ema with --ds.lora.rank {args.ds.lora.rank}: OpenRLHF averages weights by their position, "
            "which adapters change; leave it out (the average that teaches is --teacher.kind ema)"
        )
    correction = args.algo.advantage
    if correction.is_correction_mode == "clip" and (
        correction.is_correction_level == "seq" or correction.is_correction_gating != "ratio"
    ):
        raise ConfigError(
            f"--algo.advantage.is_correction_level {correction.is_correction_level}, --algo.advantage."
            f"is_correction_gating {correction.is_correction_gating}: only the ratio of a token can be clipped, which "
            f"--algo {args.algo.name} does by default; give --algo.advantage.is_correction_mode mask, too"
        )
    for flag, asked, fix in (
        ("--ds.ring_attn_size", args.ds.ring_attn_size > 1, "give --ds.ring_attn_size 1"),
        ("--ds.tensor_parallel_size", args.ds.tensor_parallel_size > 1, "give --ds.tensor_parallel_size 1"),
        ("--data.max_images_per_prompt", args.data.max_images_per_prompt > 0, "use a text model"),
        ("--ds.deepcompile", args.ds.deepcompile, "leave it out"),
        ("--ds.enable_sleep", args.ds.enable_sleep, "leave it out"),
    ):
        if asked:
            raise ConfigError(f"{flag} is not supported with --algo {args.algo.name} yet; {fix}")
