"""A plugin for test_resume.py and kills.py: at one moment, everything a run consists of is killed at once."""

import os
import signal
import threading

from sdpo_plugin import hookimpl

POINTS = ("batch", "optimizer_step", "save_checkpoint")


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--killer.at", choices=POINTS, help="in step 2")
    parser.add_argument("--killer.delay", type=float, help="seconds after the rollout of step 1")
    parser.add_argument("--killer.marker", help="a file that exists once the run was killed")


def kill(args):
    open(args.killer.marker, "w").close()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def kill_at(args, point, step):
    if args.killer.at == point and step == 2:
        kill(args)


steps = {"batch": 0, "optimizer_step": 0}


@hookimpl(trylast=True)
def openrlhf_rollout_batch(batch):
    """Between rollout and update."""
    steps["batch"] += 1
    if batch.args.killer.delay is not None and steps["batch"] == 1:
        threading.Timer(batch.args.killer.delay, kill, [batch.args]).start()
    kill_at(batch.args, "batch", steps["batch"])


@hookimpl(tryfirst=True)
def openrlhf_optimizer_step(worker):
    """The student has moved, the teacher has not followed yet."""
    steps["optimizer_step"] += 1
    kill_at(worker.args, "optimizer_step", steps["optimizer_step"])


@hookimpl(tryfirst=True)
def openrlhf_save_checkpoint(worker, path):
    """DeepSpeed's files are there, the teacher's are not."""
    kill_at(worker.args, "save_checkpoint", int(path.rsplit("global_step")[-1]))
