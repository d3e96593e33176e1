"""A plugin that ends a run at its first success: `--plugins recipes.test_time.until_solved`."""

from __future__ import annotations

from typing import Any

from sdpo_plugin import StopTraining, hookimpl


@hookimpl
def openrlhf_metrics(status: dict[str, Any], args: Any) -> None:
    if status["reward"] > 0:  # the mean over the step's attempts, each 0 or 1
        raise StopTraining(f"solved by {status['reward']:.0%} of this step's attempts")
