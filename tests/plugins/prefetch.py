"""A plugin for test_prefetch.py: counts DeepSpeed's traces that were given up, and passes that had none, at ZeRO-3.

A trace is the order of modules of the last pass, by which the next pass's weights are gathered ahead of their use.
"""

from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

from sdpo_plugin import hookimpl

FOUND = {"given_up": 0, "passes": 0, "traced": 0}


@hookimpl
def openrlhf_worker_setup(worker):
    given_up, reset = Coordinator._invalidate_trace, Coordinator.reset_step

    def counted_given_up(coordinator):
        FOUND["given_up"] += 1
        given_up(coordinator)

    def counted_reset(coordinator):
        reset(coordinator)
        FOUND["passes"] += 1
        FOUND["traced"] += coordinator.is_complete_trace()

    Coordinator._invalidate_trace, Coordinator.reset_step = counted_given_up, counted_reset


@hookimpl
def openrlhf_policy_loss(micro_batch):
    micro_batch.metrics |= {f"prefetch/{name}": float(value) for name, value in FOUND.items()}
