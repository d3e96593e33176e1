"""A plugin for test_teacher.py: of the whole model only the last norm is trained."""

from sdpo_plugin import hookimpl


@hookimpl
def openrlhf_model_built(actor, args):
    for name, parameter in actor.model.named_parameters():
        parameter.requires_grad_(name == "model.norm.weight")
