"""Curves and tables from the TensorBoard logs of runs."""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

HOST = ("openrlhf", "vllm", "ray", "deepspeed", "torch")


def read_scalars(directory: str) -> dict[str, list[list[float]]]:
    """Every scalar logged below `directory`, as `[[step, value], ...]` in the order of steps."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    logs = EventMultiplexer(size_guidance={"scalars": 0}).AddRunsFromDirectory(directory).Reload()
    scalars: dict[str, dict[int, float]] = {}
    for run, tags in sorted(logs.Runs().items()):
        for tag in tags["scalars"]:
            scalars.setdefault(tag, {}).update({e.step: e.value for e in logs.Scalars(run, tag)})
    return {tag: [list(point) for point in sorted(points.items())] for tag, points in scalars.items()}


def host_versions() -> dict[str, str]:
    found = {}
    for name in HOST:
        for distribution in (name, f"{name}-cpu"):
            try:
                found[name] = version(distribution)
            except PackageNotFoundError:
                continue
    return found


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Greedy accuracy over steps, a line per run."""
    steps = sorted({step for run in runs.values() for step, _ in run["accuracy"]})
    lines = ["step".ljust(8) + "".join(f"{step:>5.0f}" for step in steps) + "  a step    wall"]
    for name, run in runs.items():
        values = dict(run["accuracy"])
        cells = "".join(f"{values[step]:5.0%}" if step in values else " " * 5 for step in steps)
        lines.append(f"{name:8}{cells}{run['median_step_s']:6.2f} s{run['wall_s']:6.0f} s")
    return "\n".join(lines)


def plot(runs: dict[str, dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, run in runs.items():
        axes.plot(*zip(*run["accuracy"], strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel="greedy accuracy", ylim=(-0.02, 1.02))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(runs: dict[str, dict[str, Any]], directory: str) -> None:
    """`report.json` and `curve.png` in `directory`, and a table on the screen."""
    with open(os.path.join(directory, "report.json"), "w") as file:
        json.dump({"host": host_versions(), "runs": runs}, file, indent=1)
    plot(runs, os.path.join(directory, "curve.png"))
    print(table(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot the accuracy of runs that logged to TensorBoard.")
    parser.add_argument("runs", nargs="+", metavar="NAME=TENSORBOARD_DIR")
    parser.add_argument("--tag", default="eval/eval_default_pass1")
    parser.add_argument("--out", default="curve.png")
    args = parser.parse_args()
    runs = {}
    for run in args.runs:
        name, directory = run.split("=", 1)
        runs[name] = {"accuracy": read_scalars(directory)[args.tag]}
    plot(runs, args.out)


if __name__ == "__main__":
    main()
