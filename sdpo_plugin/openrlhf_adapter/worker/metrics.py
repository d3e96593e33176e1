"""Means of metrics over their own counts, through OpenRLHF's reduction, which supports response tokens and samples.

OpenRLHF adds what micro-batches and ranks report, each weighted by its response tokens, and divides by all of them. Sum
and number of a mean, divided by the micro-batch's tokens, come out of that with one denominator, which cancels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sdpo_plugin.openrlhf_adapter.failures import MetricsDiffer

TOTAL, COUNT = "total of ", "count of "
ALMOST_NO_TOKEN = 1e-6


def report(
    status: dict[str, Any], metrics: Mapping[str, Any], means: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    """Add a micro-batch's scalars, and its means as (total, count), to OpenRLHF's status of the training step.

    In the order of their names: OpenRLHF adds up what ranks report one by one, the n-th of one rank to the n-th of all.
    """
    tokens = max(status["num_action_tokens"], 1.0)
    # OpenRLHF divides by those of all ranks, and there is none where all samples of a micro-batch were skipped.
    status["num_action_tokens"] = max(status["num_action_tokens"], ALMOST_NO_TOKEN)
    found = dict(metrics)
    for name, (total, count) in means.items():
        found |= {TOTAL + name: total / tokens, COUNT + name: count / tokens}
    status["metrics"] = dict(sorted((status["metrics"] | found).items()))
    status["weights"].update(dict.fromkeys(found, "token"))
    return status


def require_same_names(
    status: dict[str, Any],
    gather: Callable[[torch.Tensor], torch.Tensor],
    gather_names: Callable[[list[str]], Sequence[list[str]]],
    plugins: Sequence[str],
) -> None:
    """Raise MetricsDiffer where the ranks are about to add up other metrics. Collective.

    Args:
        gather: of an int64 [1] on each rank, all ranks' [ranks]. gather_names: likewise of lists, where they differ.
        plugins: names of those that may have reported them.
    """
    # What has no weight OpenRLHF does not add up.
    names = [name for name in status["metrics"] if status["weights"][name] is not None]
    digest = hashlib.blake2b("\0".join(names).encode(), digest_size=8).digest()
    digests = gather(torch.tensor([int.from_bytes(digest, "big", signed=True)]))
    if (digests != digests[0]).any():
        raise MetricsDiffer(differences(gather_names(names), plugins))


def differences(names: Sequence[Sequence[str]], plugins: Sequence[str]) -> str:
    """Which metrics some ranks have and others do not, by the names that each rank has."""
    of_ranks = [{name.removeprefix(TOTAL).removeprefix(COUNT) for name in own} for own in names]
    found = []
    for name in sorted(set().union(*of_ranks)):
        without = [rank for rank, own in enumerate(of_ranks) if name not in own]
        if without:
            found.append(f"{name} is missing on rank {', '.join(map(str, without))} of {len(of_ranks)}")
    return f"metrics differ between ranks: {'; '.join(found)} (plugins that report any: {', '.join(plugins)})"


def means_of(status: dict[str, Any]) -> dict[str, Any]:
    """OpenRLHF's reduced status with the means in place; one of nothing is absent."""
    kept = {name: value for name, value in status.items() if not name.startswith((TOTAL, COUNT))}
    for name in [name.removeprefix(COUNT) for name in status if name.startswith(COUNT)]:
        if status[COUNT + name]:
            kept[name] = status[TOTAL + name] / status[COUNT + name]
    return kept
