"""A plugin for test_teacher.py: follows the student beside the EMA teacher, in float64."""

import torch

from sdpo_plugin.host import manager
from sdpo_plugin.host.hookspecs import hookimpl


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--probe.out", required=True)


def fragments(worker):
    return {name: f.values.double() for name, f in worker.masters.fragments().items()}


@hookimpl(trylast=True)
def openrlhf_worker_setup(worker):
    worker.start, worker.replayed = fragments(worker), fragments(worker)


@hookimpl(trylast=True)
def openrlhf_optimizer_step(worker):
    for name, student in fragments(worker).items():
        worker.replayed[name].lerp_(student, worker.args.teacher.update_rate)


@hookimpl
def openrlhf_save_model(worker, path):
    teacher = manager.of(worker.args).get_plugin("algorithm sdpo").teacher
    found = {}
    average = teacher.average()
    for name, expected in worker.replayed.items():
        error = average[name] - expected
        found[name] = (error.square().sum(), (expected - worker.start[name]).square().sum())
    found = {name: [value.detach() for value in values] for name, values in found.items()}
    torch.save(found, f"{worker.args.probe.out}.{worker.rank}")
