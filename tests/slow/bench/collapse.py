"""The collapse monitor on runs of the quickstart that collapse, and on healthy ones: several seeds each.

    python tests/slow/bench/collapse.py [--seeds 1 2 3 4 5] [--kinds warn slow stop healthy]

`warn` and `slow` train 40 steps with an EMA teacher that follows too fast (`COLLAPSE`), `stop` trains until the monitor
ends the run and then two more steps from its checkpoint, `healthy` 60 steps of the unchanged recipe. A run takes two to
three minutes; it is written to runs/bench/collapse/KIND-SEED when it ends, and is not repeated. Prints a table, and
draws collapse.png there.
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

from sdpo_plugin.monitoring.collapse import CONTEXT_KL
from sdpo_plugin.report import read_scalars

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "quickstart"
OUT = ROOT / "runs" / "bench" / "collapse"
COLLAPSE = ("--teacher.kind", "ema", "--teacher.update_rate", "0.05", "--actor.adam.lr", "3e-3",
            "--train.num_episodes", "40", "--eval.steps", "1")  # fmt: skip
KINDS = {
    "warn": COLLAPSE,
    "slow": (*COLLAPSE, "--diagnostics.on_collapse", "slow"),
    "stop": (*COLLAPSE, "--diagnostics.on_collapse", "stop"),
    "healthy": (),
}
WARNING = re.compile(r"uses its context less and less")
STEPPED = re.compile(r"Global step (\d+):")
STOPPED = re.compile(r"step (\d+) is saved")


def train(kind: str, seed: int, *more: str) -> str:
    """The output of one run of OpenRLHF."""
    directory = OUT / f"{kind}-{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    paths = {"logger.tensorboard_dir": "tensorboard", "ckpt.output_dir": "model", "ckpt.path": "checkpoints"}
    flags = [f"--{flag}={directory / name}" for flag, name in paths.items()]
    command = [sys.executable, "-m", "sdpo_plugin", "train", "--config", RECIPE / "sdpo.yaml", *KINDS[kind]]
    with open(directory / f"log{len(more)}.txt", "w+") as log:
        subprocess.run([*command, "--train.seed", str(seed), *flags, *more], cwd=ROOT, stdout=log, stderr=log)
        log.seek(0)
        return log.read()


def result(kind: str, seed: int) -> dict[str, Any]:
    """The summary of a run, which is trained if there is none."""
    directory = OUT / f"{kind}-{seed}"
    summary = directory / "summary.json"
    if summary.exists():
        return json.loads(summary.read_text())
    output, step, warnings = train(kind, seed), 0, []
    for line in output.splitlines():
        if stepped := STEPPED.search(line):
            step = int(stepped[1])
        if WARNING.search(line) and kind != "stop":
            warnings.append(step + 1)  # logged before OpenRLHF prints the step's number
    resumed = None
    if stopped := STOPPED.search(output):
        warnings, last = [int(stopped[1])], int(stopped[1]) + 2
        more = ("--ckpt.load_enable", "--diagnostics.on_collapse", "warn", "--train.num_episodes", str(last))
        output = train(kind, seed, *more)
        resumed = [int(number) for number in STEPPED.findall(output)]
    scalars = read_scalars(str(directory / "tensorboard"))
    found = {
        "kind": kind, "seed": seed, "warnings": warnings, "resumed": resumed,
        "accuracy": scalars.get("eval/eval_default_pass1", []), "kl": scalars[f"train/{CONTEXT_KL}"],
        "loss": scalars["train/self_distillation/loss"],
    }  # fmt: skip
    summary.write_text(json.dumps(found))
    return found


def line(run: dict[str, Any]) -> str:
    accuracy = {int(step): value for step, value in run["accuracy"]}
    best = max(accuracy, key=accuracy.get, default=0)
    kls = [kl for _, kl in run["kl"]]
    checks = [statistics.median(kls[i - 3 : i]) for i in range(3, len(kls) + 1)]
    warning = run["warnings"][0] if run["warnings"] else None
    then = next((accuracy[step] for step in sorted(accuracy, reverse=True) if step <= (warning or 0)), 0)
    at_warning = f"first warning at {warning}, accuracy {then:4.0%}" if warning else "no warning"
    parts = [
        f"{run['kind']:8} seed {run['seed']:<3}", f"best {accuracy.get(best, 0):4.0%} at {best:2}",
        f"end {run['accuracy'][-1][1] if accuracy else 0:4.0%}", f"{at_warning:33}",
        f"context KL {kls[0]:.2f} to {kls[-1]:.2f}, least median of three {min(checks) / checks[0]:4.0%}",
        f"loss {run['loss'][-1][1]:.3f}",
    ]  # fmt: skip
    return "  ".join(parts) + (f"  resumed to {run['resumed'][-1]}" if run["resumed"] else "")


def plot(runs: list[dict[str, Any]]) -> None:
    figure, axes = pyplot.subplots(2, len(KINDS), figsize=(12, 5), sharey="row", layout="constrained")
    for column, kind in zip(axes.T, KINDS, strict=True):
        for run in (run for run in runs if run["kind"] == kind):
            column[0].plot(*zip(*run["accuracy"], strict=True), alpha=0.7)
            column[1].plot(*zip(*run["kl"], strict=True), alpha=0.7)
            if run["warnings"]:
                column[1].axvline(run["warnings"][0], alpha=0.3, linestyle=":")
        column[0].set(title=kind)
        column[1].set(xlabel="step")
    axes[0, 0].set(ylabel="greedy accuracy")
    axes[1, 0].set(ylabel="context KL, nats a token")
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
