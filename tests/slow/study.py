"""What self-distillation learns from, with equally many sampled responses, over seeds: `make study`.

    python tests/slow/study.py [--seeds 1 2 3 4 5] [--only 'sdpo, *' 'grpo, *']

The quickstart's warm-started model, 60 steps of 96 samples per run, greedy answers to the 24 vaults every second step.
A seed also determines the codes of the vaults. All runs of a seed come before the next seed; a run takes a minute or
two, is written to runs/study/NAME-SEED when it ends, and is not repeated. A run that fails is listed and left out.
Writes the tables and the picture of docs/validation/learning.md from all runs that are there (runs/study/table.md,
docs/validation/learning.png).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatch
from math import inf
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "quickstart"))

from matplotlib import pyplot
from tqdm import tqdm
from variants import RECIPE, ROOT, band, trained
from vault import SECRET_VAULTS, Settings, chat, vault_codes

OUT = ROOT / "runs" / "study"
SAMPLES, STEPS, EVAL_STEPS = 96, 60, 2  # a step, a run
SHOWN = (10, 20, 30, 40, 50, 60)
TEMPLATE = "{prompt}\nCorrect solution:\n\n{privileged_context}\n\nCorrectly solve the original question."
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "grpo": (),
    "sdpo": ("--algo", "sdpo"),
    "hybrid": ("--algo", "sdpo", "--distill.weight", "0.5"),
    # The demonstration is the code, in a template that the model can use; the recipe's teacher and divergence.
    "sdft": ("--algo", "sdft", "--distill.skip_tokens", "0", "--reprompt.template", TEMPLATE),
}


@dataclass(frozen=True)
class Task:
    """The reward and the feedback (arguments of `vault_rewards.make`), and how responses are sampled."""

    reward: dict[str, str] = field(default_factory=dict)
    samples_per_prompt: int = 4
    lr: float = 1e-3
    success: float = 0.5  # the reward of a success, which may teach


TASKS = {
    "feedback only": Task({"reward": "whole"}),
    "sparse success": Task({"reward": "first_digit", "told": "None"}, samples_per_prompt=8, lr=3e-4),
    "partial reward": Task({"reward": "right_digits"}, success=1.0),
}


@dataclass(frozen=True)
class Run:
    algorithm: str
    task: str
    changed: dict[str, Any] = field(default_factory=dict)  # of the task; what concerns the reward is under `reward`
    label: str = ""

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.algorithm, self.task, self.label)))


def wrong(label: str, **reward: Any) -> Run:
    return Run("sdpo", "feedback only", {"reward": {k: str(v) for k, v in reward.items()}}, label)


def told(label: str, what: str) -> Run:
    return Run("sdpo", "partial reward", {"reward": {"told": what}}, label)


def sampled(algorithm: str, task: str, number: int) -> Run:
    return Run(algorithm, task, {"samples_per_prompt": number}, f"{number} per prompt")


def at_lr(algorithm: str, task: str, lr: float) -> Run:
    return Run(algorithm, task, {"lr": lr}, f"lr {lr:g}")


CORE = [Run(algorithm, task) for task in TASKS for algorithm in ALGORITHMS]
FEEDBACK_ONLY, SPARSE, PARTIAL = (Run("sdpo", task) for task in TASKS)
# By question, the runs that are compared; those of the core are in them again.
QUESTIONS: dict[str, list[Run]] = {
    "samples per prompt, feedback only (plain: 4)": [
        *(sampled("sdpo", "feedback only", number) for number in (1, 2)), FEEDBACK_ONLY,
        sampled("sdpo", "feedback only", 8),
    ],
    # Without feedback, one sample per prompt teaches nothing: SDPO has no sibling to show, GRPO nothing to compare.
    "samples per prompt, sparse success (plain: 8)": [
        *(sampled("sdpo", "sparse success", number) for number in (2, 4)), SPARSE,
        *(sampled("grpo", "sparse success", number) for number in (2, 4)), Run("grpo", "sparse success"),
    ],
    "wrong feedback, feedback only (plain: none)": [
        FEEDBACK_ONLY,
        *(wrong(f"{fraction:.0%} random codes", wrong=fraction) for fraction in (0.25, 0.5, 0.75)),
        wrong("50% one wrong code", wrong=0.5, stubborn=True),
    ],
    "information in the feedback, partial reward (plain: the code)": [
        PARTIAL, told("right digits, others drawn", "other_digits"), told("right digits, marks", "marks"),
        told("nothing", "None"), Run("grpo", "partial reward"),
    ],
    "learning rate (plain: 3e-4 and 1e-3)": [
        *(at_lr("grpo", "sparse success", lr) for lr in (1e-4, 1e-3)), at_lr("sdpo", "sparse success", 1e-3),
        at_lr("grpo", "partial reward", 3e-4),
    ],
}  # fmt: skip
RUNS = list({run.name: run for run in [*CORE, *(run for runs in QUESTIONS.values() for run in runs)]}.values())


def reward_file(arguments: dict[str, str], path: Path) -> None:
    """A reward function of OpenRLHF: `vault_rewards.make` with `arguments`."""
    given = ", ".join(f"{name}={value}" for name, value in arguments.items())
    path.write_text(
        f"import sys\n\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n\n"
        f"from vault_rewards import *\n\nreward_func = make({given})\n"
    )


def rows(seed: int) -> list[dict[str, Any]]:
    """The vaults with the codes of `seed`; SDFT reads its demonstration from the row."""
    codes = vault_codes(SECRET_VAULTS, Settings(seed=seed))
    return [{"prompt": chat(name), "label": code, "privileged_context": code} for name, code in codes.items()]


def directory(run: Run, seed: int) -> Path:
    return OUT / f"{run.name.replace(', ', '-').replace(' ', '_').replace('%', '')}-{seed}"


def train(run: Run, seed: int) -> None:
    task = TASKS[run.task]
    settings = vars(task) | run.changed
    prompts = SAMPLES // settings["samples_per_prompt"]
    repeats = max(prompts // len(SECRET_VAULTS), 1)  # of a vault in a step
    inputs = OUT / "inputs" / directory(run, seed).name
    inputs.mkdir(parents=True, exist_ok=True)
    reward_file(task.reward | run.changed.get("reward", {}), inputs / "reward.py")
    lines = [json.dumps(row) + "\n" for row in rows(seed)]
    (inputs / "train.jsonl").write_text("".join(lines * repeats))
    (inputs / "eval.jsonl").write_text("".join(lines))
    flags = {
        "reward.remote_url": inputs / "reward.py", "data.prompt_dataset": inputs / "train.jsonl",
        "eval.dataset": inputs / "eval.jsonl", "eval.steps": EVAL_STEPS, "actor.adam.lr": settings["lr"],
        "rollout.batch_size": prompts, "rollout.n_samples_per_prompt": settings["samples_per_prompt"],
        "train.num_episodes": STEPS * prompts // (repeats * len(SECRET_VAULTS)),
    }  # fmt: skip
    if ALGORITHMS[run.algorithm]:
        flags["reprompt.success_threshold"] = settings["success"]
    if settings["samples_per_prompt"] == 1:  # group_norm compares a prompt's samples
        flags["algo.advantage.estimator"] = "reinforce"
    recipe = RECIPE / ("sdpo.yaml" if ALGORITHMS[run.algorithm] else "grpo.yaml")
    given = [*ALGORITHMS[run.algorithm], *(f"--{name}={value}" for name, value in flags.items())]
    trained(directory(run, seed), run.name, seed, recipe, given)


# ── what was seen ──

Found = dict[str, list[dict[str, Any]]]  # by name of the run, the summaries of its seeds


def found() -> Found:
    summaries = [json.loads(path.read_text()) for path in sorted(OUT.glob("*/summary.json"))]
    return {run.name: of for run in RUNS if (of := [s for s in summaries if s["name"] == run.name])}


def generations_to(summary: dict[str, Any], goal: float) -> float:
    """The samples drawn until the first evaluation at `goal` or above; infinite if there is none."""
    return next((step * SAMPLES for step, value in summary["accuracy"] if value > goal - 1e-6), inf)


def spread(values: list[float], form: str) -> str:
    def written(value: float) -> str:
        return "never" if value == inf else format(value, form)

    least, greatest = written(min(values)), written(max(values))
    middle = written(statistics.median(values))
    return middle if least == greatest else f"{middle} ({least}–{greatest})"


def accuracies(summaries: list[dict[str, Any]]) -> list[str]:
    """At `SHOWN`, the mean over seeds with the least and the greatest."""
    cells = []
    for step in SHOWN:
        values = [dict(map(tuple, summary["accuracy"]))[step] for summary in summaries]
        band = f" ({min(values):.0%}–{max(values):.0%})" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.0%}{band}")
    return cells


def core_table(found: Found, task: str) -> str:
    """Generations are counted as far as GRPO's mean accuracy at its end, and the ratio to GRPO's own number of them.

    A GRPO run that ends below its seeds' mean counts with all its generations. The ratio is of runs of one seed, and 0
    where its own number is infinite.
    """
    grpo = {summary["seed"]: summary for summary in found.get(f"grpo, {task}", [])}
    if not grpo:
        return ""
    goal = statistics.mean(summary["accuracy"][-1][1] for summary in grpo.values())
    heads = [
        *(f"{step * SAMPLES:,}" for step in SHOWN), "to GRPO's final accuracy", "speedup over GRPO", "to 50%",
        "wall, s", "seeds",
    ]  # fmt: skip
    lines = ["| sampled responses | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for algorithm in ALGORITHMS:
        summaries = found.get(f"{algorithm}, {task}", [])
        if not summaries:
            continue
        needed = {summary["seed"]: generations_to(summary, goal) for summary in summaries}
        own = {seed: min(generations_to(summary, goal), STEPS * SAMPLES) for seed, summary in grpo.items()}
        ratios = [own[seed] / needed[seed] for seed in needed if seed in own]
        times = spread(ratios, ".1f") if algorithm != "grpo" else "–"
        compared = [spread(list(needed.values()), ",.0f"), times] if goal > 0 else ["–", "–"]
        half = spread([generations_to(summary, 0.5) for summary in summaries], ",.0f")
        wall = spread([summary["wall_s"] for summary in summaries], ".0f")
        cells = [algorithm, *accuracies(summaries), *compared, half, wall, str(len(summaries))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"{task}; GRPO ends at {goal:.0%}", "", *lines])


def asked(found: Found) -> dict[str, list[Run]]:
    """The questions of which something is known."""
    return {question: runs for question, runs in QUESTIONS.items() if any(r.label and r.name in found for r in runs)}


def question_table(found: Found, question: str, runs: list[Run]) -> str:
    heads = [*(f"{step * SAMPLES:,}" for step in SHOWN), "seeds"]
    lines = [question, "", "| sampled responses | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for run in runs:
        if summaries := found.get(run.name):
            lines.append(f"| {' | '.join([run.name, *accuracies(summaries), str(len(summaries))])} |")
    return "\n".join(lines)


def plot(found: Found, path: Path) -> None:
    shown = {task: [Run(algorithm, task) for algorithm in ALGORITHMS] for task in TASKS} | asked(found)
    figure, grid = pyplot.subplots(2, 4, figsize=(18, 8), layout="constrained", sharey=True)
    for axes, (title, runs) in zip(grid.flat, shown.items(), strict=False):
        for i, run in enumerate(runs):
            if summaries := found.get(run.name):
                label = run.algorithm if title in TASKS else run.name.replace(f", {run.task}", "")
                band(axes, summaries, label, f"C{i}", SAMPLES)
        axes.set(xlabel="sampled responses", ylim=(-0.02, 1.02))
        axes.set_title(title, fontsize="medium")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
    for axes in grid[:, 0]:
        axes.set_ylabel("mean reward of greedy answers, 24 vaults")
    figure.savefig(path, dpi=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3, 4, 5], help="none: tables and picture only")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of names in the tables")
    args = parser.parse_args()
    subprocess.run([sys.executable, RECIPE / "vault.py", ROOT / "runs" / "quickstart"], check=True)
    chosen = [run for run in RUNS if any(fnmatch(run.name, pattern) for pattern in args.only)]
    failed = []
    OUT.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(args.seeds) * len(chosen), desc="study") as bar:
        for seed in args.seeds:
            for run in chosen:
                bar.set_postfix(run=f"{run.name}, seed {seed}")
                try:
                    train(run, seed)
                except subprocess.CalledProcessError:
                    failed.append(f"{run.name}, seed {seed}: see {directory(run, seed) / 'log.txt'}")
                bar.update()
    seen = found()
    tables = [core_table(seen, task) for task in TASKS] + [question_table(seen, *of) for of in asked(seen).items()]
    (OUT / "table.md").write_text("\n\n".join(filter(None, tables)) + "\n")
    plot(seen, ROOT / "docs/validation/learning.png")
    print((OUT / "table.md").read_text())
    if failed:
        sys.exit("failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
