"""Means of metrics over whatever they are of, through OpenRLHF's reduction, which knows response tokens and samples.

OpenRLHF adds what micro-batches and ranks report, each weighted by its response tokens, and divides by all of them. Sum
and number of a mean, divided by the micro-batch's tokens, come out of that with one denominator, which cancels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOTAL, COUNT = "total of ", "count of "


def report(
    status: dict[str, Any], metrics: Mapping[str, Any], means: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    """Add a micro-batch's scalars, and its means as (total, count), to OpenRLHF's status of the training step."""
    tokens = max(status["num_action_tokens"], 1.0)
    found = dict(metrics)
    for name, (total, count) in means.items():
        found |= {TOTAL + name: total / tokens, COUNT + name: count / tokens}
    status["metrics"].update(found)
    status["weights"].update(dict.fromkeys(found, "token"))
    return status


def means_of(status: dict[str, Any]) -> dict[str, Any]:
    """OpenRLHF's reduced status with the means in place; one of nothing is absent."""
    kept = {name: value for name, value in status.items() if not name.startswith((TOTAL, COUNT))}
    for name in [name.removeprefix(COUNT) for name in status if name.startswith(COUNT)]:
        if status[COUNT + name]:
            kept[name] = status[TOTAL + name] / status[COUNT + name]
    return kept
