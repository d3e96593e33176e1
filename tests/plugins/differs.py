"""A plugin for test_failures.py: in step 2 one rank reports a metric, or a mean, that the others do not have."""

from sdpo_plugin import hookimpl

steps = {"optimizer_step": 0}


@hookimpl
def openrlhf_policy_loss(micro_batch):
    micro_batch.metrics["differs/everywhere"] = 1.0
    if steps["optimizer_step"] == 1 and micro_batch.worker.rank == 1:
        micro_batch.metrics["differs/here"] = 1.0
    elif steps["optimizer_step"] == 1:
        micro_batch.log_mean("differs/there", 1.0, 1.0)


@hookimpl
def openrlhf_optimizer_step(worker):
    steps["optimizer_step"] += 1
