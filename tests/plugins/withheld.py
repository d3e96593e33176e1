"""A plugin for tests/slow/images.py: the teacher is shown gray pictures in the place of the student's."""

from sdpo_plugin import hookimpl
from sdpo_plugin.interface.micro_batch import MicroBatch


@hookimpl(tryfirst=True)
def openrlhf_before_forward(micro_batch):
    gray = [{**own, "pixel_values": own["pixel_values"] * 0.0} for own in micro_batch.experience.mm_train_inputs]
    micro_batch.__class__ = type("Withheld", (MicroBatch,), {"images": property(lambda self: gray)})


@hookimpl(trylast=True, specname="openrlhf_before_forward")
def shown_again(micro_batch):
    micro_batch.__class__ = MicroBatch
