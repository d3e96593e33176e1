"""A plugin for test_teacher.py: follows the student beside the EMA teacher, in float64, and measures its memory."""

import torch
from largest import LargestTensor

from sdpo_plugin import hookimpl, plugins
from sdpo_plugin.interface import models


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--probe.out", required=True)
    parser.add_argument("--probe.piece_bytes", type=int, required=True)


def fragments(worker):
    return {name: f.values.double() for name, f in worker.master_weights.fragments().items()}


def teacher_of(worker):
    return plugins.algorithm().teacher


@hookimpl(trylast=True)
def openrlhf_worker_setup(worker):
    models.MAX_CHUNK_BYTES = worker.args.probe.piece_bytes
    worker.start, worker.replayed = fragments(worker), fragments(worker)
    teacher, worker.largest = teacher_of(worker), {}
    for name in ("after_optimizer_step", "save"):
        setattr(teacher, name, measured(worker.largest, getattr(teacher, name)))


def measured(largest, function):
    """`function`, with the bytes of the largest tensor it makes noted under its name."""

    def call(*args):
        with LargestTensor() as made:
            function(*args)
        largest[function.__name__] = max(largest.get(function.__name__, 0), made.bytes)

    return call


@hookimpl(trylast=True)
def openrlhf_optimizer_step(worker):
    for name, student in fragments(worker).items():
        worker.replayed[name].lerp_(student, worker.args.teacher.update_rate)


@hookimpl
def openrlhf_save_model(worker, path):
    average = {}
    for name, values in teacher_of(worker).weights():
        average.setdefault(name, []).append(values)
    parts = {}
    for name, expected in worker.replayed.items():
        error = torch.cat(average[name]) - expected
        parts[name] = (error.square().sum(), (expected - worker.start[name]).square().sum())
    torch.save({"parts": parts, "largest": worker.largest}, f"{worker.args.probe.out}.{worker.rank}")
