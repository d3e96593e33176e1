"""A plugin for tests of robustness: one thing goes wrong on one process, in step 2, and a file says when."""

import os
import signal
from pathlib import Path

from sdpo_plugin import hookimpl

FAULTS = ("loss", "gradient", "worker", "controller")


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--fault.at", choices=FAULTS)
    parser.add_argument("--fault.marker", help="a file that exists once it has happened")


steps = {"batch": 0, "optimizer_step": 0}


def happens(args, at):
    if args.fault.at == at and max(steps.values()) == (2 if at == "controller" else 1):
        Path(args.fault.marker).touch()
        return True
    return False


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@hookimpl(trylast=True)
def openrlhf_rollout_batch(batch):
    steps["batch"] += 1
    if happens(batch.args, "controller"):
        die()


@hookimpl
def openrlhf_worker_setup(worker):
    """The last rank's gradient of one weight is NaN."""
    if worker.rank == worker.ranks - 1:
        parameter = next(p for p in worker.actor.model.module.parameters() if p.requires_grad)
        parameter.register_hook(lambda g: g * float("nan") if happens(worker.args, "gradient") else g)


@hookimpl(trylast=True)
def openrlhf_policy_loss(micro_batch):
    worker = micro_batch.worker
    if worker.rank == worker.ranks - 1:
        if happens(worker.args, "loss"):
            micro_batch.loss = micro_batch.loss * float("nan")
        if happens(worker.args, "worker"):
            die()


@hookimpl
def openrlhf_optimizer_step(worker):
    steps["optimizer_step"] += 1
