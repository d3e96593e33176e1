"""Binds OpenRLHF's names to our classes in the launcher; Ray carries the classes to the other processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from openrlhf.trainer import ppo_trainer, ppo_trainer_async
from openrlhf.trainer.ray import ppo_actor, vllm_engine

from sdpo_plugin.monitoring.masking import masked
from sdpo_plugin.openrlhf_adapter.controller import controller
from sdpo_plugin.openrlhf_adapter.engine import engine
from sdpo_plugin.openrlhf_adapter.launcher import quiet
from sdpo_plugin.openrlhf_adapter.patch_points import patch_point
from sdpo_plugin.openrlhf_adapter.platform import cpu
from sdpo_plugin.openrlhf_adapter.worker import worker

_Strategy: Any = patch_point("openrlhf.utils.deepspeed:DeepspeedStrategy")
patch_point("openrlhf.utils.deepspeed:DeepspeedStrategy.print")


def install() -> None:
    _Strategy.print = without_secrets(_Strategy.print)
    ppo_actor.PolicyModelActor = ray.remote(num_gpus=1)(worker.PolicyWorker)
    ppo_trainer.PPOTrainer = ray.remote(controller.Controller)
    ppo_trainer_async.TrainingActor = ray.remote(controller.AsyncController)
    ppo_trainer_async.GenerateSamplesActor = ray.remote(controller.AsyncGenerator)
    vllm_engine.RolloutRayActor = ray.remote(engine.Engine)
    ray.init = cpu.with_resources(quiet.in_workers(ray.init))


def without_secrets(show: Callable[..., None]) -> Callable[..., None]:
    """`DeepspeedStrategy.print`, with which OpenRLHF's launcher shows all arguments."""
    return lambda strategy, *shown: show(strategy, *map(masked, shown))
