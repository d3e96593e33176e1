"""The quickstart made to collapse, with what the watch makes of it, and left healthy: several seeds each.

    python tests/slow/bench/collapse.py [--seeds 1 2 3 4 5] [--kinds warn slow stop healthy]

`warn` and `slow` train 40 steps with an average that follows too fast (`COLLAPSE`), `stop` until the guard ends the run
and then two steps more from its checkpoint, `healthy` 60 steps as in the recipe. Two to three minutes a run; each is
written to runs/bench/collapse/KIND-SEED as it ends and not repeated. Prints a table, and draws collapse.png there.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from sdpo_plugin.monitoring.collapse import GAIN
from sdpo_plugin.report import read_scalars

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "quickstart"
OUT = ROOT / "runs" / "bench" / "collapse"
COLLAPSE = ("--teacher.kind", "ema", "--teacher.update_rate", "0.05", "--actor.adam.lr", "3e-3",
            "--train.num_episodes", "40", "--eval.steps", "1")  # fmt: skip
KINDS = {
    "warn": COLLAPSE,
    "slow": (*COLLAPSE, "--diagnostics.guard", "slow"),
    "stop": (*COLLAPSE, "--diagnostics.guard", "stop"),
    "healthy": (),
}
ALARM = re.compile(r"reads its context less and less")
STEPPED = re.compile(r"Global step (\d+):")
STOPPED = re.compile(r"step (\d+) is saved")


def train(kind: str, seed: int, *more: str) -> str:
    """One run of the host; its output."""
    directory = OUT / f"{kind}-{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    paths = {"logger.tensorboard_dir": "tensorboard", "ckpt.output_dir": "model", "ckpt.path": "checkpoints"}
    flags = [f"--{flag}={directory / name}" for flag, name in paths.items()]
    command = [sys.executable, "-m", "sdpo_plugin.openrlhf_adapter.launcher.cli", "train", "--config",
    RECIPE / "sdpo.yaml", *KINDS[kind]]
    with open(directory / f"log{len(more)}.txt", "w+") as log:
        subprocess.run([*command, "--train.seed", str(seed), *flags, *more], cwd=ROOT, stdout=log, stderr=log)
        log.seek(0)
        return log.read()


def result(kind: str, seed: int) -> dict[str, Any]:
    """What is to be known about a run, trained if it was not."""
    directory = OUT / f"{kind}-{seed}"
    summary = directory / "summary.json"
    if summary.exists():
        return json.loads(summary.read_text())
    output, step, alarms = train(kind, seed), 0, []
    for line in output.splitlines():
        if stepped := STEPPED.search(line):
            step = int(stepped[1])
        if ALARM.search(line) and kind != "stop":
            alarms.append(step + 1)  # spoken before the host prints the step's number
    resumed = None
    if stopped := STOPPED.search(output):
        alarms, last = [int(stopped[1])], int(stopped[1]) + 2
        more = ("--ckpt.load_enable", "--diagnostics.guard", "warn", "--train.num_episodes", str(last))
        output = train(kind, seed, *more)
        resumed = [int(number) for number in STEPPED.findall(output)]
    scalars = read_scalars(str(directory / "tensorboard"))
    found = {
        "kind": kind, "seed": seed, "alarms": alarms, "resumed": resumed,
        "accuracy": scalars.get("eval/eval_default_pass1", []), "gain": scalars[f"train/{GAIN}"],
        "loss": scalars["train/self_distillation/loss"],
    }  # fmt: skip
    summary.write_text(json.dumps(found))
    return found


def line(run: dict[str, Any]) -> str:
    accuracy = {int(step): value for step, value in run["accuracy"]}
    best = max(accuracy, key=accuracy.get, default=0)
    gains = [gain for _, gain in run["gain"]]
    looks = [statistics.median(gains[i - 3 : i]) for i in range(3, len(gains) + 1)]
    alarm = run["alarms"][0] if run["alarms"] else None
    then = next((accuracy[step] for step in sorted(accuracy, reverse=True) if step <= (alarm or 0)), 0)
    at_alarm = f"first alarm at {alarm}, accuracy {then:4.0%}" if alarm else "no alarm"
    parts = [
        f"{run['kind']:8} seed {run['seed']:<3}", f"best {accuracy.get(best, 0):4.0%} at {best:2}",
        f"end {run['accuracy'][-1][1] if accuracy else 0:4.0%}", f"{at_alarm:33}",
        f"context gain {gains[0]:.2f} to {gains[-1]:.2f}, least median of three {min(looks) / looks[0]:4.0%}",
        f"loss {run['loss'][-1][1]:.3f}",
    ]  # fmt: skip
    return "  ".join(parts) + (f"  resumed to {run['resumed'][-1]}" if run["resumed"] else "")


def plot(runs: list[dict[str, Any]]) -> None:
    figure, axes = pyplot.subplots(2, len(KINDS), figsize=(12, 5), sharey="row", layout="constrained")
    for column, kind in zip(axes.T, KINDS, strict=True):
        for run in (run for run in runs if run["kind"] == kind):
            column[0].plot(*zip(*run["accuracy"], strict=True), alpha=0.7)
            column[1].plot(*zip(*run["gain"], strict=True), alpha=0.7)
            if run["alarms"]:
                column[1].axvline(run["alarms"][0], alpha=0.3, linestyle=":")
        column[0].set(title=kind)
        column[1].set(xlabel="step")
    axes[0, 0].set(ylabel="greedy accuracy")
    axes[1, 0].set(ylabel="context gain, nats a token")
    figure.savefig(OUT / "collapse.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    subprocess.run([sys.executable, RECIPE / "vault.py", ROOT / "runs" / "quickstart"], check=True)
    runs = []
    for seed in args.seeds:
        for kind in args.kinds:
            runs.append(result(kind, seed))
            print(line(runs[-1]), flush=True)
    plot(runs)


if __name__ == "__main__":
    main()
