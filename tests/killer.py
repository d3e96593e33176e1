"""A plugin for test_resume.py: at one moment of step 2, everything a run consists of is killed at once."""

import os
import signal

from sdpo_plugin.host.hookspecs import hookimpl

POINTS = ("batch", "optimizer_step", "save_checkpoint")


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--killer.at", choices=POINTS)
    parser.add_argument("--killer.marker", help="a file that exists once the run was killed")


def kill(args, point, step):
    if args.killer.at == point and step == 2:
        open(args.killer.marker, "w").close()
        os.killpg(os.getpgrp(), signal.SIGKILL)


steps = {"batch": 0, "optimizer_step": 0}


@hookimpl(trylast=True)
def openrlhf_batch(batch):
    """Between rollout and update."""
    steps["batch"] += 1
    kill(batch.args, "batch", steps["batch"])


@hookimpl(tryfirst=True)
def openrlhf_optimizer_step(worker):
    """The student has moved, the teacher has not followed yet."""
    steps["optimizer_step"] += 1
    kill(worker.args, "optimizer_step", steps["optimizer_step"])


@hookimpl(tryfirst=True)
def openrlhf_save_checkpoint(worker, path):
    """DeepSpeed's files are there, the teacher's are not."""
    kill(worker.args, "save_checkpoint", int(path.rsplit("global_step")[-1]))
