"""The quickstart with its teacher on the policy workers and in an engine of its own, over seeds.

    python tests/slow/engines.py [--seeds 1 2 3] [--only 'base, engine' ...]

60 steps of 96 samples from the same warm-started model; greedy accuracy on the 24 vaults every 5 steps. A run takes
one to two minutes, is written to runs/engines/NAME-SEED when it ends, and is not repeated. Writes the table and the
picture of docs/teacher-engines.md (runs/engines/table.md, docs/validation/engines.png) from all runs that are there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from matplotlib import pyplot
from tqdm import tqdm
from variants import RECIPE, ROOT, band, table, trained

OUT = ROOT / "runs" / "engines"
TOPK = ("--distill.mode", "topk", "--distill.topk", "100", "--distill.support", "teacher")
ENGINE = ("--teacher.scored_by", "engine", "--teacher.gpu_memory_utilization", "0.1")
KINDS = {"base": ("--teacher.kind", "base"), "ema": ("--teacher.kind", "ema", "--teacher.update_rate", "0.005")}
RUNS = {
    f"{kind}, {where}": (*TOPK, *flags, *(ENGINE if where == "engine" else ()))
    for kind, flags in KINDS.items() for where in ("workers", "engine")
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS))
    args = parser.parse_args()
    subprocess.run([sys.executable, str(RECIPE / "vault.py"), "runs/quickstart"], cwd=ROOT, check=True)
    for seed in tqdm(args.seeds, desc="seeds"):
        for name in args.only:
            trained(directory(name, seed), name, seed, RECIPE / "sdpo.yaml", RUNS[name])
    found = {
        name: [trained(directory(name, seed), name, seed, RECIPE / "sdpo.yaml", RUNS[name]) for seed in args.seeds]
        for name in args.only
    }
    (OUT / "table.md").write_text(table(found) + "\n")
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for number, (name, runs) in enumerate(found.items()):
        band(axes, runs, name, f"C{number}")
    axes.set(xlabel="step (96 sampled responses each)", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.legend()
    figure.savefig(ROOT / "docs" / "validation" / "engines.png", dpi=150)


def directory(name: str, seed: int) -> Path:
    return OUT / f"{name.replace(', ', '-')}-{seed}"


if __name__ == "__main__":
    main()
