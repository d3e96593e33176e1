"""Every hook, in the order a sample meets them: `from sdpo_plugin import hookimpl`, and implement what you need.

What hooks are given is in `interface/`; `args` are OpenRLHF's nested arguments everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import argparse

    import torch

    from sdpo_plugin.interface.micro_batch import MicroBatch
    from sdpo_plugin.interface.models import Worker
    from sdpo_plugin.interface.rollout_batch import RolloutBatch

PROJECT = "openrlhf"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# ── the launcher, before Ray starts and before any model loads (openrlhf/cli/train_ppo_ray.py) ──


@hookspec
def openrlhf_algorithms() -> list[type] | None:
    """Classes this plugin offers to `--algo` (`SelfDistillation`, or a class with the same class attributes).

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
    """A split was loaded (`datasets.Dataset`, with all its columns). Raise `ConfigError` to reject it.

    Called in the launcher for each dataset, before Ray starts, and on the controller for all of them as one.

    `evaluation`: True for `--eval.dataset`, on which nothing is trained.
    """


@hookspec(firstresult=True)
def openrlhf_generation_prompt(prompt: str, record: dict[str, Any], tokenizer: Any, args: Any) -> list[int] | None:
    """Token ids from which the engine samples a training response, in place of the prompt's own; None keeps them.

    The response is recorded and trained on after the dataset's prompt, which an agent's `reset` must return.
    """


@hookspec
def openrlhf_record_columns(args: Any) -> Iterable[str] | None:
    """Columns of `sample.record` that this plugin reads once the batch is made, from `openrlhf_rollout_batch` on.

    Asynchronous runs send them, and the prompt's, through Ray's queue to the controller, and no others.
    """


@hookspec
def openrlhf_rollout_sample(sample: Any, response: dict[str, Any], args: Any) -> None:
    """A rollout became `sample` (OpenRLHF's `Experience`, one row) from the engine's `response`.

    `sample.record` is its dataset row, the same for siblings, `sample.feedback` the reward function's text or None, and
    `sample.turns` has the feedback on each turn of an agent. Attributes set here stay with the sample until
    `openrlhf_rollout_batch`.
    """


@hookspec
def openrlhf_rollout_group(batch: RolloutBatch) -> None:
    """All samples of one prompt have their rewards, and other prompts are still sampled: begin what takes time.

    `batch` has these samples alone, and sends nothing anywhere. Not called in asynchronous runs, nor with a reward
    model. The group may be left out of training.
    """


@hookspec
def openrlhf_requirements(args: Any) -> Mapping[str, bool] | None:
    """What a micro-batch must provide: True for a value that this plugin uses, False for one that it does not need.

    `old_log_probs`: the policy's log-probabilities from before the update; `log_probs`: a gradient through
    `micro_batch.log_probs`; `entropy`: `micro_batch.entropy`; `all_samples`: the student's forward pass over all of
    them. A value is computed if any plugin uses it. By default it is as in OpenRLHF: everything but entropy.
    """


@hookspec
def openrlhf_rollout_batch(batch: RolloutBatch) -> None:
    """All samples of a step have their rewards. `batch.attach(...)` sends tensors along to the policy workers."""


@hookspec(firstresult=True)
def openrlhf_answer(response: str, record: dict[str, Any], args: Any) -> str | None:
    """The final answer of a response in a form in which equal answers are equal texts; "": it has none.

    Called for `--reprompt.demonstration consensus`, which counts them. `record` is the dataset row. By default it is
    the answer that `environments/maths.py` finds. With None the next plugin's counts.
    """


@hookspec
def openrlhf_after_training_step(batch: RolloutBatch) -> None:
    """The policy workers have trained on the batch; `batch.reports` has what they reported (`batch.request`)."""


@hookspec
def openrlhf_metrics(status: dict[str, Any], args: Any) -> None:
    """The step's metrics, before they reach progress bar, TensorBoard and W&B; change them in place."""


@hookspec
def openrlhf_log(metrics: dict[str, Any], step: int, evaluation: bool, args: Any) -> None:
    """What OpenRLHF gives its loggers at global step `step`: every `--logger.logging_steps`, and at each evaluation.

    Values are numbers; `generated_samples` is a text and its reward.
    """


@hookspec
def openrlhf_train_end(error: BaseException | None, args: Any) -> None:
    """The training is over: `error` is what ended it (`StopTraining`: a plugin did), or None. Not after a kill."""


@hookspec
def openrlhf_save_controller_state(states: dict[str, Any], args: Any) -> None:
    """A checkpoint is about to be saved: add plain values that this process must have after a restart."""


@hookspec
def openrlhf_load_controller_state(states: dict[str, Any], args: Any) -> None:
    """What `openrlhf_save_controller_state` saved; empty in a run that starts anew."""


# ── every policy worker (ppo_actor.py) ──


@hookspec
def openrlhf_model_built(actor: Any, args: Any) -> None:
    """The policy model (`actor.model`) was built and DeepSpeed has not wrapped it: freeze parameters, add adapters."""


@hookspec
def openrlhf_worker_setup(worker: Worker) -> None:
    """Model, optimizer and tokenizer of this rank are ready."""


@hookspec
def openrlhf_device_tensors(worker: Worker) -> Iterable[torch.Tensor] | None:
    """This plugin's tensors in device memory that outlast a step, always in the same order.

    With `--ds.enable_sleep` they are in CPU memory while the optimizer is: their `data` points there.
    """


@hookspec
def openrlhf_before_forward(micro_batch: MicroBatch) -> None:
    """Before the student's forward pass: score teachers, set `micro_batch.head_fn` to replace the LM head.

    Set `micro_batch.sample_mask` (bool [B]) to have the student score only those samples, and
    `micro_batch.policy_weights` ([B]) to weigh samples in OpenRLHF's policy loss.
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
