"""The plugin that this package is to OpenRLHF: its algorithms and their options (entry point `openrlhf.plugins`)."""

from __future__ import annotations

import argparse
from typing import Any

from sdpo_plugin.config import GROUPS, ConfigError, from_namespace
from sdpo_plugin.flags import add_group
from sdpo_plugin.hookspecs import hookimpl


@hookimpl
def openrlhf_algorithms() -> list[type]:
    from sdpo_plugin.algorithms.fsd import FSD
    from sdpo_plugin.algorithms.opd import OPD
    from sdpo_plugin.algorithms.opsd import OPSD
    from sdpo_plugin.algorithms.rlcsd import RLCSD
    from sdpo_plugin.algorithms.rlsd import RLSD
    from sdpo_plugin.algorithms.sdft import SDFT
    from sdpo_plugin.algorithms.sdpg import SDPG
    from sdpo_plugin.algorithms.sdpo import SDPO
    from sdpo_plugin.algorithms.sdzero import SDZERO
    from sdpo_plugin.algorithms.srpo import SRPO

    return [SDPO, SDFT, OPSD, SRPO, RLSD, RLCSD, SDPG, SDZERO, OPD, FSD]


@hookimpl
def openrlhf_add_arguments(parser: argparse.ArgumentParser) -> None:
    for group in GROUPS:
        add_group(parser, group)


@hookimpl(trylast=True)
def openrlhf_answer(response: str, record: dict[str, Any], args: Any) -> str:
    """As the maths environment finds answers, so that equal numbers are equal texts."""
    from sdpo_plugin.environments import answers, maths

    found = maths.answer(response)
    return answers.canonical(found) if found else ""


@hookimpl
def openrlhf_configure(args: Any) -> None:
    for group in GROUPS:
        from_namespace(group, args)
    if args.diagnostics.log_samples and (args.algo.name is None or args.distill.weight == 0.0):
        without, fix = ("without --algo", "--algo sdpo (or another)") if args.algo.name is None else (
            "at --distill.weight 0", "a weight above 0"
        )  # fmt: skip
        raise ConfigError(
            f"--diagnostics.log_samples {args.diagnostics.log_samples}: {without} there is no teacher, whose scores "
            f"are recorded; give {fix}, or leave it out"
        )
