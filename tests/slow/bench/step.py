"""The step time of SDPO, with and without a context for all groups, and of GRPO.

    python tests/slow/bench/step.py [--steps 8] [--hidden 256] [--layers 2] [--tokens 32]

Runs the real OpenRLHF on CPU, two policy ranks, ZeRO-2, with a Llama of 1.2M parameters, 32 samples of up to 32 tokens
per step. A CPU with bf16 instructions needs a larger model, or the optimizer and OpenRLHF's other work hide the
difference. Prints the medians of OpenRLHF's `timing/*` metrics and writes runs/bench/step.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from sdpo_plugin.testing import OpenRLHF, tiny_model

OUT = Path(__file__).parents[3] / "runs" / "bench"
REWARD = '''
import torch

def reward_func(queries, prompts, labels):
    """Nothing succeeds; the feedback is for all prompts, or for those of an even label."""
    told = [WHO == "all" or int(label) % 2 == 0 for label in labels]
    return {"rewards": torch.zeros(len(labels)), "scores": torch.zeros(len(labels)),
            "feedback": ["expected " + label if t else None for t, label in zip(told, labels)]}
'''
ROWS = [{"prompt": [{"role": "user", "content": f"{i:>3} " + "tell me more " * 4}], "label": str(i)} for i in range(8)]
FLAGS = (
    "--actor.num_gpus_per_node", "2", "--rollout.n_samples_per_prompt", "4", "--train.batch_size", "32",
    "--train.micro_batch_size", "8", "--rollout.micro_batch_size", "8", "--actor.adam.lr", "1e-6",
)  # fmt: skip
SHORT = ("--reprompt.template", "{prompt}{feedback}", "--reprompt.feedback_template", " {feedback_raw}")
SDPO = ("--algo", "sdpo", *SHORT)
RUNS = {"sdpo": (SDPO, "all"), "sdpo, half inactive": (SDPO, "half"), "grpo": ((), "all")}
PARTS = ("make_experience", "ppo_train")  # what training costs; "step_total" is with generation and weight sync


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32, help="longest response")
    args = parser.parse_args()
    lengths = ("--rollout.max_new_tokens", str(args.tokens), "--data.max_len", str(256 + args.tokens))
    directory = Path(tempfile.mkdtemp())
    model = tiny_model(directory / "model", hidden=args.hidden, layers=args.layers)
    host, rows = OpenRLHF(directory), []
    for name, (flags, who) in RUNS.items():
        reward = directory / f"{who}.py"
        reward.write_text(f"WHO = {who!r}\n{REWARD}")
        run = host(model, ROWS, reward, *FLAGS, *lengths, *flags, "--train.num_episodes", str(args.steps), timeout=900)
        # The first step warms up.
        timed = {part: run.metrics[f"train/timing/{part}"][1:] for part in (*PARTS, "step_total")}
        seconds = {part: [value for _, value in values] for part, values in timed.items()}
        rows.append({"run": name, **{part: statistics.median(values) for part, values in seconds.items()}})
        print(json.dumps(rows[-1]), flush=True)
    for row in rows:
        for other in rows:
            row[f"over {other['run']}"] = sum(row[part] for part in PARTS) / sum(other[part] for part in PARTS)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "step.json").write_text(json.dumps(rows, indent=1))
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
