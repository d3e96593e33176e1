"""`python -m openrlhf.cli.train_ppo_ray --algo NAME ...` becomes `openrlhf-sdpo train --algo NAME ...`.

Imported by `startup.pth` when an interpreter starts for OpenRLHF's launcher; OpenRLHF knows neither `--algo` nor
`--config`, so without them its command line is left alone.
"""

from __future__ import annotations

import os
import sys

LAUNCHER = "openrlhf.cli.train_ppo_ray"


def redirect(command: list[str]) -> list[str] | None:
    """The command line to run instead of `command` (`sys.orig_argv`), or None."""
    if LAUNCHER not in command:
        return None
    at = command.index(LAUNCHER)
    arguments = command[at + 1 :]
    asked = any(a.split("=", 1)[0] in ("--algo", "--config") for a in arguments)
    if command[at - 1] != "-m" or not asked:
        return None
    return [*command[:at], "sdpo_plugin.host.cli", "train", *arguments]


if (_command := redirect(sys.orig_argv)) is not None:
    os.execv(sys.executable, [sys.executable, *_command[1:]])
