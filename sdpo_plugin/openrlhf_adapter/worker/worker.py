"""The policy worker: what plugins find on every rank, its checkpoints, and where its parts are put in."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
import torch.distributed as dist
from openrlhf.trainer.ray import ppo_actor

from sdpo_plugin import plugins
from sdpo_plugin.interface.models import TeacherModel
from sdpo_plugin.interface.transport import Reports
from sdpo_plugin.openrlhf_adapter.patch_points import overrides, patch_point
from sdpo_plugin.openrlhf_adapter.worker import checkpoint, lora
from sdpo_plugin.openrlhf_adapter.worker.actor import PolicyActor
from sdpo_plugin.openrlhf_adapter.worker.offload import OffloadedActor
from sdpo_plugin.openrlhf_adapter.worker.sleep import Sleeper
from sdpo_plugin.openrlhf_adapter.worker.teacher_model import AdapterTeacher, SeparateTeacher
from sdpo_plugin.openrlhf_adapter.worker.trainer import PolicyTrainer, data_loader, windows_with_loss_mask
from sdpo_plugin.openrlhf_adapter.worker.zero import MasterWeights

_STRATEGY = "openrlhf.utils.deepspeed.deepspeed:DeepspeedStrategy"
patch_point(f"{_STRATEGY}.load_ckpt")
patch_point(f"{_STRATEGY}._read_ckpt_metric")
patch_point(f"{_STRATEGY}.get_ds_eval_config", "offload")


_PolicyModelActor: Any = patch_point("openrlhf.trainer.ray.ppo_actor:PolicyModelActor")


class PolicyWorker(_PolicyModelActor):
    """ppo_actor.py: `PolicyModelActor`; an `interface.Worker`."""

    published: TeacherModel | None = None

    @overrides("strategy", "pretrain", "max_steps", "vllm_engines")
    def init_model_from_pretrained(
        self, strategy: Any, pretrain: str, max_steps: int | None = None, vllm_engines: Any = None
    ) -> None:
        self.args, self.pretrain = strategy.args, pretrain
        self.hook = plugins.activate(self.args).hook
        _bind(partial(self.hook.openrlhf_model_built, args=self.args))
        if self.args.ckpt.load_enable:
            checkpoint.mend_latest(os.path.join(self.args.ckpt.path, "_actor"))
            strategy.load_ckpt = checkpoint.flags_win(strategy.load_ckpt)
        super().init_model_from_pretrained(strategy, pretrain, max_steps, vllm_engines)
        self.trainer.worker = self
        self.sleeper = Sleeper()
        if self.args.ds.enable_sleep:  # OpenRLHF has put the optimizer to sleep already
            super().reload_states()
        self.master_weights = MasterWeights(self.actor.model)
        self.hook.openrlhf_worker_setup(worker=self)
        if self.checkpoint_states:
            directory, universal = os.path.join(self.args.ckpt.path, "_actor"), self.args.ds.use_universal_ckpt
            path = self._checkpoint(checkpoint.named_latest(directory, universal) or "")
            self.hook.openrlhf_load_checkpoint(worker=self, path=path)
            checkpoint.load_random_state(path, self.rank)  # last, because setting up consumes random numbers
        if self.args.ds.enable_sleep:
            self.offload_states()

    @overrides()
    def offload_states(self) -> None:
        self.sleeper.sleep(t for tensors in self.hook.openrlhf_device_tensors(worker=self) for t in tensors)
        super().offload_states()

    @overrides()
    def reload_states(self) -> None:
        super().reload_states()
        self.sleeper.wake()

    def load_initial_model(self, offload: bool, updatable: bool) -> TeacherModel:
        """As it was before training. A LoRA model has it inside: without its adapter, or under a second one."""
        if isinstance(self.actor.model.module, lora.PeftModel):
            return AdapterTeacher(self, lora.TEACHER if updatable else None)
        return self.load_model(self.pretrain, offload, zero_stage=None)

    def load_model(self, path: str, offload: bool, zero_stage: int | None) -> TeacherModel:
        """As OpenRLHF builds its reference model."""
        stage = self.args.ds.zero_stage if zero_stage is None else zero_stage
        students, self.strategy.stage = self.strategy.stage, stage
        try:
            ds_config = self.strategy.get_ds_eval_config(offload=offload)
            kind = OffloadedActor if offload and stage < 3 else PolicyActor
            actor = kind(path, **{**self.actor.built_with, "ds_config": ds_config, "lora_rank": 0})
            actor._offload = offload
            actor = self.strategy.prepare(actor)
        finally:
            self.strategy.stage = students
        actor.eval()
        actor.tap_head()
        return SeparateTeacher(self, actor)

    def publish_to_engines(self, model: TeacherModel) -> None:
        self.published = model  # until `publish_teacher`

    def publish_teacher(self, engines: Sequence[Any]) -> None:
        """Send the teacher's engines what `publish_to_engines` was given since the last call. Collective."""
        if self.published is None:
            return
        asleep = self.sleeper.asleep
        self.sleeper.wake()
        self.trainer.send_to_teacher(engines, self.published.modules_for_engines())
        if asleep:
            self.sleeper.sleep(self.sleeper.tensors)
        self.published = None

    def placement_group(self) -> Any:
        """Ray's, which engines that share this worker's GPUs are put into."""
        return ray.util.get_current_placement_group()

    def take_reports(self) -> Reports:
        """This rank's reports to the controller on the rollout batch that it has trained on."""
        answers = dict(self.trainer.reports)
        self.trainer.reports.clear()
        return answers

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def ranks(self) -> int:
        return self._world_size

    @overrides("tag")
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
                checkpoint.mark_whole(os.path.dirname(path), tag, checkpoint.written_with(self.args))
                checkpoint.name_latest(os.path.dirname(path), tag)
                checkpoint.prune(os.path.dirname(path), max_num, tag, self.strategy._read_ckpt_metric)

    @overrides()
    def save_model(self) -> None:
        with lora.student_alone(self.actor.model.module):
            super().save_model()
        self.hook.openrlhf_save_model(worker=self, path=self.args.ckpt.output_dir)

    def _checkpoint(self, tag: str) -> str:
        return os.path.join(self.args.ckpt.path, "_actor", tag)


def _bind(on_built: Callable[..., Any]) -> None:
    """Let OpenRLHF's worker in this process build our classes; `on_built(actor=...)` hears of the policy's model."""
    unheard = [on_built]

    def build(pretrain: str, **kwargs: Any) -> PolicyActor:
        # The first one built is the policy's; a second one is the EMA of --train.enable_ema.
        return PolicyActor(pretrain, on_built=unheard.pop() if unheard else None, **kwargs)

    ppo_actor.Actor = build
    if ppo_actor.ActorPPOTrainer is not PolicyTrainer:
        ppo_actor.ActorPPOTrainer, ppo_actor.DataLoader = PolicyTrainer, data_loader
        ppo_actor.iter_grad_accum_global_norm = windows_with_loss_mask(ppo_actor.iter_grad_accum_global_norm)
