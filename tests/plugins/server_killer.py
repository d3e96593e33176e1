"""A plugin for test_teacher_engines.py: kills a process, the teacher's server, after the first step."""

import os
import signal

from sdpo_plugin import hookimpl


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--server.pid", type=int, required=True)


@hookimpl
def openrlhf_after_training_step(batch):
    if batch.step == 1:
        os.killpg(batch.args.server.pid, signal.SIGKILL)
