"""Run recipes small: `python recipes/smoke.py [TASK ...]`, all tasks if none is named.

The launch line in a recipe's header is run as it stands, with recipes/smoke.yaml as the last `--config` and the rows of
recipes/TASK/smoke.jsonl: one step of a tiny model on CPU, by the real OpenRLHF. What runs print is in runs/smoke/.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from sdpo_plugin import report
from sdpo_plugin.testing import tiny_model, tiny_vision_model

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
OUT = ROOT / "runs" / "smoke"
FIELDS = ("Data", "Reward", "Hardware", "Launch", "Numbers")
WATCHED = ("loss", "token_fraction")  # nothing is distilled if one of them is zero


def header(recipe: Path) -> dict[str, str]:
    """A recipe's fields, `# Data:     text` with further lines indented."""
    fields: dict[str, str] = {}
    for line in recipe.read_text().splitlines():
        if not line.startswith("#"):
            break
        found = re.match(rf"# ({'|'.join(FIELDS)}): +(.*)", line)
        if found:
            name, text = found.groups()
            fields[name] = text
        elif fields:
            fields[name] += "\n" + line[1:].strip()
    return fields


def launch(recipe: Path) -> list[str]:
    """The flags of the header's launch line, behind `openrlhf-sdpo train`."""
    command, subcommand, *flags = shlex.split(header(recipe)["Launch"].replace("\\\n", " "))
    if (command, subcommand) != ("openrlhf-sdpo", "train"):
        raise ValueError(f"{recipe}: a launch line begins with openrlhf-sdpo train, not {command} {subcommand}")
    return flags


def configs(flags: list[str]) -> list[str]:
    return [value for flag, value in zip(flags, flags[1:], strict=False) if flag == "--config"]


def rows(flags: list[str]) -> str | None:
    """The smoke.jsonl beside the last recipe of a launch line that has one."""
    found = (Path(config).with_name("smoke.jsonl") for config in reversed(configs(flags)))
    return next((str(path) for path in found if (ROOT / path).exists()), None)


def small(flags: list[str]) -> list[str]:
    """A launch line's flags for a smoke run."""
    data = [rows(flags) if flag == "DATA.jsonl" else flag for flag in flags]
    pictured = any("max_images_per_prompt" in (ROOT / config).read_text() for config in configs(flags))
    model = ["--actor.model_name_or_path", "runs/smoke/vision"] if pictured else []
    return [*data, "--config", "recipes/smoke.yaml", *model]


def smoked() -> list[Path]:
    """The recipes that have rows, but for those that another one's launch line begins with."""
    lines = {recipe: configs(launch(recipe)) for recipe in RECIPES if recipe.stem != "smoke" and rows(launch(recipe))}
    own = {recipe: line for recipe, line in lines.items() if ROOT / line[-1] == recipe}
    return [r for r, line in own.items() if not any(o != line and o[: len(line)] == line for o in own.values())]


def run(recipe: Path) -> str:
    """Run a recipe small; what its metrics say. Exits if it failed or distilled nothing."""
    name = "-".join(recipe.relative_to(ROOT / "recipes").with_suffix("").parts)
    log, tensorboard = OUT / f"{name}.log", OUT / name
    shutil.rmtree(tensorboard, ignore_errors=True)
    flags = [*small(launch(recipe)), "--logger.tensorboard_dir", str(tensorboard)]
    with open(log, "w") as output:
        command = [sys.executable, "-m", "sdpo_plugin", "train", *flags]
        if subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT).returncode:
            sys.exit(f"{name} failed; see {log}")
    metrics = report.read_scalars(str(tensorboard))
    values = {key: metrics[f"train/self_distillation/{key}"][0][1] for key in WATCHED}
    if not all(values.values()):
        sys.exit(f"{name} distilled nothing, {values}; see {log}")
    return f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items())


def main(tasks: list[str]) -> None:
    chosen = [r for r in RECIPES if r.parent.name in tasks and rows(launch(r))] if tasks else smoked()
    if not chosen:
        sys.exit(f"no recipe with rows to run it on in {', '.join(tasks)}")
    tiny_model(OUT / "model", positions=4096)
    tiny_vision_model(OUT / "vision", positions=4096)
    for recipe in chosen:
        began = time.monotonic()
        print(f"{run(recipe)} ({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
