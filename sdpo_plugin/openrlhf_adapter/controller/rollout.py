"""From a data-set row to a rewarded sample: on the controller, which sees the whole batch, without rank arithmetic."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import ray
import torch
from transformers import AutoConfig

from sdpo_plugin import plugins
from sdpo_plugin.config import RewardConfig, from_namespace
from sdpo_plugin.distillation.chat_arguments import chat_template_kwargs
from sdpo_plugin.distillation.prompts import rendered, text_tokenizer
from sdpo_plugin.interface.rollout_batch import RolloutBatch, SentRow, TeacherEngines, Turn, prompt_messages
from sdpo_plugin.interface.transport import attached_loss_mask
from sdpo_plugin.monitoring import masking
from sdpo_plugin.openrlhf_adapter.engine import deterministic
from sdpo_plugin.openrlhf_adapter.engine.agents import MAX_TOKENS, MAX_TURNS
from sdpo_plugin.openrlhf_adapter.engine.calls import FAILURE, FEEDBACK, LIMIT, TURN_FEEDBACK
from sdpo_plugin.openrlhf_adapter.engine.engine import REQUEST, Prompt, Request
from sdpo_plugin.openrlhf_adapter.failures import RewardError
from sdpo_plugin.openrlhf_adapter.patch_points import overrides, patch_point

_TRAINER = "openrlhf.trainer.ppo_trainer"
_PromptDataset: Any = patch_point(f"{_TRAINER}:PromptDataset")
_SamplesGenerator: Any = patch_point(f"{_TRAINER}:SamplesGenerator")
_ExperienceMaker: Any = patch_point(f"{_TRAINER}:RemoteExperienceMaker")
logger = logging.getLogger(__name__)


class PromptDataset(_PromptDataset):
    """datasets/prompts_dataset.py: keeps the rows whose other columns OpenRLHF drops.

    OpenRLHF gives the chat template no arguments, so they are bound to it (`--data.chat_template_kwargs`).

    With an algorithm, student and teacher read a row through the same functions: OpenRLHF alone makes an image of a
    literal `<image>`, and prints lists of text parts in forms that a chat template does not read.
    """

    def __init__(
        self, dataset: Any, tokenizer: Any, strategy: Any, *args: Any, evaluation: bool = False, **kwargs: Any
    ) -> None:
        given = strategy.args
        plugins.active().hook.openrlhf_dataset(dataset=dataset, evaluation=evaluation, args=given)
        distills, chat = plugins.algorithm() is not None, chat_template_kwargs(given)
        render = _unrendered if distills else partial(tokenizer.apply_chat_template, **chat)
        super().__init__(dataset, SimpleNamespace(apply_chat_template=render), strategy, *args, **kwargs)
        if distills:
            self.prompts = [rendered(prompt_messages(row, given), tokenizer, chat) for row in dataset]
        self.tokenizer, self.rows = tokenizer, dataset

    @overrides("idx")
    def __getitem__(self, idx: int) -> tuple[Any, ...]:
        source, text, *rest = super().__getitem__(idx)
        prompt = Prompt(text)
        prompt.request = Request(id(self), idx)
        return source, prompt, *rest


def _unrendered(chat: list[dict[str, Any]], **kwargs: Any) -> str:
    return ""


def training_then_evaluation() -> Callable[..., PromptDataset]:
    """ppo_trainer.py: `PromptDataset` as `prepare_datasets` calls it, for one split after the other."""
    evaluation = iter((False, True))
    return lambda *args, **kwargs: PromptDataset(*args, evaluation=next(evaluation), **kwargs)


class SamplesGenerator(_SamplesGenerator):
    """samples_generator.py: gives each sample its data-set row and the feedback of its reward function."""

    evaluating = False
    on_group: Callable[[list[Any]], None] | None = None  # called with all samples of a prompt, while others are sampled

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.order = deterministic.Order(self.args)
        self.reward: RewardConfig = from_namespace(RewardConfig, self.args)
        self._row: tuple[tuple[int, int], dict[str, Any]] | None = None
        self._sent: tuple[dict[str, Any], SentRow] | None = None
        self._group: list[Any] = []

    @overrides()
    def generate_eval_samples(self, **kwargs: Any) -> list[Any]:
        self.evaluating = True
        try:
            samples = super().generate_eval_samples(**kwargs)
            rewarded(samples, self.args.eval.n_samples_per_prompt, self.reward)
            return samples
        finally:
            self.evaluating = False

    @overrides()
    def _generate_vllm(self, *args: Any, **kwargs: Any) -> tuple[list[Any], int, bool]:
        samples, consumed, exhausted = super()._generate_vllm(*args, **kwargs)
        self.order.restore(samples)
        return samples, consumed, exhausted

    @overrides("prompts", "labels")
    def _dispatch_prompts_to_vllm(self, prompts: list[Prompt], labels: list[Any], **kwargs: Any) -> list[Any]:
        self.order.stamp([prompt.request for prompt in prompts])
        for prompt in prompts:
            prompt.request.reward = self.reward
        if not self.evaluating:
            hook = plugins.active().hook
            for prompt in prompts:
                record = self._record(prompt.request)
                prompt.request.shown = hook.openrlhf_generation_prompt(
                    prompt=str(prompt), record=record, tokenizer=text_tokenizer(self.tokenizer), args=self.args
                )
        return super()._dispatch_prompts_to_vllm(prompts, labels, **kwargs)

    @overrides("response")
    def _process_response_into_experience(self, response: dict[str, Any], **kwargs: Any) -> Any:
        extra_logs = dict(response.get("extra_logs") or {})
        skipped = None
        if failure := extra_logs.pop(FAILURE, None):
            error = reward_error(failure, self.args)
            if self.reward.on_error == "stop":
                raise error
            skipped = str(error).splitlines()[0]
            logger.warning(f"sample skipped: {skipped}")
            response = {**response, "action_ranges": []}  # none of its tokens counts
        feedback, of_turns = extra_logs.pop(FEEDBACK, None), extra_logs.pop(TURN_FEEDBACK, None)
        limit = extra_logs.pop(LIMIT, None)
        sample = super()._process_response_into_experience({**response, "extra_logs": extra_logs}, **kwargs)
        sample.feedback, sample.skipped, sample.limit = feedback, skipped, limit
        sample.turns = turns_of(response["action_ranges"], sample.action_mask.shape[1], of_turns)
        request = response[REQUEST]
        sample.order, sample.record = request.order, self._record(request)
        plugins.active().hook.openrlhf_rollout_sample(sample=sample, response=response, args=self.args)
        if self.args.train.async_enable:
            if self._sent is None or self._sent[0] is not sample.record:
                self._sent = sample.record, SentRow(sample.record, sent_columns(self.args))
            sample.record = self._sent[1]
        if self.on_group is not None and not self.evaluating:
            self._group.append(sample)  # an engine returns a prompt's samples together
            if len(self._group) == self.args.rollout.n_samples_per_prompt:
                group, self._group = self._group, []
                self.on_group(group)
        return sample

    def _record(self, request: Request) -> dict[str, Any]:
        """The row of a request: one object for the siblings, which come together."""
        key = request.dataset, request.row
        if self._row is None or self._row[0] != key:
            loaders = (loader for loader in (self.prompts_dataloader, self.eval_dataloader) if loader is not None)
            (dataset,) = (loader.dataset for loader in loaders if id(loader.dataset) == request.dataset)
            self._row = key, dataset.rows[request.row]
        return self._row[1]


def sent_columns(args: Any) -> set[str]:
    """The columns of a dataset row that go through Ray's queue in an asynchronous run."""
    named = plugins.active().hook.openrlhf_record_columns(args=args)
    return {args.data.input_key, *(column for columns in named for column in columns or ())}


def turns_of(action_ranges: Sequence[tuple[int, int]], positions: int, feedback: Any) -> list[Turn]:
    """A sample's turns, from the tokens of its actions and the feedback on each (None: no feedback).

    `positions` are the sample's action positions: what OpenRLHF has truncated belongs to no turn.

    Raises TypeError where there is not one entry per turn.
    """
    feedback = [None] * len(action_ranges) if feedback is None else feedback
    if not isinstance(feedback, (list, tuple)) or len(feedback) != len(action_ranges):
        raise TypeError(
            f'extra_logs["turn_feedback"] of a response of {len(action_ranges)} turns is {feedback!r:.200}: an '
            "executor with an `execute` of its own gives a list with a text or None for each of its action_ranges"
        )
    ends = [[min(max(token - 1, 0), positions) for token in tokens] for tokens in action_ranges]
    return [Turn(start, stop, said) for (start, stop), said in zip(ends, feedback, strict=True)]


def reward_error(failure: str, args: Any) -> RewardError:
    agent, url = args.train.agent_func_path, args.reward.remote_url
    source = f"--train.agent_func_path {agent}: the agent" if agent else (
        f"--reward.remote_url {','.join(url)}: the reward function"
    )  # fmt: skip
    return RewardError(masking.masked(f"{source} failed: {failure}"))


def rewarded(samples: Sequence[Any], per_prompt: int, config: RewardConfig) -> float:
    """Give skipped samples what keeps OpenRLHF's means: the mean of their prompt's others, or of the batch's.

    Returns:
        The fraction of skipped samples.

    Raises:
        RewardError: more than `--reward.max_skipped_fraction` are.
    """
    reasons = [sample.skipped for sample in samples if sample.skipped]
    if not reasons:
        return 0.0
    if len(reasons) > config.max_skipped_fraction * len(samples) or len(reasons) == len(samples):
        raise RewardError(
            f"--reward.max_skipped_fraction {config.max_skipped_fraction:g}: {len(reasons)} of {len(samples)} samples "
            f"have no reward, the last one because {reasons[-1]}"
        )
    everyone = [sample for sample in samples if not sample.skipped]
    for start in range(0, len(samples), per_prompt):
        group = samples[start : start + per_prompt]
        known = [sample for sample in group if not sample.skipped] or everyone
        for sample in group:
            if sample.skipped:
                for name, logged in (("rewards", "reward"), ("scores", "score")):
                    setattr(sample, name, _mean_of([getattr(s, name) for s in known]))
                    sample.info[logged] = getattr(sample, name)
    return len(reasons) / len(samples)


def fill_logs(samples: Sequence[Any]) -> None:
    """Give every sample what `extra_logs` of some have, which OpenRLHF needs of all: the mean of those that have it.

    So what is logged is their mean. All samples get one order of names: OpenRLHF adds up what ranks log one by one, in
    the order that their first samples have.
    """
    known: dict[str, list[torch.Tensor]] = {}
    for sample in samples:
        for name, value in sample.info.items():
            known.setdefault(name, []).append(value)
    for name, values in known.items():
        if len(values) < len(samples):
            mean = _mean_of(values)
            for sample in samples:
                sample.info.setdefault(name, mean)
    for sample in samples:
        sample.info = {name: sample.info[name] for name in known}


def ended_at(flag: str, samples: Sequence[Any]) -> float | None:
    """The fraction of trajectories that ended at a limit, not by their agent; None without an agent. Logs a warning."""
    limits = [limit for sample in samples if (limit := getattr(sample, "limit", None)) is not None]
    reached = [limit for limit in limits if limit.startswith(flag)]
    if reached:
        logger.warning(f"{reached[0]}: {len(reached)} of {len(limits)} trajectories ended there, not by their agent")
    return len(reached) / len(limits) if limits else None


def _mean_of(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.as_tensor(value).float() for value in values]).mean(dim=0)


@cache
def max_seq_len(model: str) -> float:
    """Of a checkpoint's configuration; infinite where it names no limit."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=True).get_text_config()
    return getattr(config, "max_position_embeddings", None) or math.inf


class ExperienceMaker(_ExperienceMaker):
    """experience_maker.py: calls `openrlhf_rollout_batch` between rewards and advantages.

    Attributes:
        step: the global step that is to come. batch: its `RolloutBatch`, once it was made.
        teacher_engines: what scores for the teacher; None: the policy workers do.
    """

    step = 1
    teacher_engines: TeacherEngines | None = None

    @overrides("rollout_samples")
    def make_experience_batch(self, rollout_samples: Sequence[Any]) -> list[Any]:
        self.samples, config = rollout_samples, from_namespace(RewardConfig, self.args)
        self.skipped = rewarded(rollout_samples, self.args.rollout.n_samples_per_prompt, config)
        fill_logs(rollout_samples)
        return balanced(super().make_experience_batch(rollout_samples), self._ranks())

    @overrides("group", "sync_condition")
    def _dispatch_forward(self, group: Any, sync_condition: bool, **kwargs: Any) -> list[Any]:
        if group is self.actor_model_group and not plugins.requirements(self.args)["old_log_probs"]:
            zeros = [torch.zeros(mask.shape) for mask in kwargs["action_mask"]]
            return [ray.put(zeros)]
        return super()._dispatch_forward(group, sync_condition, **kwargs)

    def _ranks(self) -> int:
        processes = self.args.actor.num_nodes * self.args.actor.num_gpus_per_node
        return processes // self.args.ds.ring_attn_size // self.args.ds.tensor_parallel_size

    def group_sampled(self, samples: list[Any]) -> None:
        """All samples of a prompt are there: the teacher's engines may begin with them."""
        if any(sample.rewards is None and not sample.skipped for sample in samples):
            return  # a reward model gives them later
        rewards = torch.cat([torch.zeros(1) if sample.rewards is None else sample.rewards for sample in samples])
        known = SimpleNamespace(index=range(len(samples)), rewards=rewards, info={})
        plugins.active().hook.openrlhf_rollout_group(batch=self._batch(samples, [known]))

    def _batch(self, samples: Sequence[Any], experiences: Sequence[Any]) -> RolloutBatch:
        longest, engines = max_seq_len(self.args.actor.model_name_or_path), self.teacher_engines
        if engines is not None:
            longest = min(longest, engines.max_tokens)
        return RolloutBatch(samples, experiences, self.args, self.tokenizer, longest, self.step, engines)

    @overrides("experiences")
    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        batch = self._batch(self.samples, experiences)
        if self.args.reward.on_error == "skip":
            batch.metrics["rollout/reward_skipped_fraction"] = self.skipped
        if (turns := ended_at(MAX_TURNS, self.samples)) is not None:
            batch.metrics["rollout/turn_limit_fraction"] = turns
        if (tokens := ended_at(MAX_TOKENS, self.samples)) is not None:
            batch.metrics["rollout/token_limit_fraction"] = tokens
        plugins.active().hook.openrlhf_rollout_batch(batch=batch)
        self.batch = batch
        return super().compute_advantages_and_returns(experiences)


def balanced(experiences: list[Any], ranks: int) -> list[Any]:
    """The batches in an order that gives every rank about as many tokens of the loss mask.

    OpenRLHF gives each rank an equal run of them in data order, where whole groups have nothing to learn from.
    """
    masks = [attached_loss_mask(experience) for experience in experiences]
    if ranks == 1 or any(mask is None for mask in masks):
        return experiences
    tokens = [sum(int(m.sum()) for m in mask) for mask in masks]
    order = sorted(range(len(experiences)), key=lambda i: -tokens[i])  # stable: equal ones stay in data order
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for start in range(0, len(order), ranks):
        turn = order[start : start + ranks]
        poorest = sorted(range(ranks), key=lambda r: (sum(tokens[i] for i in hands[r]), r))
        for rank, i in zip(poorest, turn, strict=False):
            hands[rank].append(i)
    return [experiences[i] for hand in hands for i in hand]
