"""A plugin for test_sleep.py: notes where tensors are while the policy trains, and while it does not."""

import json

from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

from sdpo_plugin import hookimpl, plugins

OPTIMIZER = {"fp32 weights": State.hp_params, "moments": State.optim_states}


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--whereabouts.out", required=True)


def places(tensors, asleep):
    return {"host" if t.untyped_storage().data_ptr() in asleep else "device" for t in tensors}


def note(worker, phase):
    teacher, optimizer = plugins.algorithm().teacher, worker.actor.model.optimizer
    asleep = {kept.untyped_storage().data_ptr() for kept in worker.sleeper.kept}
    found = {name: ["host" if state in optimizer.offloaded_states else "device"] for name, state in OPTIMIZER.items()}
    found["student"] = places((getattr(p, "ds_tensor", p) for p in worker.actor.model.module.parameters()), asleep)
    own = getattr(teacher.model, "actor", worker.actor)
    if own is not worker.actor:
        found["teacher"] = places((getattr(p, "ds_tensor", p) for p in own.model.module.parameters()), asleep)
    if hasattr(teacher, "residual"):
        found["residual"] = places(teacher.residual.values(), asleep)
    with open(f"{worker.args.whereabouts.out}.{worker.rank}", "a") as file:
        file.write(json.dumps([phase, {name: sorted(where) for name, where in found.items()}]) + "\n")


@hookimpl(trylast=True)
def openrlhf_worker_setup(worker):
    broadcast = worker.trainer.broadcast_to_vllm

    def noted():
        note(worker, "weights to engines")
        broadcast()

    worker.trainer.broadcast_to_vllm = noted


@hookimpl
def openrlhf_optimizer_step(worker):
    note(worker, "training")


@hookimpl
def openrlhf_save_checkpoint(worker, path):
    note(worker, "checkpoint")
