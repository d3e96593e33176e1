"""The policy worker's side: micro-batches, the loss on them, weights for the engines, checkpoints."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from openrlhf.trainer.ray import ppo_actor
from torch.utils.data import DataLoader

from sdpo_plugin.host import checkpoint, lora, manager
from sdpo_plugin.host.actor import PolicyActor
from sdpo_plugin.host.offload import OffloadedActor
from sdpo_plugin.host.seams import plain_class
from sdpo_plugin.host.zero import MasterWeights, images, publish
from sdpo_plugin.step import ATTACHED, LOSS_MASK, Aggregate, PolicyStep, loss_mask, undifferentiable


def windows_with_loss_mask(original: Callable[..., Iterable[Any]]) -> Callable[..., Iterable[Any]]:
    """utils/loss_utils.py: normalises by the plugins' loss mask too, over the host's own accumulation windows."""

    def windows(data_iter: Iterable[Any], strategy: Any, accumulated_gradient: int, mask_fn: Callable[..., Any]) -> Any:
        def mask(experience: Any) -> torch.Tensor:
            return loss_mask(experience, experience.info.get(ATTACHED + LOSS_MASK))

        for_host, for_plugins = itertools.tee(data_iter)
        both = zip(
            original(for_host, strategy, accumulated_gradient, mask_fn),
            original(for_plugins, strategy, accumulated_gradient, mask),
            strict=True,
        )
        for (experience, info), (_, experience.loss_mask_info) in both:
            yield experience, info

    return windows


class EvenBatches(torch.utils.data.Sampler[int]):
    """A random order in which every micro-batch has about as many samples with a token in the loss mask.

    Ranks wait for each other after every micro-batch, and samples without such a token may cost nothing.
    """

    def __init__(self, items: Sequence[Any], batch_size: int) -> None:
        self.items, self.batch_size = items, batch_size

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.items)).tolist()
        order.sort(key=lambda i: not bool(self.items[i].info[ATTACHED + LOSS_MASK].any()))  # stable
        batches = max(len(order) // self.batch_size, 1)
        for start in range(batches):
            yield from order[start::batches][: self.batch_size]


def data_loader(buffer: Any, batch_size: int, shuffle: bool, **kwargs: Any) -> Any:
    """ppo_actor.py: `DataLoader`, dealing evenly where the buffer's samples have a loss mask and are shuffled."""
    if shuffle and all(ATTACHED + LOSS_MASK in item.info for item in buffer.items):
        return DataLoader(buffer, batch_size, sampler=EvenBatches(buffer.items, batch_size), **kwargs)
    return DataLoader(buffer, batch_size, shuffle=shuffle, **kwargs)


class PolicyTrainer(ppo_actor.ActorPPOTrainer):
    """ppo_actor.py: `ActorPPOTrainer`, with hooks around the forward pass, in the loss and after the optimizer."""

    worker: PolicyWorker

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hook = manager.of(self.args).hook
        self.host_loss_fn, self.actor_loss_fn = self.actor_loss_fn, self._loss
        self.needs = manager.needs(self.args)

    def training_step(
        self, experience: Any, kl_ctl: float, step: int, loss_batch_info: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        self.step = PolicyStep(
            self.worker,
            experience,
            self.needs,
            self._mean(self._loss_mask_info(experience, step), self.host_loss_fn.token_level_loss),
            self._mean(loss_batch_info or self._loss_batch_info(experience, step), token_level=False),
            self._rollout_correction,
        )
        self.hook.openrlhf_before_forward(step=self.step)
        if self.args.train.dynamic_batch_enable:
            # The host makes DeepSpeed think that every micro-batch is a step: ZeRO 1 and 2 then drop all but the last.
            self.actor.model.set_gradient_accumulation_boundary(self._ends_optimizer_step(step))
        self.actor.step = self.step
        try:
            status = super().training_step(experience, kl_ctl, step, loss_batch_info)
        finally:
            self.actor.step = None
        if self._ends_optimizer_step(step) and self.actor.model.was_step_applied():
            self.hook.openrlhf_optimizer_step(worker=self.worker)
        status["metrics"].update(self.step.metrics)
        status["weights"].update(dict.fromkeys(self.step.metrics, "token"))
        return status

    def broadcast_to_vllm(self) -> None:
        """Of a LoRA model the engines get merged weights, under the names they know."""
        if self.vllm_engines is None:
            return  # the host asks for it on a restart, engines or not
        actor = self.actor
        if not isinstance(actor.model.module, lora.PeftModel):
            return super().broadcast_to_vllm()
        try:
            for weights in lora.merged_weights(actor.model.module):
                module = SimpleNamespace(named_parameters=weights.items)
                self.actor = SimpleNamespace(model=SimpleNamespace(module=module), is_vlm=False)
                super().broadcast_to_vllm()
        finally:
            self.actor = actor

    def _ends_optimizer_step(self, step: int) -> bool:
        """Whether micro-batch `step` may end an optimizer step: of dynamic ones the buffer knows, else DeepSpeed."""
        return not self.args.train.dynamic_batch_enable or bool(self.replay_buffer.dynamic_optimizer_step[step])

    def _loss_mask_info(self, experience: Any, step: int) -> dict[str, Any]:
        """The host's normalizers of an optimizer step, for the plugins' loss mask. Collective."""
        if not self.args.train.dynamic_batch_enable:
            return experience.loss_mask_info
        if step == 0 or self._ends_optimizer_step(step - 1):
            buffer = self.replay_buffer
            last = buffer.dynamic_optimizer_step.index(1, step)
            masks = [
                buffer.items[i].info.get(ATTACHED + LOSS_MASK, buffer.items[i].action_mask)
                for indices in buffer.dynamic_indices[step : last + 1]
                for i in indices
            ]
            padded = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True).to(experience.sequences.device)
            self.loss_mask_info = ppo_actor.get_loss_batch_info(self.strategy, padded)
        return self.loss_mask_info

    def _loss_batch_info(self, experience: Any, step: int) -> dict[str, Any]:
        """The host's normalizers of an optimizer step of dynamic micro-batches, for its own mask."""
        return ppo_actor.get_loss_batch_info(
            self.strategy, experience.action_mask, replay_buffer=self.replay_buffer, step=step, dynamic_batch=True
        )

    def _mean(self, info: dict[str, Any], token_level: bool) -> Aggregate:
        """The host's mean over an optimizer step with the normalizers `info`."""
        # A step without a single token in the mask has a loss of zero, not 0/0.
        totals = {name: info[name].clamp(min=1e-8) for name in ("batch_num_tokens", "global_batch_size")}
        return partial(ppo_actor.aggregate_loss, token_level_loss=token_level, dp_size=info["dp_size"], **totals)

    def _rollout_correction(
        self, old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """What the host's PPO loss multiplies a token's advantage with when the policy is the old one."""
        loss_fn = copy.copy(self.host_loss_fn)
        loss_fn.token_level_loss, loss_fn.policy_loss_type = True, "ppo"
        with torch.enable_grad():
            advantages = torch.ones_like(old_log_probs, requires_grad=True)
            loss = loss_fn(
                old_log_probs, old_log_probs, advantages, mask, rollout_log_probs=rollout_log_probs, batch_num_tokens=1
            )[0]
        return -torch.autograd.grad(loss, advantages)[0]

    def _loss(
        self, log_probs: torch.Tensor, old_log_probs: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        step = self.step
        if step.samples is not None:  # nothing is known to have changed about samples that were not read
            known = kwargs.get("rollout_log_probs")
            log_probs = torch.where(step.samples[:, None], log_probs, old_log_probs if known is None else known)
        if not step.needs["old_log_probs"]:
            old_log_probs = log_probs.detach()
        if not step.needs["log_probs"]:
            log_probs = undifferentiable(log_probs, "log_probs")
        step.loss, *rest = self.host_loss_fn(log_probs, old_log_probs, *args, **kwargs)
        step.log_probs = log_probs
        self.hook.openrlhf_policy_loss(step=step)
        return step.loss, *rest


class PolicyWorker(plain_class(ppo_actor.PolicyModelActor)):
    """ppo_actor.py: `PolicyModelActor`. Plugins find here `strategy`, `actor`, `tokenizer`, `trainer` and:

    Attributes:
        args: the host's nested arguments.
        pretrain: where the initial weights came from.
        masters: the fp32 weights DeepSpeed's optimizer holds on this rank.
    """

    def init_model_from_pretrained(
        self, strategy: Any, pretrain: str, max_steps: int | None = None, vllm_engines: Any = None
    ) -> None:
        self.args, self.pretrain = strategy.args, pretrain
        self.hook = manager.of(self.args).hook
        _bind(partial(self.hook.openrlhf_model, args=self.args))
        if self.args.ckpt.load_enable:
            checkpoint.mend_latest(os.path.join(self.args.ckpt.path, "_actor"))
            strategy.load_ckpt = checkpoint.flags_win(strategy.load_ckpt)
        super().init_model_from_pretrained(strategy, pretrain, max_steps, vllm_engines)
        self.trainer.worker = self
        self.masters = MasterWeights(self.actor.model)
        self.hook.openrlhf_worker_setup(worker=self)
        if self.checkpoint_states:
            with open(os.path.join(self.args.ckpt.path, "_actor", "latest")) as latest:
                path = self._checkpoint(latest.read().strip())
            self.hook.openrlhf_load_checkpoint(worker=self, path=path)
            checkpoint.load_random_state(path, self.rank)  # last, because setting up consumes random numbers

    def teacher_model(self, offload: bool, follows: bool) -> PolicyActor | lora.AdapterView:
        """The initial model, for scoring only, with weights for `publish` to write to if it `follows` the student.

        A LoRA model has it inside: without its adapter, or under the second one (`PolicyActor.add_teacher_adapter`).
        """
        if isinstance(self.actor.model.module, lora.PeftModel):
            return lora.AdapterView(self.actor, lora.TEACHER if follows else None)
        # As the host builds its reference model.
        ds_config = self.strategy.get_ds_eval_config(offload=offload)
        kind = OffloadedActor if offload and self.args.ds.zero_stage < 3 else PolicyActor
        actor = kind(self.pretrain, **{**self.actor.built_with, "ds_config": ds_config})
        actor._offload = offload
        actor = self.strategy.prepare(actor)
        actor.eval()
        actor.tap_head()
        return actor

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def ranks(self) -> int:
        return self._world_size

    def images(self, model: PolicyActor | lora.AdapterView) -> dict[str, torch.Tensor]:
        """This rank's part of a `teacher_model`'s weights, by the names of `masters` and laid out like them."""
        fragments, module = self.masters.fragments(), self._follower(model)
        named = {self._name_in(model, name): fragment for name, fragment in fragments.items()}
        return dict(zip(fragments, images(named, module).values(), strict=True))

    def publish(self, model: PolicyActor | lora.AdapterView) -> None:
        """Let all ranks know what was written to `images`. Collective."""
        layout = [[(self._name_in(model, name), *place) for name, *place in part] for part in self.masters.layout]
        publish(layout, self._follower(model))

    def _follower(self, model: PolicyActor | lora.AdapterView) -> torch.nn.Module:
        """The module that has a `teacher_model`'s weights."""
        return (self.actor if isinstance(model, lora.AdapterView) else model).model.module

    def _name_in(self, model: PolicyActor | lora.AdapterView, name: str) -> str:
        """The name in `_follower` of the weight that follows the one called `name` in `masters`."""
        return name.replace(f".{lora.STUDENT}.", f".{lora.TEACHER}.") if isinstance(model, lora.AdapterView) else name

    def export(self, model: PolicyActor | lora.AdapterView, path: str) -> None:
        """Save a `teacher_model` in Hugging Face form. Collective."""
        if isinstance(model, lora.AdapterView):
            lora.save_teacher(self.actor.model.module, path, write=self.rank == 0)
        else:
            self.strategy.save_model(model, self.tokenizer, path)

    def save_checkpoint(self, tag: str, *args: Any, **kwargs: Any) -> None:
        """A kill at any moment leaves `latest` naming a checkpoint that is whole, plugins' files included."""
        with (
            checkpoint.latest_withheld(self.actor.model), checkpoint.all_kept(self.args) as max_num,
            lora.student_alone(self.actor.model.module),
        ):  # fmt: skip
            super().save_checkpoint(tag, *args, **kwargs)
        if not self.disable_ds_ckpt:
            path = self._checkpoint(tag)
            checkpoint.save_random_state(path, self.rank)
            self.hook.openrlhf_save_checkpoint(worker=self, path=path)
            dist.barrier()  # every rank has written
            if self.rank == 0:
                checkpoint.name_latest(os.path.dirname(path), tag)
                checkpoint.prune(os.path.dirname(path), max_num, tag, self.strategy._read_ckpt_metric)

    def save_model(self) -> None:
        with lora.student_alone(self.actor.model.module):
            super().save_model()
        self.hook.openrlhf_save_model(worker=self, path=self.args.ckpt.output_dir)

    def _checkpoint(self, tag: str) -> str:
        return os.path.join(self.args.ckpt.path, "_actor", tag)


def _bind(on_built: Callable[..., Any]) -> None:
    """Let the host's worker in this process build our classes; `on_built(actor=...)` hears of the policy's model."""
    unheard = [on_built]

    def build(*args: Any, **kwargs: Any) -> PolicyActor:
        # The first one built is the policy's; a second one is the average of --train.enable_ema.
        return PolicyActor(*args, on_built=unheard.pop() if unheard else None, **kwargs)

    ppo_actor.Actor = build
    if ppo_actor.ActorPPOTrainer is not PolicyTrainer:
        ppo_actor.ActorPPOTrainer, ppo_actor.DataLoader = PolicyTrainer, data_loader
        ppo_actor.iter_grad_accum_global_norm = windows_with_loss_mask(ppo_actor.iter_grad_accum_global_norm)
