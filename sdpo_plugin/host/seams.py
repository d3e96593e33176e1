"""Where the host is extended, how it is checked, and what runs in which process.

Nothing of the host is copied. Its remote classes and the classes they build are subclassed (`controller.py`,
`worker.py`, `engine.py`), and the names under which the host looks them up are bound to the subclasses.
"""

from __future__ import annotations

import inspect
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

TESTED = ("0.11.2",)


class SeamError(RuntimeError):
    """The installed host does not have the shape this adapter attaches to."""


@dataclass(frozen=True)
class Seam:
    """One attribute of the host we subclass, wrap or rebind.

    Attributes:
        name: what it is to us, for the error message.
        at: `package.module:attribute.path` (remote classes are looked through).
        parameters: those the adapter passes or receives; more may exist.
    """

    name: str
    at: str
    parameters: tuple[str, ...] = ()

    def problem(self) -> str | None:
        try:
            found = pkgutil.resolve_name(self.at.split(":")[0])
            for part in self.at.split(":")[1].split("."):
                found = plain_class(getattr(found, part))
        except (ImportError, AttributeError) as error:
            return f"not found ({error})"
        if self.parameters:
            has = inspect.signature(found).parameters
            missing = [p for p in self.parameters if p not in has]
            if missing:
                return f"takes ({', '.join(has)}), expected also ({', '.join(missing)})"
        return None


def plain_class(cls: Any) -> Any:
    """The class behind a `@ray.remote` class; anything else unchanged."""
    metadata = getattr(cls, "__ray_metadata__", None)
    return metadata.modified_class.__ray_actor_class__ if metadata is not None else cls


_TRAINER, _RAY = "openrlhf.trainer", "openrlhf.trainer.ray"
SEAMS = (
    Seam("data set", f"{_TRAINER}.ppo_trainer:PromptDataset.__getitem__", ("idx",)),
    Seam("rollout to sample", f"{_TRAINER}.ppo_trainer:SamplesGenerator._process_response_into_experience",
         ("response",)),
    Seam("generation", f"{_TRAINER}.ppo_trainer:SamplesGenerator._generate_vllm"),
    Seam("dispatch to the engines", f"{_TRAINER}.ppo_trainer:SamplesGenerator._dispatch_prompts_to_vllm",
         ("prompts", "labels")),
    Seam("evaluation", f"{_TRAINER}.ppo_trainer:SamplesGenerator.generate_eval_samples"),
    Seam("async rollout", f"{_TRAINER}.ppo_trainer_async:SamplesGenerator"),
    Seam("experience batch", f"{_TRAINER}.ppo_trainer:RemoteExperienceMaker.make_experience_batch",
         ("rollout_samples",)),
    Seam("pass for old log-probabilities", f"{_TRAINER}.ppo_trainer:RemoteExperienceMaker._dispatch_forward",
         ("group", "sync_condition")),
    Seam("batch after rewards", f"{_TRAINER}.ppo_trainer:RemoteExperienceMaker.compute_advantages_and_returns",
         ("experiences",)),
    Seam("training step of the controller", f"{_TRAINER}.ppo_trainer:BasePPOTrainer.train_step",
         ("rollout_samples", "global_step")),
    Seam("checkpoint of the controller", f"{_TRAINER}.ppo_trainer:BasePPOTrainer.save_logs_and_checkpoints",
         ("global_step", "logs_dict", "client_states")),
    Seam("resume of the controller", f"{_TRAINER}.ppo_trainer:BasePPOTrainer.init_checkpoint_states"),
    Seam("controller", f"{_TRAINER}.ppo_trainer:PPOTrainer.__init__"),
    Seam("async trainer", f"{_TRAINER}.ppo_trainer_async:TrainingActor.__init__"),
    Seam("async generator", f"{_TRAINER}.ppo_trainer_async:GenerateSamplesActor.__init__"),
    Seam("policy worker", f"{_RAY}.ppo_actor:PolicyModelActor.init_model_from_pretrained",
         ("strategy", "pretrain", "max_steps", "vllm_engines")),
    Seam("checkpoint", f"{_RAY}.ppo_actor:PolicyModelActor.save_checkpoint", ("tag",)),
    Seam("resume of the policy", "openrlhf.utils.deepspeed.deepspeed:DeepspeedStrategy.load_ckpt"),
    Seam("metric of a checkpoint", "openrlhf.utils.deepspeed.deepspeed:DeepspeedStrategy._read_ckpt_metric"),
    Seam("final model", f"{_RAY}.ppo_actor:PolicyModelActor.save_model"),
    Seam("order of micro-batches", f"{_RAY}.ppo_actor:DataLoader"),
    Seam("weight sync", f"{_RAY}.ppo_actor:ActorPPOTrainer.broadcast_to_vllm"),
    Seam("policy step", f"{_RAY}.ppo_actor:ActorPPOTrainer.training_step",
         ("experience", "kl_ctl", "step", "loss_batch_info")),
    Seam("policy model", f"{_RAY}.ppo_actor:Actor.forward",
         ("sequences", "action_mask", "attention_mask", "return_output", "return_entropy")),
    Seam("loss normaliser", f"{_RAY}.ppo_actor:iter_grad_accum_global_norm",
         ("data_iter", "strategy", "accumulated_gradient", "mask_fn")),
    Seam("loss aggregation", f"{_RAY}.ppo_actor:aggregate_loss", ("loss", "loss_mask", "token_level_loss")),
    Seam("engine", f"{_RAY}.vllm_engine:RolloutRayActor.__init__"),
    Seam("engine request", f"{_RAY}.vllm_engine:RolloutRayActor.generate_responses", ("prompt",)),
    Seam("engine generation", f"{_RAY}.vllm_engine:RolloutRayActor.generate", ("prompt_token_ids", "sampling_params")),
    Seam("reward function", "openrlhf.utils.agent:SingleTurnAgentExecutor._fetch_rewards_via_func",
         ("queries_list", "prompts_list", "labels_list")),
    Seam("reward server", "openrlhf.utils.agent:SingleTurnAgentExecutor._fetch_rewards_via_http",
         ("queries_list", "prompts_list", "labels_list")),
)


def check(seams: tuple[Seam, ...] = SEAMS) -> None:
    """Compare the installed host with what the adapter needs.

    Raises:
        SeamError: names every seam that does not fit, the host's version and the tested versions.
    """
    problems = [f"  {seam.name} ({seam.at}): {problem}" for seam in seams if (problem := seam.problem())]
    if problems:
        raise SeamError(
            f"openrlhf {version('openrlhf')} cannot be extended; tested with {', '.join(TESTED)}. Seams that moved:\n"
            + "\n".join(problems)
        )


def install() -> None:
    """Bind the host's names to our classes in the launcher process; Ray carries the classes to the others."""
    import ray
    from openrlhf.trainer import ppo_trainer, ppo_trainer_async
    from openrlhf.trainer.ray import ppo_actor, vllm_engine

    from sdpo_plugin.host import controller, engine, worker

    ppo_actor.PolicyModelActor = ray.remote(num_gpus=1)(worker.PolicyWorker)
    ppo_trainer.PPOTrainer = ray.remote(controller.Controller)
    ppo_trainer_async.TrainingActor = ray.remote(controller.AsyncController)
    ppo_trainer_async.GenerateSamplesActor = ray.remote(controller.AsyncGenerator)
    vllm_engine.RolloutRayActor = ray.remote(engine.Engine)
    ray.init = with_cpu_resources(ray.init)


def with_cpu_resources(init: Callable[..., Any]) -> Callable[..., Any]:
    """`ray.init` as the host calls it, plus what a run on a machine without CUDA needs; no change elsewhere."""
    from sdpo_plugin.host import cpu, nursery

    def call(*args: Any, **kwargs: Any) -> Any:
        if not os.environ.get(cpu.ENABLED):
            return init(*args, **kwargs)
        environment = dict(kwargs.get("runtime_env") or {})
        environment["worker_process_setup_hook"] = "sdpo_plugin.host.cpu.enable"
        if nursery.EXECUTABLE in os.environ:
            environment["py_executable"] = os.environ[nursery.EXECUTABLE]
        kwargs["runtime_env"] = environment
        if args or kwargs.get("address") or os.environ.get("RAY_ADDRESS"):
            return init(*args, **kwargs)
        # Ray hands out one GPU and one CPU per model process; here both are only names for processes.
        kwargs |= {"num_gpus": 64, "num_cpus": 64, "include_dashboard": False}
        try:
            return init(**kwargs)
        except Exception as error:
            # Ray gives its own helpers 15 s to start, which is too little on a busy machine once in a while.
            if "timed out during startup" not in str(error):
                raise
            return init(**kwargs)

    return call
