"""`python -m openrlhf.cli.train_ppo_ray --algo NAME ...` becomes `openrlhf-sdpo train --algo NAME ...`.

So does every command line with `--config`, `--plugins`, `--platform`, `--logger.mlflow.*` or `--logger.swanlab.*`, and
any at all where another distribution has installed a plugin, which is to act. Else OpenRLHF's command is left alone.
Imported by `startup.pth` when an interpreter starts for OpenRLHF's launcher.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable

LAUNCHER = "openrlhf.cli.train_ppo_ray"
ENTRY_POINTS = "openrlhf.plugins"
ALLOWED = "OPENRLHF_PLUGINS"  # the names of installed plugins that may be loaded, if not all of them
FLAGS = ("--algo", "--config", "--plugins", "--platform")
LOGGERS = ("--logger.mlflow.", "--logger.swanlab.")


def redirect(command: list[str], installed: Iterable[str]) -> list[str] | None:
    """The command line to run instead of `command` (`sys.orig_argv`), or None. installed: names of other plugins."""
    if LAUNCHER not in command:
        return None
    at = command.index(LAUNCHER)
    arguments = command[at + 1 :]
    asked = any(a.split("=", 1)[0] in FLAGS or a.startswith(LOGGERS) for a in arguments) or any(installed)
    if command[at - 1] != "-m" or not asked:
        return None
    return [*command[:at], "sdpo_plugin", "train", *arguments]


def other_plugins() -> list[str]:
    """Entry points of other distributions that are not left out by the environment."""
    allowed = os.environ.get(ALLOWED)
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    names = [entry.name for entry in found if not entry.value.startswith("sdpo_plugin.")]
    return [name for name in names if allowed is None or name in allowed.split(",")]


_installed = LAUNCHER in sys.orig_argv and importlib.util.find_spec("openrlhf") is not None  # else Python says it best
if _installed and (_command := redirect(sys.orig_argv, other_plugins())) is not None:
    os.execv(sys.executable, [sys.executable, *_command[1:]])
