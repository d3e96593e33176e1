"""What SmolLM2-135M learns of a smart home and what it forgets, by algorithm, with equally many sampled responses.

    make .venv/lm && python tests/slow/language_model.py [--seeds 1 2] [--only sdpo 'supervised*']

The recipes of recipes/smart_home, 30 steps of 32 samples, greedy answers to 48 held-out requests every five steps.
Forgetting: accuracy on the capitals of 48 countries at the end. Supervised fine-tuning is on the same commands, 8 per
step, measured whenever the others are evaluated. A run is written to runs/language_model/NAME-SEED when it ends, and is
not repeated. Writes the tables and the picture of
docs/validation/demo-lm.md (runs/language_model/table.md, docs/validation/language_model.png).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "smart_home"))

import torch
from house import accuracy, answers, build, rows
from matplotlib import pyplot
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from variants import ROOT, band, trained

OUT = ROOT / "runs" / "language_model"
TASK = ROOT / "runs" / "smart_home"
RECIPES = ROOT / "recipes" / "smart_home"
STEPS, EVAL_STEPS, BATCH = 30, 5, 8
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


def capitals(model: Any, tokenizer: Any) -> float:
    """Fraction of the capitals that greedy answers name."""
    questions = [[{"role": "user", "content": f"What is the capital of {country}?"}] for country in CAPITALS]
    said = answers(model.eval(), tokenizer, questions, max_new_tokens=20)
    return sum(name in text for name, text in zip(CAPITALS.values(), said, strict=True)) / len(CAPITALS)


def commands(model: Any, tokenizer: Any) -> float:
    asked = rows()["eval"]
    return accuracy(answers(model.eval(), tokenizer, [row["prompt"] for row in asked]), asked)


def supervised(lr: float, directory: Path, name: str, seed: int) -> dict[str, Any]:
    """Weights in float32, passes in bfloat16, clipped gradients: as in OpenRLHF. Both skills at each evaluation."""
    tokenizer = AutoTokenizer.from_pretrained(TASK / "model")
    model = AutoModelForCausalLM.from_pretrained(TASK / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    examples = rows()["train"]
    random.Random(seed).shuffle(examples)
    found: dict[str, Any] = {"name": name, "seed": seed, "accuracy": [], "kept": []}
    for step in tqdm(range(1, STEPS + 1), desc=f"{name}, seed {seed}", leave=False):
        loss = supervised_loss(model.train(), tokenizer, examples[(step - 1) * BATCH : step * BATCH])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % EVAL_STEPS == 0:
            found["accuracy"].append([step, commands(model, tokenizer)])
            found["kept"].append([step, capitals(model, tokenizer)])
    return found


def supervised_loss(model: Any, tokenizer: Any, batch: list[dict[str, Any]]) -> torch.Tensor:
    """Mean cross-entropy of the commands' tokens, a scalar."""
    prompts = tokenizer.apply_chat_template([e["prompt"] for e in batch], tokenize=False, add_generation_prompt=True)
    ids = [
        tokenizer([prompt, e["label"] + tokenizer.eos_token], add_special_tokens=False)["input_ids"]
        for prompt, e in zip(prompts, batch, strict=True)
    ]
    length = max(len(prompt) + len(response) for prompt, response in ids)
    inputs = torch.full((len(ids), length), tokenizer.pad_token_id)
    targets = torch.full((len(ids), length), -100)
    for i, (prompt, response) in enumerate(ids):
        inputs[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        targets[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())


def distilled(recipe: str, flags: tuple[str, ...], directory: Path, name: str, seed: int) -> dict[str, Any]:
    """A run of OpenRLHF, and the accuracy of its final model on the capitals."""
    found = trained(directory, name, seed, RECIPES / recipe, flags)
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.bfloat16)
    return found | {"kept": [[STEPS, capitals(model, AutoTokenizer.from_pretrained(directory / "model"))]]}


SDFT = ("--config", str(RECIPES / "sdft.yaml"))
RUNS: dict[str, Callable[[Path, str, int], dict[str, Any]]] = {
    "grpo": partial(distilled, "grpo.yaml", ()),
    "sdpo": partial(distilled, "sdpo.yaml", ()),
    "hybrid": partial(distilled, "sdpo.yaml", ("--distill.weight", "0.5")),
    "sdft": partial(distilled, "sdpo.yaml", SDFT),
    "sdft, lr 3e-5": partial(distilled, "sdpo.yaml", (*SDFT, "--actor.adam.lr", "3e-5")),
    "supervised, lr 1e-4": partial(supervised, 1e-4),
    "supervised, lr 3e-5": partial(supervised, 3e-5),
    "supervised, lr 1e-5": partial(supervised, 1e-5),
}


def run(name: str, seed: int) -> None:
    directory = OUT / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    found = directory / "found.json"
    if not found.exists():
        summary = RUNS[name](directory, name, seed)
        directory.mkdir(parents=True, exist_ok=True)
        found.write_text(json.dumps(summary))


def cell(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.0%}"
    return f"{mean} ({min(values):.0%}–{max(values):.0%})" if len(values) > 1 else mean


def tables(before: dict[str, float], seen: dict[str, list[dict[str, Any]]]) -> str:
    """Commands over steps, then both skills at each measure of the second."""
    shown = range(EVAL_STEPS, STEPS + 1, EVAL_STEPS)
    lines = ["| step | " + " | ".join(map(str, shown)) + " | wall, s | seeds |", "| --- " * (len(shown) + 3) + "|"]
    for name, runs in seen.items():
        cells = [cell([dict(run["accuracy"])[step] for run in runs]) for step in shown]
        walls = [run["wall_s"] for run in runs if "wall_s" in run]  # of runs of OpenRLHF
        cells += [f"{statistics.mean(walls):.0f}" if walls else "–", str(len(runs))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| | commands | capitals |", "| --- | --- | --- |"]
    lines.append(f"| before | {before['commands']:.0%} | {before['capitals']:.0%} |")
    for name, runs in seen.items():
        for step, _ in runs[0]["kept"]:
            learned, kept = (cell([dict(run[skill])[step] for run in runs]) for skill in ("accuracy", "kept"))
            lines.append(f"| {name}, {step} steps | {learned} | {kept} |")
    return "\n".join(lines) + "\n"


def plot(before: dict[str, float], seen: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    right.plot(before["commands"], before["capitals"], "k*", markersize=10, label="before")
    for i, (name, runs) in enumerate(seen.items()):
        band(left, runs, name, f"C{i}")
        points = [(dict(run["accuracy"])[step], kept) for run in runs for step, kept in run["kept"]]
        right.plot(*zip(*points, strict=True), "o", color=f"C{i}", label=name)
    left.set(xlabel="step", ylabel="commands, greedy accuracy", ylim=(-0.02, 1.02))
    right.set(xlabel="commands", ylabel="capitals, greedy accuracy", xlim=(-0.02, 1.02))
    for axes in (left, right):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2], help="none: tables and picture only")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of names in the tables")
    args = parser.parse_args()
    build(TASK)
    OUT.mkdir(parents=True, exist_ok=True)
    start = OUT / "before.json"
    if not start.exists():
        model = AutoModelForCausalLM.from_pretrained(TASK / "model", dtype=torch.bfloat16)
        both = (model, AutoTokenizer.from_pretrained(TASK / "model"))
        at_start = json.loads((TASK / "house.json").read_text())["accuracy_without_context"]
        start.write_text(json.dumps({"commands": at_start, "capitals": capitals(*both)}))
    chosen = [name for name in RUNS if any(fnmatch(name, pattern) for pattern in args.only)]
    for seed in args.seeds:
        for name in tqdm(chosen, desc=f"seed {seed}"):
            run(name, seed)
    summaries = [json.loads(path.read_text()) for path in sorted(OUT.glob("*/found.json"))]
    seen = {name: of for name in RUNS if (of := [s for s in summaries if s["name"] == name])}
    before = json.loads(start.read_text())
    (OUT / "table.md").write_text(tables(before, seen))
    plot(before, seen, ROOT / "docs/validation/language_model.png")
    print((OUT / "table.md").read_text())


if __name__ == "__main__":
    main()
