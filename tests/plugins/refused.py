"""A plugin for test_openrlhf.py: the policy has a weight that the engine does not know, or one of another dtype."""

import torch

from sdpo_plugin import hookimpl


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--refused.dtype", default="bfloat16")


@hookimpl(trylast=True)
def openrlhf_worker_setup(worker):
    weight = torch.zeros(3, dtype=getattr(torch, worker.args.refused.dtype))
    worker.actor.model.module.register_parameter("unheard_of", torch.nn.Parameter(weight, requires_grad=False))
