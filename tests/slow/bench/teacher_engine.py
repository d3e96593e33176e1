"""A step's time and a policy worker's peak memory, with the teacher on the workers and in an engine.

    python tests/slow/bench/teacher_engine.py [--model DIR] [--steps 5]

SmolLM2-135M (`make demo-lm` and `make study` have it converted, runs/smart_home/model) with one policy rank, ZeRO-2, 16
samples of up to 64 tokens a step, top-20 of the teacher. The runs of both kinds alternate. Prints the medians of
OpenRLHF's `timing/*` metrics without the first step, and writes runs/bench/teacher_engine.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from sdpo_plugin.testing import OpenRLHF

ROOT = Path(__file__).parents[3]
REWARD = """
import torch
def reward_func(queries, prompts, labels):
    return {"rewards": torch.zeros(1), "scores": torch.zeros(1), "feedback": [f"expected {label}" for label in labels]}
"""
ROWS = [{"prompt": [{"role": "user", "content": f"Describe the number {i}."}], "label": str(i)} for i in range(8)]
FLAGS = (
    "--algo", "sdpo", "--distill.topk", "20", "--distill.support", "teacher", "--data.max_len", "512",
    "--reprompt.max_len", "256", "--rollout.max_new_tokens", "64", "--train.micro_batch_size", "4",
    "--rollout.micro_batch_size", "16", "--actor.adam.lr", "1e-6",
)  # fmt: skip
ENGINE = ("--teacher.scored_by", "engine", "--teacher.gpu_memory_utilization", "0.1")
PARTS = ("generation", "make_experience", "ppo_train", "broadcast", "step_total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "runs" / "smart_home" / "model"))
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    os.environ["PYTHONPATH"] = str(ROOT / "tests" / "plugins")
    directory, found = Path(tempfile.mkdtemp()), []
    host, reward = OpenRLHF(directory), directory / "reward.py"
    reward.write_text(REWARD)
    for kind in ("base", "ema"):
        for where, flags in (("worker", ()), ("engine", ENGINE)):
            out = directory / f"{kind}-{where}"
            run = host(
                args.model, ROWS, reward, *FLAGS, *flags, "--teacher.kind", kind, "--peak.out", str(out),
                "--train.num_episodes", str(args.steps), "--plugins", "sdpo_plugin.testing", "peak", timeout=590,
            )  # fmt: skip
            seconds = {p: statistics.median(v for _, v in run.metrics[f"train/timing/{p}"][1:]) for p in PARTS}
            peak = json.loads(Path(f"{out}.0").read_text())["peak"]
            found.append({"teacher": kind, "scored_by": where, **seconds, "peak_mib": peak / 2**20})
            print(json.dumps(found[-1]), flush=True)
    (ROOT / "runs" / "bench").mkdir(parents=True, exist_ok=True)
    (ROOT / "runs" / "bench" / "teacher_engine.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
