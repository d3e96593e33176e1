"""Every hook, in the order a sample meets them: `from sdpo_plugin import hookimpl`, and implement those you need.

What they are given is in `interface.py`; `args` are OpenRLHF's nested arguments everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import argparse

    import torch

    from sdpo_plugin.interface.micro_batch import MicroBatch, RolloutBatch, Worker

PROJECT = "openrlhf"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# ── the launcher, before Ray starts and before any model loads (openrlhf/cli/train_ppo_ray.py) ──


@hookspec
def openrlhf_algorithms() -> list[type] | None:
    """Classes this plugin offers to `--algo` (`algorithm.SelfDistillation`, or a class with the same class attributes).

    The chosen one is made once in each process, with the arguments, and its hooks are registered.
    """


@hookspec
def openrlhf_add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add flags to OpenRLHF's parser. Dotted names become nested arguments (`--my.rate` -> `args.my.rate`)."""


@hookspec
def openrlhf_configure(args: Any) -> None:
    """Check the parsed, nested arguments, or complete them in place. Raise `ConfigError` to stop with a message."""


# ── the controller, which sees the whole batch (ppo_trainer.py, samples_generator.py, experience_maker.py) ──


@hookspec
def openrlhf_dataset(dataset: Any, evaluation: bool, args: Any) -> None:
    """A split was loaded (`datasets.Dataset`, every column there). Raise `ConfigError` if it cannot serve.

    Called in the launcher for each data set, before Ray starts, and on the controller for all of them as one.

    `evaluation`: it is the one of `--eval.dataset`, which nothing is trained on.
    """


@hookspec(firstresult=True)
def openrlhf_generation_prompt(prompt: str, record: dict[str, Any], tokenizer: Any, args: Any) -> list[int] | None:
    """Token ids behind which the engine samples a training response, in place of the prompt's own; None keeps them.

    What is recorded and trained on is the response behind the data set's prompt, which an agent's `reset` must return.
    """


@hookspec
def openrlhf_sample(sample: Any, response: dict[str, Any], args: Any) -> None:
    """A rollout became `sample` (OpenRLHF's `Experience`, one row) from the engine's `response`.

    `sample.record` is its data-set row, `sample.feedback` the reward function's text or None, and `sample.turns` has
    the feedback on each turn of an agent; attributes set here stay with the sample until `openrlhf_batch`.
    """


@hookspec
def openrlhf_needs(args: Any) -> Mapping[str, bool] | None:
    """What a micro-batch must provide: True for what this plugin reads, False for what it keeps others from reading.

    `old_log_probs`: the policy's log-probabilities from before the update; `log_probs`: a gradient through
    `micro_batch.log_probs`; `entropy`: `micro_batch.entropy`; `samples`: the student reads all of them. What one
    plugin needs is there for all. Without an answer from anyone it is as in OpenRLHF: everything but entropy.
    """


@hookspec
def openrlhf_batch(batch: RolloutBatch) -> None:
    """All samples of a step have their rewards. `batch.attach(...)` sends tensors along to the policy workers."""


@hookspec
def openrlhf_trained(batch: RolloutBatch) -> None:
    """The policy workers have trained on the batch; `batch.answers` has what they told about it (`batch.ask`)."""


@hookspec
def openrlhf_metrics(status: dict[str, Any], args: Any) -> None:
    """The step's metrics, before they reach progress bar, TensorBoard and W&B; change them in place."""


@hookspec
def openrlhf_log(metrics: dict[str, Any], step: int, evaluation: bool, args: Any) -> None:
    """What OpenRLHF gives its loggers of global step `step`: every `--logger.logging_steps`, and of each evaluation.

    Values are numbers; `generated_samples` is a text and its reward.
    """


@hookspec
def openrlhf_end(error: BaseException | None, args: Any) -> None:
    """The training is over: `error` is what ended it (`StopTraining`: a plugin did), or None. Not after a kill."""


@hookspec
def openrlhf_save_states(states: dict[str, Any], args: Any) -> None:
    """A checkpoint is about to be saved: add plain values that this process must have after a restart."""


@hookspec
def openrlhf_load_states(states: dict[str, Any], args: Any) -> None:
    """What `openrlhf_save_states` saved; empty in a run that starts anew."""


# ── every policy worker (ppo_actor.py) ──


@hookspec
def openrlhf_model(actor: Any, args: Any) -> None:
    """The policy model (`actor.model`) was built and DeepSpeed has not wrapped it: freeze parameters, add adapters."""


@hookspec
def openrlhf_worker_setup(worker: Worker) -> None:
    """Model, optimizer and tokenizer of this rank are ready."""


@hookspec
def openrlhf_device_tensors(worker: Worker) -> Iterable[torch.Tensor] | None:
    """This plugin's tensors in device memory that outlast a step, always in the same order.

    With `--ds.enable_sleep` they are in host memory while the optimizer is: their `data` points there.
    """


@hookspec
def openrlhf_before_forward(micro_batch: MicroBatch) -> None:
    """Before the student's forward pass: score teachers, set `micro_batch.head` to replace the LM head.

    Set `micro_batch.samples` (bool [B]) to let the student read only those, and `micro_batch.policy_weights` ([B]) to
    weigh samples in OpenRLHF's policy loss.
    """


@hookspec
def openrlhf_policy_loss(micro_batch: MicroBatch) -> None:
    """Replace or add to `micro_batch.loss`, OpenRLHF's scalar policy loss; `micro_batch.log_probs` are [B, A]."""


@hookspec
def openrlhf_optimizer_step(worker: Worker) -> None:
    """The optimizer has stepped (not called between accumulated micro-batches)."""


@hookspec
def openrlhf_save_checkpoint(worker: Worker, path: str) -> None:
    """OpenRLHF has saved its checkpoint into directory `path`; called on every rank."""


@hookspec
def openrlhf_load_checkpoint(worker: Worker, path: str) -> None:
    """OpenRLHF has restored the checkpoint in directory `path`; called on every rank, after worker set-up."""


@hookspec
def openrlhf_save_model(worker: Worker, path: str) -> None:
    """OpenRLHF has saved the final model into directory `path`; called on every rank."""
