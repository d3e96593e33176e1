"""From a data-set row to a rewarded sample: on the controller, which sees the whole batch, without rank arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import ray
import torch
from transformers import AutoConfig

from sdpo_plugin import plugins
from sdpo_plugin.config import chat_template_kwargs
from sdpo_plugin.host import deterministic
from sdpo_plugin.host.engine import FAILURE, FEEDBACK, REQUEST, Prompt, Request
from sdpo_plugin.host.seams import overrides, seam
from sdpo_plugin.interface import RolloutBatch, attached_loss_mask

_TRAINER = "openrlhf.trainer.ppo_trainer"


class RewardError(RuntimeError):
    """A reward function failed; OpenRLHF alone would go on without a reward."""


class PromptDataset(seam(f"{_TRAINER}:PromptDataset")):
    """datasets/prompts_dataset.py: keeps the rows whose other columns OpenRLHF drops.

    OpenRLHF gives the chat template no arguments, so they are bound to it (`--data.chat_template_kwargs`).
    """

    def __init__(
        self, dataset: Any, tokenizer: Any, strategy: Any, *args: Any, evaluation: bool = False, **kwargs: Any
    ) -> None:
        plugins.active().hook.openrlhf_dataset(dataset=dataset, evaluation=evaluation, args=strategy.args)
        render = partial(tokenizer.apply_chat_template, **chat_template_kwargs(strategy.args))
        super().__init__(dataset, SimpleNamespace(apply_chat_template=render), strategy, *args, **kwargs)
        self.tokenizer, self.rows = tokenizer, dataset

    @overrides("idx")
    def __getitem__(self, idx: int) -> tuple[Any, ...]:
        source, text, *rest = super().__getitem__(idx)
        prompt = Prompt(text)
        prompt.request = Request(id(self), idx)
        return source, prompt, *rest


def training_then_evaluation() -> Callable[..., PromptDataset]:
    """ppo_trainer.py: `PromptDataset` as `prepare_datasets` calls it, for one split after the other."""
    evaluation = iter((False, True))
    return lambda *args, **kwargs: PromptDataset(*args, evaluation=next(evaluation), **kwargs)


class SamplesGenerator(seam(f"{_TRAINER}:SamplesGenerator")):
    """samples_generator.py: gives each sample its data-set row and the feedback of its reward function."""

    evaluating = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.order = deterministic.Order(self.args)

    @overrides()
    def generate_eval_samples(self, **kwargs: Any) -> list[Any]:
        self.evaluating = True
        try:
            return super().generate_eval_samples(**kwargs)
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
        if not self.evaluating:
            hook = plugins.active().hook
            for prompt in prompts:
                record = self._record(prompt.request)
                prompt.request.shown = hook.openrlhf_generation_prompt(
                    prompt=str(prompt), record=record, tokenizer=self.tokenizer, args=self.args
                )
        return super()._dispatch_prompts_to_vllm(prompts, labels, **kwargs)

    @overrides("response")
    def _process_response_into_experience(self, response: dict[str, Any], **kwargs: Any) -> Any:
        extra_logs = dict(response.get("extra_logs") or {})
        if failure := extra_logs.get(FAILURE):
            url = self.args.reward.remote_url
            raise RewardError(f"--reward.remote_url {url}: the reward function failed\n{failure}")
        feedback = extra_logs.pop(FEEDBACK, None)
        sample = super()._process_response_into_experience({**response, "extra_logs": extra_logs}, **kwargs)
        sample.feedback = feedback
        request = response[REQUEST]
        sample.order, sample.record = request.order, self._record(request)
        plugins.active().hook.openrlhf_sample(sample=sample, response=response, args=self.args)
        return sample

    def _record(self, request: Request) -> dict[str, Any]:
        loaders = (loader for loader in (self.prompts_dataloader, self.eval_dataloader) if loader is not None)
        (dataset,) = (loader.dataset for loader in loaders if id(loader.dataset) == request.dataset)
        return dataset.rows[request.row]


@cache
def max_positions(model: str) -> float:
    """Of a checkpoint's configuration; infinite where it names no limit."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=True).get_text_config()
    return getattr(config, "max_position_embeddings", None) or math.inf


class ExperienceMaker(seam(f"{_TRAINER}:RemoteExperienceMaker")):
    """experience_maker.py: calls `openrlhf_batch` between rewards and advantages."""

    @overrides("rollout_samples")
    def make_experience_batch(self, rollout_samples: Sequence[Any]) -> list[Any]:
        self.samples = rollout_samples
        return balanced(super().make_experience_batch(rollout_samples), self._ranks())

    @overrides("group", "sync_condition")
    def _dispatch_forward(self, group: Any, sync_condition: bool, **kwargs: Any) -> list[Any]:
        if group is self.actor_model_group and not plugins.needs(self.args)["old_log_probs"]:
            zeros = [torch.zeros(mask.shape) for mask in kwargs["action_mask"]]
            return [ray.put(zeros)]
        return super()._dispatch_forward(group, sync_condition, **kwargs)

    def _ranks(self) -> int:
        processes = self.args.actor.num_nodes * self.args.actor.num_gpus_per_node
        return processes // self.args.ds.ring_attn_size // self.args.ds.tensor_parallel_size

    @overrides("experiences")
    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        positions = max_positions(self.args.actor.model_name_or_path)
        batch = RolloutBatch(self.samples, experiences, self.args, self.tokenizer, positions)
        plugins.active().hook.openrlhf_batch(batch=batch)
        self.metrics = batch.metrics
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
