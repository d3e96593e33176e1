"""`make demo`, `make demo-lm`: make a task's model and data, train with SDPO and with GRPO in OpenRLHF, and compare.

    python recipes/demo.py quickstart
    python recipes/demo.py smart_home

Writes below runs/TASK: report.json, curve.png, report.html, and of each run its log, TensorBoard files and final model.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib
from ruamel.yaml import YAML
from tqdm import tqdm

from sdpo_plugin.report import command, read_scalars

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
HOST = ("openrlhf", "vllm", "ray", "deepspeed", "torch")
MAKERS = {"quickstart": "vault", "smart_home": "house"}  # of a task's model and data
EVALUATED = re.compile(r"global_step (\d+), eval_metrics: (\{.*\})")
STEPPED = re.compile(r"Global step (\d+):")


def train(task: str, name: str, accuracy_at_start: float) -> dict[str, Any]:
    """One run of OpenRLHF on `recipes/TASK/NAME.yaml`, as the report has it."""
    recipe = ROOT / "recipes" / task / f"{name}.yaml"
    settings = YAML(typ="safe", pure=True).load(recipe)
    directory = ROOT / "runs" / task / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    accuracy, began = [[0, accuracy_at_start]], time.monotonic()
    command = [sys.executable, "-m", "sdpo_plugin", "train", "--platform", "cpu", "--config", str(recipe)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with open(directory / "log.txt", "w") as log, tqdm(total=steps(settings), desc=name) as bar:
        for line in process.stdout:
            log.write(line)
            if (step := STEPPED.search(line)) and int(step[1]) > bar.n:
                bar.update(int(step[1]) - bar.n)
            if (evaluated := EVALUATED.search(line)) and int(evaluated[1]) > accuracy[-1][0]:
                metrics = ast.literal_eval(evaluated[2])
                accuracy.append([int(evaluated[1]), metrics["eval_default_pass1"]])
                bar.set_postfix(accuracy=f"{accuracy[-1][1]:.0%}")
    if process.wait():
        sys.exit(f"{name} failed; see {directory / 'log.txt'}")
    timed = read_scalars(str(directory / "tensorboard"))["train/timing/step_total"]
    return {
        "steps": bar.n,
        "median_step_s": round(statistics.median(seconds for _, seconds in timed), 3),
        "prompts_per_step": settings["rollout"]["batch_size"],
        "samples_per_prompt": settings["rollout"]["n_samples_per_prompt"],
        "accuracy": accuracy,
        "wall_s": round(time.monotonic() - began, 1),
    }


def steps(settings: dict[str, Any]) -> int:
    """One update per rollout, as in the recipes of a demo."""
    with open(ROOT / settings["data"]["prompt_dataset"]) as file:
        rows = min(sum(1 for _ in file), settings["data"].get("max_samples", 10**9))
    return rows // settings["rollout"]["batch_size"] * settings["train"]["num_episodes"]


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


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, run in runs.items():
        axes.plot(*zip(*run["accuracy"], strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel="greedy accuracy", ylim=(-0.02, 1.02))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=MAKERS)
    task = parser.parse_args().task
    print("this runs on the CPU, whatever this machine has")
    maker, out = MAKERS[task], ROOT / "runs" / task
    subprocess.run([sys.executable, ROOT / "recipes" / task / f"{maker}.py", out], check=True)
    start = json.loads((out / f"{maker}.json").read_text())["accuracy_without_context"]
    runs = {name: train(task, name, start) for name in ("sdpo", "grpo")}
    (out / "report.json").write_text(json.dumps({"host": host_versions(), "runs": runs}, indent=1))
    plot(runs, out / "curve.png")
    print(table(runs))
    print(f"wrote {out / 'report.json'} and {out / 'curve.png'}")
    command.main([*(f"{name}={out / name}" for name in runs), "--out", str(out / "report.html")])


if __name__ == "__main__":
    main()
