"""Every algorithm on the quickstart's task, with equally many sampled responses, over seeds: `make variants`.

    python tests/slow/variants.py [--seeds 1 2 3] [--only sdpo srpo]

60 steps of 96 samples each, from the same warm-started model; greedy accuracy on the 24 vaults every 5 steps. A run
takes one to two minutes, is written to runs/variants/NAME-SEED when it ends, and is not repeated. Writes the table and
the picture of docs/validation/variants.md (runs/variants/table.md, docs/validation/variants.png).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from tqdm import tqdm

from sdpo_plugin.report import read_scalars

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart"
OUT = ROOT / "runs" / "variants"
SHOWN = (10, 20, 30, 40, 50, 60)
# All use the recipe of SDPO: KL(teacher||student) over the whole vocabulary, initial weights as the teacher. The flags
# are what defines an algorithm; SEED stands for the run's seed.
RUNS: dict[str, tuple[str, ...]] = {
    "grpo": (),
    "sdpo": ("--algo", "sdpo"),
    "srpo": ("--algo", "srpo"),
    "rlsd": ("--algo", "rlsd", "--teacher.kind", "live"),
    "rlcsd": ("--algo", "rlcsd", "--teacher.kind", "ema"),  # a copy of the student every 10 steps
    "sdpg": (
        "--algo", "sdpg", "--teacher.kind", "live", "--distill.alpha", "1", "--algo.kl.init_coef", "0.001",
        "--no-sdpg.positive_only",  # as in the authors' script: no response is correct at the start
        "--ref.num_gpus_per_node", "1",
    ),
    "opd": (
        "--algo", "opd", "--teacher.kind", "model",
        "--teacher.model_name_or_path", str(OUT / "sdpo-SEED" / "model"), "--reprompt.template", "{prompt}",
    ),
    "fsd": ("--algo", "fsd"),
}  # fmt: skip


# With a partial reward for each correct digit, a policy loss has a gradient.
GRADED = ("--reward.remote_url", str(Path(__file__).with_name("vault_rewards.py")))
WITH_POLICY_LOSS = ("grpo", "sdpo", "srpo", "rlsd", "rlcsd", "sdpg")
FULL_MARKS = ("--reprompt.success_threshold", "1")


def trained(directory: Path, name: str, seed: int, recipe: Path, flags: Sequence[str]) -> dict[str, Any]:
    """The summary of the run in `directory`, which is trained if there is none."""
    summary = directory / "summary.json"
    if summary.exists():
        return json.loads(summary.read_text())
    shutil.rmtree(directory, ignore_errors=True)  # left by a run that was stopped
    directory.mkdir(parents=True)
    paths = {"logger.tensorboard_dir": "tensorboard", "ckpt.output_dir": "model", "ckpt.path": "checkpoints"}
    own = ["--train.seed", str(seed), *(f"--{flag}={directory / at}" for flag, at in paths.items())]
    began = time.monotonic()
    with open(directory / "log.txt", "w") as log:
        command = [sys.executable, "-m", "sdpo_plugin", "train", "--platform", "cpu", "--config", str(recipe)]
        subprocess.run([*command, *flags, *own], cwd=ROOT, stdout=log, stderr=log, check=True)
    scalars = read_scalars(str(directory / "tensorboard"))
    found = {
        "name": name, "seed": seed, "wall_s": round(time.monotonic() - began, 1),
        "accuracy": scalars["eval/eval_default_pass1"],
        "loss": scalars.get("train/self_distillation/loss", []),
    }  # fmt: skip
    summary.write_text(json.dumps(found))
    return found


def run(name: str, seed: int, graded: bool) -> dict[str, Any]:
    flags = [flag.replace("SEED", str(seed)) for flag in RUNS[name]]
    flags += (*GRADED, *(FULL_MARKS if RUNS[name] else ())) if graded else ()
    recipe = RECIPE / ("sdpo.yaml" if RUNS[name] else "grpo.yaml")
    return trained(OUT / f"{name}{'-graded' if graded else ''}-{seed}", name, seed, recipe, flags)


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Mean reward of the greedy answers, mean over seeds (minimum-maximum)."""
    lines = ["| | " + " | ".join(f"step {step}" for step in SHOWN) + " |", "| --- " * (len(SHOWN) + 1) + "|"]
    for name, runs in found.items():
        cells = []
        for step in SHOWN:
            values = [dict(map(tuple, run["accuracy"]))[step] for run in runs]
            cells.append(f"{statistics.mean(values):.0%} ({min(values):.0%}–{max(values):.0%})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def band(axes: Axes, runs: list[dict[str, Any]], label: str, color: str, per_step: int = 1) -> None:
    """The mean over seeds, with minimum and maximum; per_step: units of the x axis."""
    at = [step * per_step for step, _ in runs[0]["accuracy"]]
    values = list(zip(*([value for _, value in run["accuracy"]] for run in runs), strict=True))
    axes.plot(at, [statistics.mean(v) for v in values], marker="o", markersize=3, label=label, color=color)
    axes.fill_between(at, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15)


def plot(found: dict[bool, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    figure, both = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for axes, (graded, runs_of) in zip(both, found.items(), strict=True):
        for name, runs in runs_of.items():
            band(axes, runs, name, f"C{list(RUNS).index(name)}")
        axes.set(
            title=f"reward: {'a fraction for each correct digit' if graded else 'correct or wrong'}",
            xlabel="step (96 sampled responses each)", ylim=(-0.02, 1.02),
        )
        axes.legend()
        axes.grid(alpha=0.3)
    both[0].set_ylabel("mean reward of greedy answers, 24 vaults")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    subprocess.run([sys.executable, RECIPE / "vault.py", ROOT / "runs" / "quickstart"], check=True)
    tasks = [(name, False) for name in args.only] + [(name, True) for name in args.only if name in WITH_POLICY_LOSS]
    found: dict[bool, dict[str, list[dict[str, Any]]]] = {False: {}, True: {}}
    with tqdm(total=len(args.seeds) * len(tasks), desc="variants") as bar:
        for seed in args.seeds:
            for name, graded in tasks:
                bar.set_postfix(run=f"{name}{', graded' if graded else ''}, seed {seed}")
                found[graded].setdefault(name, []).append(run(name, seed, graded))
                bar.update()
    tables = [table(runs) for runs in found.values() if runs]
    OUT.joinpath("table.md").write_text("\n\n".join(tables) + "\n")
    plot(found, ROOT / "docs/validation/variants.png")
    print(*tables, sep="\n\n")


if __name__ == "__main__":
    main()
