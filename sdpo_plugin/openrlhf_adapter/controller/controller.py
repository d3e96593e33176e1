"""OpenRLHF's controllers, which hold the run together: metrics, checkpoints of the run's state, the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from openrlhf.trainer import ppo_trainer, ppo_trainer_async
from transformers import set_seed

from sdpo_plugin import plugins
from sdpo_plugin.config import StopTraining
from sdpo_plugin.monitoring.masking import masked
from sdpo_plugin.openrlhf_adapter import dates
from sdpo_plugin.openrlhf_adapter.controller.rollout import ExperienceMaker, SamplesGenerator, training_then_evaluation
from sdpo_plugin.openrlhf_adapter.controller.teacher_engines import OwnEngines, teacher_engines
from sdpo_plugin.openrlhf_adapter.patch_points import overrides, patch_point

_BASE = patch_point("openrlhf.trainer.ppo_trainer:BasePPOTrainer")
_PPOTrainer: Any = patch_point("openrlhf.trainer.ppo_trainer:PPOTrainer")
_TrainingActor: Any = patch_point("openrlhf.trainer.ppo_trainer_async:TrainingActor")
_GenerateSamplesActor: Any = patch_point("openrlhf.trainer.ppo_trainer_async:GenerateSamplesActor")
_Controller: Any = object  # one of the two, which `ControllerHooks` is mixed into
patch_point("openrlhf.trainer.ppo_trainer_async:SamplesGenerator")
patch_point("openrlhf.trainer.ray.launcher:RayActorGroup.async_run_method", "method_name")
_WandbLogger: Any = patch_point("openrlhf.trainer.ppo_trainer:WandbLogger")
for _name in ("log_train", "log_eval"):
    patch_point(f"openrlhf.trainer.ppo_trainer:WandbLogger.{_name}", "global_step", "logs_dict")
patch_point("openrlhf.trainer.ppo_trainer:WandbLogger.close")


class WandbLogger(_WandbLogger):
    """logging_utils.py: gives W&B the arguments without what is secret in them; W&B's own key is among them."""

    @overrides("args")
    def __init__(self, args: Any) -> None:
        import wandb

        init = wandb.init
        wandb.init = lambda *given, config, **named: init(*given, config=masked(config), **named)
        try:
            super().__init__(args)
        finally:
            wandb.init = init


class LogHook:
    """logging_utils.py: in the place of `WandbLogger`, which it calls if there is one, and then the plugins."""

    def __init__(self, wandb: Any, args: Any) -> None:
        self.wandb, self.args = wandb, args

    def log_train(self, global_step: int, logs_dict: dict[str, Any]) -> None:
        if self.wandb is not None:
            self.wandb.log_train(global_step, logs_dict)
        self._log(global_step, logs_dict, evaluation=False)

    def log_eval(self, global_step: int, logs_dict: dict[str, Any]) -> None:
        if self.wandb is not None:
            self.wandb.log_eval(global_step, logs_dict)
        self._log(global_step, logs_dict, evaluation=True)

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.close()

    def _log(self, step: int, metrics: dict[str, Any], evaluation: bool) -> None:
        hook = plugins.active().hook
        hook.openrlhf_log(metrics=dict(metrics), step=step, evaluation=evaluation, args=self.args)


def bind(args: Any) -> None:
    """Let the controllers in this process build our classes, and draw the order of prompts from `--train.seed`.

    OpenRLHF seeds its policy workers in this way, but not the controller, whose data loader takes a seed from torch.
    """
    plugins.activate(args)
    dates.bind()
    ppo_trainer.PromptDataset = training_then_evaluation()
    ppo_trainer.SamplesGenerator = ppo_trainer_async.SamplesGenerator = SamplesGenerator
    ppo_trainer.RemoteExperienceMaker = ExperienceMaker
    ppo_trainer.WandbLogger = WandbLogger
    set_seed(args.train.seed)


class ControllerHooks(_Controller):
    """What the synchronous and the asynchronous controller have in common."""

    wandb_logger: Any
    stopped: StopTraining | None = None

    def __init__(self, pretrain: str, strategy: Any, *args: Any, **kwargs: Any) -> None:
        bind(strategy.args)
        super().__init__(pretrain, strategy, *args, **kwargs)
        self.wandb_logger = LogHook(self.wandb_logger, self.args)
        if plugins.algorithm() is not None:
            self.experience_maker.teacher_engines = teacher_engines(
                self.args, self.vllm_engines, self.actor_model_group
            )
        if not self.args.train.async_enable:
            self.samples_generator.on_group = self.experience_maker.group_sampled

    @overrides(of=_BASE)
    def fit(self, *args: Any, **kwargs: Any) -> None:
        hook = plugins.active().hook
        try:
            self._publish_teacher()
            super().fit(*args, **kwargs)
        except BaseException as error:
            hook.openrlhf_train_end(error=error, args=self.args)
            raise
        hook.openrlhf_train_end(error=None, args=self.args)

    @overrides("rollout_samples", "global_step", of=_BASE)
    def train_step(self, rollout_samples: Sequence[Any], global_step: int) -> tuple[dict[str, Any], int]:
        self.experience_maker.step = global_step + 1
        status, global_step = super().train_step(rollout_samples, global_step)
        hook, batch = plugins.active().hook, self.experience_maker.batch
        self.experience_maker.batch = None  # not to be held while the next one is made
        self._publish_teacher()
        if batch.reports:
            for reports in ray.get(self.actor_model_group.async_run_method(method_name="take_reports")):
                batch.collect_reports(reports)
        hook.openrlhf_after_training_step(batch=batch)
        status.update(batch.metrics)
        # OpenRLHF takes the sum of all `timing/` for the step's.
        status["timing/make_experience"] -= batch.metrics.get("timing/teacher_score", 0.0)
        try:
            hook.openrlhf_metrics(status=status, args=self.args)
        except StopTraining as reason:
            self.stopped = reason
        self._begin(global_step)
        return status, global_step

    @overrides("global_step", "logs_dict", "client_states", of=_BASE)
    def save_logs_and_checkpoints(self, global_step: int, logs_dict: Any = None, client_states: Any = None) -> None:
        client_states = {} if client_states is None else client_states
        if client_states.get("data_loader_state_dict", {}).get("_iterator_finished"):
            client_states["episode"] += 1  # the data loader starts a new one when it is restored
        plugins.active().hook.openrlhf_save_controller_state(states=client_states, args=self.args)
        if self.stopped is not None:
            self.args.ckpt.save_steps = 1
        super().save_logs_and_checkpoints(global_step, logs_dict, client_states)
        if self.stopped is not None:
            raise StopTraining(f"{self.stopped}; step {global_step} is saved in {self.args.ckpt.path}")

    @overrides(of=_BASE)
    def init_checkpoint_states(self) -> dict[str, Any]:
        # A run killed in its first save left a directory without a checkpoint: it starts anew.
        states: dict[str, Any] = {"episode": 0, "global_step": 0, "total_consumed_prompts": 0}
        states |= {"data_loader_state_dict": {}} | super().init_checkpoint_states()
        plugins.active().hook.openrlhf_load_controller_state(states=states, args=self.args)
        self._begin(states["global_step"])
        return states

    def _publish_teacher(self) -> None:
        """Send the teacher's own engines the weights that an EMA has for them."""
        if self.args.teacher.kind == "ema" and isinstance(own := self.experience_maker.teacher_engines, OwnEngines):
            with own.awake(tags=["weights"]):
                ray.get(self.actor_model_group.async_run_method(method_name="publish_teacher", engines=own.engines))

    def _begin(self, step: int) -> None:
        """After global step `step`: store what a restart needs."""


class Controller(ControllerHooks, _PPOTrainer):
    """ppo_trainer.py: `PPOTrainer`."""

    def _begin(self, step: int) -> None:
        self.samples_generator.order.step = step  # deterministic requests are seeded by it


class AsyncController(ControllerHooks, _TrainingActor):
    """ppo_trainer_async.py: `TrainingActor`."""

    @overrides()
    def broadcast_to_vllm(self) -> None:
        # Ray ships inherited methods by value, which breaks OpenRLHF's `super()` in this one; ours goes by name.
        super().broadcast_to_vllm()


class AsyncGenerator(_GenerateSamplesActor):
    """ppo_trainer_async.py: `GenerateSamplesActor`."""

    def __init__(self, pretrain: str, strategy: Any, *args: Any, **kwargs: Any) -> None:
        bind(strategy.args)
        super().__init__(pretrain, strategy, *args, **kwargs)
