"""The controller's side: it sees the whole batch, so who teaches whom is decided here, without rank arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import ray
import torch
from openrlhf.trainer import ppo_trainer, ppo_trainer_async
from transformers import AutoConfig, set_seed

from sdpo_plugin.config import StopTraining, chat_template_kwargs
from sdpo_plugin.host import manager
from sdpo_plugin.host.engine import FAILURE, FEEDBACK, REQUEST, Prompt, Request
from sdpo_plugin.host.seams import plain_class
from sdpo_plugin.step import ATTACHED, LOSS_MASK


class RewardError(RuntimeError):
    """A reward function failed; the host alone would go on without a reward."""


class Records(ppo_trainer.PromptDataset):
    """datasets/prompts_dataset.py: keeps the rows whose other columns the host drops.

    The host gives the chat template no arguments, so they are bound to it (`--data.chat_template_kwargs`).
    """

    def __init__(
        self, dataset: Any, tokenizer: Any, strategy: Any, *args: Any, evaluation: bool = False, **kwargs: Any
    ) -> None:
        hook = manager.of(strategy.args).hook
        hook.openrlhf_dataset(dataset=dataset, evaluation=evaluation, args=strategy.args)
        render = partial(tokenizer.apply_chat_template, **chat_template_kwargs(strategy.args))
        super().__init__(dataset, SimpleNamespace(apply_chat_template=render), strategy, *args, **kwargs)
        self.tokenizer, self.rows = tokenizer, dataset

    def __getitem__(self, idx: int) -> tuple[Any, ...]:
        source, text, *rest = super().__getitem__(idx)
        prompt = Prompt(text)
        prompt.request = Request(id(self), idx)
        return source, prompt, *rest


def splits() -> Callable[..., Records]:
    """ppo_trainer.py: `PromptDataset` as `prepare_datasets` calls it, for training and then for evaluation."""
    evaluation = iter((False, True))
    return lambda *args, **kwargs: Records(*args, evaluation=next(evaluation), **kwargs)


class Samples(ppo_trainer.SamplesGenerator):
    """samples_generator.py: gives each sample its data-set row and the words of its reward function."""

    evaluating = False
    step = 0
    sent = 0

    def generate_eval_samples(self, **kwargs: Any) -> list[Any]:
        self.evaluating = True
        try:
            return super().generate_eval_samples(**kwargs)
        finally:
            self.evaluating = False

    def _generate_vllm(self, *args: Any, **kwargs: Any) -> tuple[list[Any], int, bool]:
        samples, consumed, exhausted = super()._generate_vllm(*args, **kwargs)
        if self.args.rollout.deterministic:  # the host keeps the order in which the engines finish
            samples.sort(key=lambda sample: sample.order)
        return samples, consumed, exhausted

    def _dispatch_prompts_to_vllm(self, prompts: list[Prompt], labels: list[Any], **kwargs: Any) -> list[Any]:
        if self.args.rollout.deterministic:
            for request in (prompt.request for prompt in prompts):
                self.sent += 1
                request.order, request.seed = self.sent, (self.args.train.seed, self.step, request.row)
        if not self.evaluating:
            hook = manager.of(self.args).hook
            for prompt in prompts:
                record = self._record(prompt.request)
                prompt.request.shown = hook.openrlhf_generation_prompt(
                    prompt=str(prompt), record=record, tokenizer=self.tokenizer, args=self.args
                )
        return super()._dispatch_prompts_to_vllm(prompts, labels, **kwargs)

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
        manager.of(self.args).hook.openrlhf_sample(sample=sample, response=response, args=self.args)
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


class RolloutBatch:
    """All samples of one step, rewarded, in data order: `args.rollout.n_samples_per_prompt` per prompt.

    Attributes:
        samples: the host's `Experience`, one row each, with `record` and `feedback`.
        rewards: float per sample, before length penalties and baselines.
        args, tokenizer: the host's.
        max_positions: the longest sequence that the policy model is made for, in tokens.
        metrics: scalars a plugin wants logged for this step.
    """

    def __init__(self, samples: Sequence[Any], experiences: Sequence[Any], args: Any, tokenizer: Any) -> None:
        self.samples, self.args, self.tokenizer = samples, args, tokenizer
        self.max_positions = max_positions(args.actor.model_name_or_path)
        self.metrics: dict[str, float] = {}
        self._experiences = experiences
        self.rewards = [0.0] * len(samples)
        for experience in experiences:
            for index, reward in zip(experience.index, experience.rewards.tolist(), strict=True):
                self.rewards[index] = reward

    def prompt_ids(self, i: int) -> list[int]:
        """What sample i's student read before its first action: the row's prompt, or what an agent made of it."""
        ids = self.samples[i].sequences[0].tolist()
        return ids[: len(ids) - len(self.response_ids(i))]

    def response_ids(self, i: int) -> list[int]:
        """Everything after sample i's prompt: its actions and, of an agent, the observations between them.

        Empty where an agent ended before its first action.
        """
        sample = self.samples[i]
        actions = sample.action_mask[0].nonzero()[:, 0].tolist()
        return sample.sequences[0, actions[0] + 1 :].tolist() if actions else []

    def attach(self, name: str, values: Sequence[torch.Tensor]) -> None:
        """Send one tensor per sample (any shape) to the worker that trains on it: `step.data[name]`.

        The name `loss_mask` (bool [A_i] per sample, over its action positions) also defines `step.loss_weights`.
        """
        for experience in self._experiences:
            experience.info[ATTACHED + name] = [values[i] for i in experience.index]


class Experiences(ppo_trainer.RemoteExperienceMaker):
    """experience_maker.py: calls `openrlhf_batch` between rewards and advantages."""

    def make_experience_batch(self, rollout_samples: Sequence[Any]) -> list[Any]:
        self.samples = rollout_samples
        return dealt(super().make_experience_batch(rollout_samples), self._ranks())

    def _dispatch_forward(self, group: Any, sync_condition: bool, **kwargs: Any) -> list[Any]:
        if group is self.actor_model_group and not manager.needs(self.args)["old_log_probs"]:
            zeros = [torch.zeros(mask.shape) for mask in kwargs["action_mask"]]
            return [ray.put(zeros)]
        return super()._dispatch_forward(group, sync_condition, **kwargs)

    def _ranks(self) -> int:
        processes = self.args.actor.num_nodes * self.args.actor.num_gpus_per_node
        return processes // self.args.ds.ring_attn_size // self.args.ds.tensor_parallel_size

    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        batch = RolloutBatch(self.samples, experiences, self.args, self.tokenizer)
        manager.of(self.args).hook.openrlhf_batch(batch=batch)
        self.metrics = batch.metrics
        return super().compute_advantages_and_returns(experiences)


def dealt(experiences: list[Any], ranks: int) -> list[Any]:
    """The batches in an order that gives every rank about as many tokens of the loss mask.

    The host gives each rank an equal run of them in data order, where whole groups have nothing to learn from.
    """
    masks = [experience.info.get(ATTACHED + LOSS_MASK) for experience in experiences]
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


def bind(args: Any) -> None:
    """Let the host's controllers in this process build our classes, and draw the order of prompts from `--train.seed`.

    OpenRLHF seeds its policy workers in this way, but not the controller, whose data loader asks torch for a seed.
    """
    ppo_trainer.PromptDataset = splits()
    ppo_trainer.SamplesGenerator = ppo_trainer_async.SamplesGenerator = Samples
    ppo_trainer.RemoteExperienceMaker = Experiences
    set_seed(args.train.seed)


class _Metrics:
    """The part the synchronous and the asynchronous controller share."""

    stopped: StopTraining | None = None

    def __init__(self, pretrain: str, strategy: Any, *args: Any, **kwargs: Any) -> None:
        bind(strategy.args)
        super().__init__(pretrain, strategy, *args, **kwargs)

    def train_step(self, rollout_samples: Sequence[Any], global_step: int) -> tuple[dict[str, Any], int]:
        status, global_step = super().train_step(rollout_samples, global_step)
        status.update(self.experience_maker.metrics)
        try:
            manager.of(self.args).hook.openrlhf_metrics(status=status, args=self.args)
        except StopTraining as reason:
            self.stopped = reason
        self._begin(global_step)
        return status, global_step

    def save_logs_and_checkpoints(self, global_step: int, logs_dict: Any = None, client_states: Any = None) -> None:
        client_states = {} if client_states is None else client_states
        if client_states.get("data_loader_state_dict", {}).get("_iterator_finished"):
            client_states["episode"] += 1  # the data loader starts a new one when it is restored
        manager.of(self.args).hook.openrlhf_save_states(states=client_states, args=self.args)
        if self.stopped is not None:
            self.args.ckpt.save_steps = 1
        super().save_logs_and_checkpoints(global_step, logs_dict, client_states)
        if self.stopped is not None:
            raise StopTraining(f"{self.stopped}; step {global_step} is saved in {self.args.ckpt.path}")

    def init_checkpoint_states(self) -> dict[str, Any]:
        # A run killed in its first save left a directory without a checkpoint: it starts anew.
        states = {"episode": 0, "global_step": 0, "total_consumed_prompts": 0, "data_loader_state_dict": {}}
        states |= super().init_checkpoint_states()
        manager.of(self.args).hook.openrlhf_load_states(states=states, args=self.args)
        self._begin(states["global_step"])
        return states

    def _begin(self, step: int) -> None:
        """What a restart cannot know otherwise: requests are seeded by the step they are for."""


class Controller(_Metrics, plain_class(ppo_trainer.PPOTrainer)):
    """ppo_trainer.py: `PPOTrainer`."""

    def _begin(self, step: int) -> None:
        self.samples_generator.step = step


class AsyncController(_Metrics, plain_class(ppo_trainer_async.TrainingActor)):
    """ppo_trainer_async.py: `TrainingActor`."""

    def broadcast_to_vllm(self) -> None:
        # Ray ships inherited methods by value, which breaks the host's `super()` in this one; ours goes by name.
        super().broadcast_to_vllm()


class AsyncGenerator(plain_class(ppo_trainer_async.GenerateSamplesActor)):
    """ppo_trainer_async.py: `GenerateSamplesActor`."""

    def __init__(self, pretrain: str, strategy: Any, *args: Any, **kwargs: Any) -> None:
        bind(strategy.args)
        super().__init__(pretrain, strategy, *args, **kwargs)
