"""Binds OpenRLHF's names to our classes in the launcher; Ray carries the classes to the other processes."""

from __future__ import annotations

import ray
from openrlhf.trainer import ppo_trainer, ppo_trainer_async
from openrlhf.trainer.ray import ppo_actor, vllm_engine

from sdpo_plugin.host import controller, cpu, engine, worker


def install() -> None:
    ppo_actor.PolicyModelActor = ray.remote(num_gpus=1)(worker.PolicyWorker)
    ppo_trainer.PPOTrainer = ray.remote(controller.Controller)
    ppo_trainer_async.TrainingActor = ray.remote(controller.AsyncController)
    ppo_trainer_async.GenerateSamplesActor = ray.remote(controller.AsyncGenerator)
    vllm_engine.RolloutRayActor = ray.remote(engine.Engine)
    ray.init = cpu.with_resources(ray.init)
