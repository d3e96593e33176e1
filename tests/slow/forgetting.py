"""What a new skill costs of an old one: SDFT and supervised fine-tuning on the same demonstrations, SmolLM2-135M.

    make .venv/lm && python tests/slow/forgetting.py [--seeds 1 2]

The new skill are the commands of recipes/smart_home, the old one is to know the capitals of countries. Supervised
fine-tuning takes as many steps as SDFT, at the same rate, and is measured every five. Writes runs/forgetting/table.md.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
OUT = ROOT / "runs" / "forgetting"
TASK = ROOT / "runs" / "smart_home"
sys.path.insert(0, str(ROOT / "recipes" / "smart_home"))
from house import accuracy, answers, build, rows  # noqa: E402

STEPS, BATCH, RATE = 30, 8, 1e-4
RUNS = ("supervised", "sdft", "sdpo")
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Greece": "Athens", "Austria": "Vienna", "Hungary": "Budapest", "Poland": "Warsaw", "Russia": "Moscow",
    "Ukraine": "Kyiv", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Ireland": "Dublin", "England": "London", "Scotland": "Edinburgh", "Belgium": "Brussels",
    "Netherlands": "Amsterdam", "Egypt": "Cairo", "Kenya": "Nairobi", "Ethiopia": "Addis Ababa", "Ghana": "Accra",
    "Senegal": "Dakar", "Japan": "Tokyo", "China": "Beijing", "South Korea": "Seoul", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Indonesia": "Jakarta", "India": "New Delhi", "Nepal": "Kathmandu", "Iran": "Tehran",
    "Iraq": "Baghdad", "Lebanon": "Beirut", "Cuba": "Havana", "Mexico": "Mexico City", "Peru": "Lima",
    "Chile": "Santiago", "Argentina": "Buenos Aires", "Colombia": "Bogot", "Venezuela": "Caracas", "Canada": "Ottawa",
    "Australia": "Canberra", "Turkey": "Ankara", "Romania": "Bucharest", "Bulgaria": "Sofia",
}  # fmt: skip


def measure(model: Any, tokenizer: Any) -> dict[str, float]:
    """Greedy accuracy: the commands of requests not trained on, and the capitals."""
    asked = rows()["eval"]
    questions = [[{"role": "user", "content": f"What is the capital of {country}?"}] for country in CAPITALS]
    said = answers(model.eval(), tokenizer, questions, max_new_tokens=20)
    return {
        "commands": accuracy(answers(model, tokenizer, [row["prompt"] for row in asked]), asked),
        "capitals": sum(a in text for a, text in zip(CAPITALS.values(), said, strict=True)) / len(CAPITALS),
    }


def load(path: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(path)


def supervised(seed: int) -> dict[str, dict[str, float]]:
    """Measures by number of steps; weights in float32, passes in bfloat16, as in OpenRLHF."""
    _, tokenizer = load(TASK / "model")
    model = AutoModelForCausalLM.from_pretrained(TASK / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    examples = rows()["train"]
    random.Random(seed).shuffle(examples)
    found = {}
    for step in tqdm(range(1, STEPS + 1), desc=f"supervised, seed {seed}"):
        model.train()
        batch = examples[(step - 1) * BATCH : step * BATCH]
        chats = [e["prompt"] for e in batch]
        prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        ids = [tokenizer([p, e["label"] + tokenizer.eos_token], add_special_tokens=False)["input_ids"]
               for p, e in zip(prompts, batch, strict=True)]  # fmt: skip
        length = max(len(p) + len(r) for p, r in ids)
        inputs = torch.full((len(ids), length), tokenizer.pad_token_id)
        targets = torch.full((len(ids), length), -100)
        for i, (prompt, response) in enumerate(ids):
            inputs[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            targets[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 5 == 0:
            found[f"supervised, {step} steps"] = measure(model, tokenizer)
    return found


def distilled(name: str, seed: int) -> dict[str, dict[str, float]]:
    """Measures of the model that recipes/smart_home/NAME.yaml ends with."""
    directory = OUT / f"{name}-{seed}"
    if not (directory / "model" / "config.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        paths = {"logger.tensorboard_dir": "tensorboard", "ckpt.output_dir": "model", "ckpt.path": "checkpoints"}
        command = [
            sys.executable, "-m", "sdpo_plugin.host.cli", "train", "--platform", "cpu", "--train.seed", str(seed),
            "--config", "recipes/smart_home/sdpo.yaml", "--config", f"recipes/smart_home/{name}.yaml",
            *(f"--{flag}={directory / at}" for flag, at in paths.items()),
        ]  # fmt: skip
        with open(directory / "log.txt", "w") as log:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
    return {f"{name}, {STEPS} steps": measure(*load(directory / "model"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=RUNS, nargs="+", default=RUNS)
    args = parser.parse_args()
    build(TASK)
    OUT.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, float]]] = {"before": [measure(*load(TASK / "model"))]}
    for seed in args.seeds:
        for name in args.only:
            measured = supervised(seed) if name == "supervised" else distilled(name, seed)
            for label, values in measured.items():
                found.setdefault(label, []).append(values)
            (OUT / "found.json").write_text(json.dumps(found, indent=1))
    lines = ["| | commands, % | capitals, % |", "| --- | --- | --- |"]
    for label, runs in found.items():
        cells = [", ".join(f"{run[skill]:.0%}".rstrip("%") for run in runs) for skill in ("commands", "capitals")]
        lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
    (OUT / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
