"""The policy worker's training: micro-batches, the loss on them, weights for the engines."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from sdpo_plugin import plugins
from sdpo_plugin.interface.micro_batch import Aggregate, MicroBatch
from sdpo_plugin.interface.models import Worker
from sdpo_plugin.interface.transport import Reports, attached_loss_mask, loss_mask
from sdpo_plugin.openrlhf_adapter.failures import NotFinite
from sdpo_plugin.openrlhf_adapter.patch_points import overrides, patch_point
from sdpo_plugin.openrlhf_adapter.worker import lora, metrics
from sdpo_plugin.openrlhf_adapter.worker.checkpoint import named_latest

_PPO_ACTOR = "openrlhf.trainer.ray.ppo_actor"
_BUFFER = "openrlhf.trainer.ppo_utils.replay_buffer:NaiveReplayBuffer"
patch_point("openrlhf.utils.deepspeed.deepspeed:DeepspeedStrategy.all_gather", "data")
aggregate_loss = patch_point(f"{_PPO_ACTOR}:aggregate_loss", "loss", "loss_mask", "token_level_loss", "dp_size",
                      "batch_num_tokens", "global_batch_size")  # fmt: skip
get_loss_batch_info = patch_point(
    f"{_PPO_ACTOR}:get_loss_batch_info", "loss_mask", "replay_buffer", "step", "dynamic_batch"
)
patch_point(f"{_BUFFER}.setup_dynamic_batch", "strategy")  # makes `dynamic_indices` and `dynamic_optimizer_step`
patch_point(f"{_PPO_ACTOR}:iter_grad_accum_global_norm", "data_iter", "strategy", "accumulated_gradient", "mask_fn")
patch_point(f"{_PPO_ACTOR}:DataLoader")


def windows_with_loss_mask(original: Callable[..., Iterable[Any]]) -> Callable[..., Iterable[Any]]:
    """utils/loss_utils.py: normalises by the plugins' loss mask too, over OpenRLHF's own accumulation windows."""

    def windows(data_iter: Iterable[Any], strategy: Any, accumulated_gradient: int, mask_fn: Callable[..., Any]) -> Any:
        for_host, for_plugins = itertools.tee(data_iter)
        both = zip(
            original(for_host, strategy, accumulated_gradient, mask_fn),
            original(for_plugins, strategy, accumulated_gradient, loss_mask),
            strict=True,
        )
        for (experience, info), (_, info_of_loss_mask) in both:
            experience.loss_mask_info = info_of_loss_mask
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
        order.sort(key=lambda i: not bool(attached_loss_mask(self.items[i]).any()))  # stable
        batches = max(len(order) // self.batch_size, 1)
        for start in range(batches):
            yield from order[start::batches][: self.batch_size]


def data_loader(buffer: Any, batch_size: int, shuffle: bool, **kwargs: Any) -> Any:
    """ppo_actor.py: `DataLoader`, dealing evenly where the buffer's samples have a loss mask and are shuffled."""
    if shuffle and all(attached_loss_mask(item) is not None for item in buffer.items):
        return DataLoader(buffer, batch_size, sampler=EvenBatches(buffer.items, batch_size), **kwargs)
    return DataLoader(buffer, batch_size, shuffle=shuffle, **kwargs)


def _of_all_ranks(names: list[str]) -> list[list[str]]:
    """Collective."""
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, names)
    return found


def show_masked_norms(optimizer: Any) -> None:
    """zero/stage3.py: where a group's gradient is not finite DeepSpeed takes -1 for its norm, and of all groups' norms
    the norm, a number like any other. That update makes all weights NaN.
    """
    norms_of_groups = optimizer._get_norm_groups
    optimizer._get_norm_groups = lambda: [torch.where(norm < 0, torch.nan, norm) for norm in norms_of_groups()]


_ActorPPOTrainer: Any = patch_point(f"{_PPO_ACTOR}:ActorPPOTrainer")


class PolicyTrainer(_ActorPPOTrainer):
    """ppo_actor.py: `ActorPPOTrainer`, with hooks around the forward pass, in the loss and after the optimizer."""

    worker: Worker
    micro_batch: MicroBatch  # during its training step
    actor: Any
    actor_loss_fn: Any
    vllm_engines: Any
    use_cuda_ipc: bool
    _model_update_group: Any = None  # rank 0's
    teacher_group: Any = None  # rank 0's, with the teacher's engines

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hook = plugins.active().hook
        self.policy_loss_fn, self.actor_loss_fn = self.actor_loss_fn, self._loss
        self.required = plugins.requirements(self.args)
        self.reports: Reports = {}
        if self.args.ds.zero_stage == 3:
            show_masked_norms(self.actor.model.optimizer)

    @overrides("backend")
    def _init_vllm_sync_group(self, backend: str) -> None:
        # Raises what an engine's constructor raised. OpenRLHF would wait for the engine in the group for minutes.
        ray.get([engine.__ray_ready__.remote() for engine in self.vllm_engines])
        super()._init_vllm_sync_group(backend)

    @overrides("kl_ctl")
    def ppo_train(self, kl_ctl: float) -> dict[str, Any]:
        return metrics.means_of(super().ppo_train(kl_ctl))

    @overrides("experience", "kl_ctl", "step", "loss_batch_info")
    def training_step(
        self, experience: Any, kl_ctl: float, step: int, loss_batch_info: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """`step` counts micro-batches."""
        self.micro_batch = micro_batch = MicroBatch(
            self.worker,
            experience,
            self.required,
            self._mean(self._loss_mask_info(experience, step), token_level=True),
            self._mean(loss_batch_info or self._loss_batch_info(experience, step), token_level=False),
            self._rollout_correction,
            self.reports,
            self.actor.ring,
        )
        self.hook.openrlhf_before_forward(micro_batch=micro_batch)
        if self.args.train.dynamic_batch_enable:
            # OpenRLHF makes DeepSpeed think that every micro-batch is a step: ZeRO 1 and 2 then drop all but the last.
            self.actor.model.set_gradient_accumulation_boundary(self._ends_optimizer_step(step))
        ends = self.actor.model.is_gradient_accumulation_boundary()
        with self.actor.using(micro_batch):
            status = super().training_step(experience, kl_ctl, step, loss_batch_info)
        micro_batch.release()  # else hidden states and the teacher's head stay through generation and sleep
        del self.micro_batch
        self._require_finite(status["metrics"], skipped=ends and not self.actor.model.was_step_applied())
        if self._ends_optimizer_step(step) and self.actor.model.was_step_applied():
            self.hook.openrlhf_optimizer_step(worker=self.worker)
        status = metrics.report(status, micro_batch.metrics, micro_batch.means)
        if self.worker.ranks > 1:
            metrics.require_same_names(status, self.strategy.all_gather, _of_all_ranks, self._reporting_plugins())
        return status

    def _reporting_plugins(self) -> list[str]:
        hooks = (self.hook.openrlhf_before_forward, self.hook.openrlhf_policy_loss)
        return sorted({implementation.plugin_name for hook in hooks for implementation in hook.get_hookimpls()})

    @overrides()
    def broadcast_to_vllm(self) -> None:
        """Of a LoRA model the engines get merged weights, under the names of the base model."""
        if self.vllm_engines is None:
            return  # OpenRLHF calls it on a restart, with or without engines
        module = self.actor.model.module
        if not isinstance(module, lora.PeftModel):
            return super().broadcast_to_vllm()
        self._send(lora.merged_modules(module, lora.STUDENT))

    def _send(self, modules: Iterable[Any]) -> None:
        """OpenRLHF's weight sync, of these modules in the place of the policy's."""
        actor = self.actor
        try:
            for module in modules:
                self.actor = SimpleNamespace(model=SimpleNamespace(module=module), is_vlm=False)
                super().broadcast_to_vllm()
        finally:
            self.actor = actor

    def send_to_teacher(self, engines: Sequence[Any], modules: Iterable[Any]) -> None:
        """OpenRLHF's weight sync, of these modules to the teacher's engines, which are a group of their own.

        Where they share the policy's GPUs, so do the rollout's, and CUDA IPC serves both.
        """
        args, teacher = self.strategy.args, self.args.teacher
        students = args.vllm, self.vllm_engines, self._model_update_group
        towards = {"num_engines": teacher.num_engines, "tensor_parallel_size": teacher.tensor_parallel_size}
        args.vllm = SimpleNamespace(**{**vars(args.vllm), **towards, "enable_prefix_caching": False})
        self.vllm_engines = engines
        try:
            if self.worker.rank == 0 and not self.use_cuda_ipc:
                if self.teacher_group is None:
                    self._init_vllm_sync_group(args.vllm.sync_backend)
                    self.teacher_group = self._model_update_group
                self._model_update_group = self.teacher_group
            self._send(modules)
        finally:
            args.vllm, self.vllm_engines, self._model_update_group = students

    def _require_finite(self, found: dict[str, Any], skipped: bool) -> None:
        """Raises NotFinite: in bf16 DeepSpeed skips such a step in silence and logs the norm of the one before.

        In fp16 it skips steps to find its loss scale.
        """
        loss = float(found["policy_loss"])
        norm = found.get("actor_grad_norm", 0.0)  # -1 at ZeRO 1 and 2 where the gradient is not finite
        if not math.isfinite(loss):
            what = f"the loss is {loss:g}"
        elif self.args.ds.param_dtype == "fp16":
            return
        elif skipped:
            what = f"the gradient is not, and DeepSpeed skipped the step; the loss is {loss:g}"
        elif not 0.0 <= norm < math.inf:
            what = f"the gradient's norm is {'nan' if norm < 0 else f'{norm:g}'}, of a loss of {loss:g}"
        else:
            return
        values = {name: torch.as_tensor(value, dtype=torch.float) for name, value in found.items()}
        names = [name for name, value in values.items() if name != "actor_grad_norm" and not value.isfinite().all()]
        path = os.path.join(self.args.ckpt.path, "_actor")
        latest = named_latest(path)
        raise NotFinite(
            f"an update that is not finite: on rank {self.worker.rank} {what}"
            + (f" (not finite: {', '.join(names)})" if names else "")
            + (f"; the last checkpoint is {os.path.join(path, latest)}" if latest else f"; {path} has no checkpoint")
        )

    def _ends_optimizer_step(self, step: int) -> bool:
        """Whether micro-batch `step` may end an optimizer step: the buffer decides for dynamic ones, else DeepSpeed."""
        return not self.args.train.dynamic_batch_enable or bool(self.replay_buffer.dynamic_optimizer_step[step])

    def _loss_mask_info(self, experience: Any, step: int) -> dict[str, Any]:
        """OpenRLHF's normalizers of an optimizer step, for the plugins' loss mask. Collective."""
        if not self.args.train.dynamic_batch_enable:
            return experience.loss_mask_info
        if step == 0 or self._ends_optimizer_step(step - 1):
            buffer = self.replay_buffer
            last = buffer.dynamic_optimizer_step.index(1, step)
            masks = [
                buffer.items[i].action_mask if (mask := attached_loss_mask(buffer.items[i])) is None else mask
                for indices in buffer.dynamic_indices[step : last + 1]
                for i in indices
            ]
            padded = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True).to(experience.sequences.device)
            self.loss_mask_info = get_loss_batch_info(self.strategy, padded)
        return self.loss_mask_info

    def _loss_batch_info(self, experience: Any, step: int) -> dict[str, Any]:
        """OpenRLHF's normalizers of an optimizer step of dynamic micro-batches, for its own mask."""
        return get_loss_batch_info(
            self.strategy, experience.action_mask, replay_buffer=self.replay_buffer, step=step, dynamic_batch=True
        )

    def _mean(self, info: dict[str, Any], token_level: bool) -> Aggregate:
        """OpenRLHF's mean over an optimizer step with the normalizers `info`."""
        # A step without a single token in the mask has a loss of zero, not 0/0.
        totals = {name: info[name].clamp(min=1e-8) for name in ("batch_num_tokens", "global_batch_size")}
        return partial(aggregate_loss, token_level_loss=token_level, dp_size=info["dp_size"], **totals)

    def _rollout_correction(
        self, old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """What OpenRLHF's PPO loss multiplies a token's advantage with when the policy is the old one."""
        loss_fn = copy.copy(self.policy_loss_fn)
        loss_fn.token_level_loss, loss_fn.policy_loss_type = True, "ppo"
        with torch.enable_grad():
            advantages = torch.ones_like(old_log_probs, requires_grad=True)
            loss = loss_fn(
                old_log_probs, old_log_probs, advantages, mask, rollout_log_probs=rollout_log_probs, batch_num_tokens=1
            )[0]
        return -torch.autograd.grad(loss, advantages)[0]

    def _loss(
        self, log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, **kwargs: Any
    ) -> tuple[Any, ...]:
        micro_batch = self.micro_batch
        if micro_batch.sample_mask is not None:  # nothing is known to have changed about samples that were not read
            known = kwargs.get("rollout_log_probs")
            unread = old_log_probs if known is None else known
            log_probs = torch.where(micro_batch.sample_mask[:, None], log_probs, unread)
        if not micro_batch.required["old_log_probs"]:
            old_log_probs = log_probs.detach()
        log_probs, advantages = micro_batch.policy_loss_inputs(log_probs, advantages)
        micro_batch.loss, *rest = self.policy_loss_fn(log_probs, old_log_probs, advantages, **kwargs)
        micro_batch.log_probs = log_probs
        self.hook.openrlhf_policy_loss(micro_batch=micro_batch)
        return micro_batch.loss, *rest
