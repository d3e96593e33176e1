"""Metrics of plugins on their way through OpenRLHF's reduction: one order, and the same names on every rank."""

import threading

import pytest
import torch

from sdpo_plugin.openrlhf_adapter.platform import cpu


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    cpu.enable()


def status(metrics, means=(), tokens=4.0):
    from sdpo_plugin.openrlhf_adapter.worker.metrics import report

    own = {"metrics": {"policy_loss": 1.0, "actor_lr": 0.1}, "weights": {"policy_loss": "token", "actor_lr": None}}
    return report({**own, "num_action_tokens": tokens}, metrics, dict(means))


def on_ranks(statuses):
    """What `require_same_names` raises on each rank, each a thread, and how often lists of names were gathered."""
    from sdpo_plugin.openrlhf_adapter.worker.metrics import require_same_names

    together, given, lists, raised, gathered = threading.Barrier(len(statuses), timeout=10), {}, {}, {}, []

    def rank(number):
        def gather(value):
            given[number] = value
            together.wait()
            return torch.cat([torch.as_tensor(given[i]) for i in range(len(statuses))])

        def gather_names(names):
            gathered.append(number)
            lists[number] = names
            together.wait()
            return [lists[i] for i in range(len(statuses))]

        try:
            require_same_names(statuses[number], gather, gather_names, ["a", "b"])
        except RuntimeError as error:
            raised[number] = str(error)

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(len(statuses))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised, gathered


def test_the_order_in_which_a_plugin_reports_does_not_matter():
    one, other = status({"x": 1.0, "b": 2.0}, {"m": (1.0, 2.0)}), status({"b": 2.0, "x": 1.0}, {"m": (1.0, 2.0)})
    assert list(one["metrics"]) == list(other["metrics"]) == sorted(one["metrics"]) and len(one["metrics"]) == 6
    assert on_ranks([one, other, one]) == ({}, [])


def test_what_is_not_added_up_may_differ():
    later = status({})
    later["metrics"]["actor_grad_norm"], later["weights"]["actor_grad_norm"] = 1.0, None
    assert on_ranks([status({}), later]) == ({}, [])


def test_metrics_that_differ_are_named_on_every_rank():
    raised, _ = on_ranks([status({"a/x": 1.0}), status({"a/x": 1.0}, {"b/m": (0.0, 0.0)}), status({"a/y": 1.0})])
    assert len(raised) == 3 and len(set(raised.values())) == 1
    assert raised[0] == (
        "metrics differ between ranks: a/x is missing on rank 2 of 3; a/y is missing on rank 0, 1 of 3; "
        "b/m is missing on rank 0, 2 of 3 (plugins that report any: a, b)"
    )


def test_a_micro_batch_without_a_token_is_none_of_the_mean():
    """All of its samples may be skipped. OpenRLHF divides by the tokens of all ranks' micro-batches."""
    from sdpo_plugin.openrlhf_adapter.worker.metrics import means_of

    found = status({"x": 3.0}, {"m": (0.0, 0.0)}, tokens=0.0)
    assert found["num_action_tokens"] > 0
    both = [found, status({"x": 1.0}, {"m": (2.0, 4.0)})]
    tokens = sum(one["num_action_tokens"] for one in both)
    reduced = {
        name: sum(one["metrics"][name] * one["num_action_tokens"] for one in both) / tokens
        for name in found["metrics"] if found["weights"][name]
    }  # fmt: skip
    assert means_of(reduced) == pytest.approx({"policy_loss": 1.0, "x": 1.0, "m": 0.5})
