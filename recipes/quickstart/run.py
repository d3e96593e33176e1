"""`make demo`: warm-start a tiny model, train it with SDPO and with GRPO in OpenRLHF, and compare.

Writes below runs/quickstart: report.json, curve.png, and of each run its log, TensorBoard files and final model.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from sdpo_plugin import report

ROOT = Path(__file__).parents[2]
OUT = ROOT / "runs" / "quickstart"
EVALUATED = re.compile(r"global_step (\d+), eval_metrics: (\{.*\})")
STEPPED = re.compile(r"Global step (\d+):")


def train(name: str, accuracy_at_start: float) -> dict[str, Any]:
    """One run of OpenRLHF on `recipes/quickstart/NAME.yaml`, as the report has it."""
    recipe = Path(__file__).with_name(f"{name}.yaml")
    settings = yaml.safe_load(recipe.read_text())
    directory = OUT / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    accuracy, began = [[0, accuracy_at_start]], time.monotonic()
    command = [sys.executable, "-m", "sdpo_plugin.host.cli", "train", "--platform", "cpu", "--config", str(recipe)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with open(directory / "log.txt", "w") as log, tqdm(total=settings["train"]["num_episodes"], desc=name) as bar:
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
    steps = report.read_scalars(str(directory / "tensorboard"))["train/timing/step_total"]
    return {
        "steps": bar.n,
        "median_step_s": round(statistics.median(seconds for _, seconds in steps), 3),
        "prompts_per_step": settings["rollout"]["batch_size"],
        "samples_per_prompt": settings["rollout"]["n_samples_per_prompt"],
        "accuracy": accuracy,
        "wall_s": round(time.monotonic() - began, 1),
    }


def main() -> None:
    print("the quickstart runs on the CPU, whatever this machine has")
    subprocess.run([sys.executable, Path(__file__).with_name("vault.py"), OUT], check=True)
    start = json.loads((OUT / "vault.json").read_text())["accuracy_without_context"]
    report.write({name: train(name, start) for name in ("sdpo", "grpo")}, str(OUT))
    print(f"wrote {OUT / 'report.json'} and {OUT / 'curve.png'}")


if __name__ == "__main__":
    main()
