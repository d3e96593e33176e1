"""A plugin for test_agents.py: writes down what the algorithm attaches to the samples."""

import torch

from sdpo_plugin import hookimpl


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--attached.out", required=True)


@hookimpl(tryfirst=True)
def openrlhf_rollout_batch(batch):
    attach, found = batch.attach, {}

    def note(name, values):
        found[name] = values
        torch.save(found, batch.args.attached.out)
        attach(name, values)

    batch.attach = note
