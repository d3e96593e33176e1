"""`openrlhf-sdpo report`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdpo_plugin.config import ConfigError
from sdpo_plugin.monitoring.sample_file import NAME, read_samples
from sdpo_plugin.report.events import read_run


def main(arguments: Sequence[str], parser: argparse.ArgumentParser | None = None) -> None:
    """Write the page, or print samples. Raises ConfigError where there is nothing to read.

    parser: one without arguments yet, with the help's other parts.
    """
    parser = parser or argparse.ArgumentParser("openrlhf-sdpo report")
    parser.add_argument(
        "runs", nargs="+", metavar="[NAME=]RUN", help="directory that contains a run's event files and samples"
    )
    parser.add_argument("--out", metavar="FILE", help="file for the report (default: report.html)")
    parser.add_argument("--text", action="store_true", help="print samples token by token; no report is written")
    parser.add_argument("--step", type=int, metavar="N", help="with --text: the step to print (default: the last)")
    parser.add_argument("--sample", type=int, metavar="N", help="with --text: print only the sample with this number")
    args = parser.parse_args(arguments)
    if args.text and args.out:
        parser.error("--out is for the page, --text prints")
    if not args.text and (args.step is not None or args.sample is not None):
        parser.error("--step and --sample choose what --text prints")
    runs = named(args.runs)
    if args.text:
        from sdpo_plugin.report.terminal import show

        for name, directory in runs.items():
            samples = recorded(directory)
            if not samples:
                raise ConfigError(f"report: no {NAME} below {directory}; train with --diagnostics.log_samples N")
            show(name if len(runs) > 1 else "", samples, args.step, args.sample)
        return
    from sdpo_plugin.report import page

    out = Path(args.out or "report.html")
    page.write([(read_run(name, directory), recorded(directory)) for name, directory in runs.items()], out)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


def named(runs: Sequence[str]) -> dict[str, str]:
    """Directories by name: of `NAME=DIR` the given one, else the part in which the directories differ."""
    given = [run.partition("=") if "=" in run and not os.path.exists(run) else ("", "", run) for run in runs]
    paths = [os.path.abspath(directory) for _, _, directory in given]
    tops = [os.path.dirname(path) if os.path.basename(path) == "tensorboard" else path for path in paths]
    shared = os.path.commonpath(tops) if len(set(tops)) > 1 else os.path.dirname(tops[0])
    found: dict[str, str] = {}
    for (name, _, directory), top in zip(given, tops, strict=True):
        if not os.path.isdir(directory):
            raise ConfigError(f"report: {directory} is not a directory")
        name = name or os.path.relpath(top, shared)
        if name in found:
            raise ConfigError(f"report: two runs are named {name}; name them: NAME={directory}")
        found[name] = directory
    return found


def recorded(directory: str) -> list[dict[str, Any]]:
    """The samples of a run; none where it recorded none. Raises ConfigError where they cannot be read."""
    try:
        return read_samples(directory)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise ConfigError(f"report: {error}") from error
