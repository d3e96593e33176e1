"""Labels that no response can satisfy, found before a run starts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from sdpo_plugin.config import ConfigError
from sdpo_plugin.environments import label_check


def check(args: Any, where: str, rows: Any) -> None:
    """Check the labels of a dataset, if the reward comes from an environment of this package or from a server.

    Other reward functions are not run before the training.

    Args:
        where: flag and name of the dataset.

    Raises:
        ConfigError: names column, dataset and number of such rows, and of the first ones row, label and reason.
    """
    url = (args.reward.remote_url or "").split(",")[0]
    if not url or args.train.agent_func_path:
        return
    key = args.data.label_key
    file = label_check.environment(url)
    if file is None:
        if key and not url.endswith(".py"):
            sendable(f"--data.label_key {key}: {where}", rows[key])
        return
    total = len(rows) if key else 1

    def note(done: int) -> None:
        print(f"openrlhf-sdpo: {where}: {done} of {total} labels checked by {file.name}", flush=True)

    try:
        found = label_check.faults(file, rows[key] if key else [""], note)
    except label_check.CannotCheck as error:
        raise ConfigError(
            f"--reward.remote_url {url}: cannot run on this machine ({error}); install what docs/environments.md lists"
        ) from error
    if found.number and not key:
        raise ConfigError(f"{where}: {file.name} needs labels; give --data.label_key with the column that has them")
    if found.number:
        listed = "; ".join(f"row {row} has {_shown(label)}: {reason}" for row, label, reason in found.first)
        raise ConfigError(
            f"--data.label_key {key}: {where}: no response can satisfy the label of {found.number} of {found.rows} "
            f"rows ({file.name}): {listed}; correct these labels, or remove the rows"
        )
    if 0 < found.rows < total:
        in_time = f"{found.rows} of {total} labels were checked in {label_check.TOTAL:g} s; the rest are not checked"
        print(f"openrlhf-sdpo: {where}: {in_time}", flush=True)


def sendable(what: str, labels: Iterable[Any]) -> None:
    """Labels for a reward server, which is sent JSON."""
    for row, label in enumerate(labels):
        try:
            json.dumps(label)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{what}: row {row} has {_shown(label)}, a {type(label).__name__}, which cannot be sent to a reward "
                "server as JSON; store it in the dataset as text"
            ) from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
