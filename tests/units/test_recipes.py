"""Every recipe: its header, its launch line against OpenRLHF's own flags, the files it names, and its rows."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from documented import DOCS, PAGES, commands, inline, modules, where
from ruamel.yaml import YAML

from sdpo_plugin import StopTraining
from sdpo_plugin.openrlhf_adapter.launcher import recipe

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "recipes" / "test_time")]
import smoke  # noqa: E402

NAMES = {str(path.relative_to(ROOT)): path for path in smoke.RECIPES}
SMALL = {f"{name}, small": smoke.small(smoke.launch(path)) for name, path in NAMES.items()}
PARSE_ALL = """
import copy, json, sys
from sdpo_plugin.algorithms import compatibility
compatibility.require_same_tokenizer = lambda student, teacher: None  # of models on the Hugging Face Hub
from sdpo_plugin.openrlhf_adapter.launcher import launch

def parse_launch_lines(parser, arguments, on_cpu):
    for name, line in json.load(open(arguments[0])).items():
        args = original(copy.deepcopy(parser), line, on_cpu="--platform=cpu" in line)
        print("PARSED", json.dumps([name, vars(args)], default=str))
    sys.exit()

original, launch.parse = launch.parse, parse_launch_lines
launch.train(sys.argv[1:])
"""


TRAIN = re.compile(r"(openrlhf-sdpo train|(ray job submit -- )?python -m openrlhf\.cli\.train_ppo_ray) ")
# What readers put in: dots for their usual flags, a recipe or data of theirs.
THEIRS = {" ...": "", "RECIPE.yaml": "recipes/quickstart/sdpo.yaml"}


def training(page: Path) -> list[str]:
    """A page's training commands, without those that log to SwanLab where it is not installed: they are rejected."""
    found = [line for line in [*commands(page), *inline(page)] if TRAIN.match(line) and " --" in line]
    found = [line for line in found if "--help" not in line]
    return [line for line in found if "--logger.swanlab" not in line or find_spec("swanlab")]


TRAINING = [page for page in PAGES if training(page)]


def as_given(command: str) -> str:
    for theirs, ours in THEIRS.items():
        command = command.replace(theirs, ours)
    return TRAIN.sub("", command)


@pytest.fixture(scope="module")
def parsed(tmp_path_factory):
    """The arguments of every launch line, as it is and small, and of the pages' commands, by command.

    From OpenRLHF's own parser and all plugins.
    """
    directory = tmp_path_factory.mktemp("lines")
    file = directory / "lines.json"
    for page in DOCS.glob("*.md"):  # the recipes and plugins that commands name
        for language, suffix in (("yaml", "yaml"), ("python", "py")):
            for listing, text in modules(page.name, language).items():
                (directory / f"{listing}.{suffix}").write_text(text)
    lines = {name: smoke.launch(path) for name, path in NAMES.items()} | SMALL
    for command in (command for page in TRAINING for command in training(page)):
        words = shlex.split(as_given(command))
        lines[command] = [str(directory / word) if (directory / word).exists() else word for word in words]
    file.write_text(json.dumps(lines))
    run = subprocess.run(
        [sys.executable, "-c", PARSE_ALL, file], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(directory)])},
    )  # fmt: skip
    found = [line.removeprefix("PARSED ") for line in run.stdout.splitlines() if line.startswith("PARSED ")]
    assert len(found) == len(lines), run.stderr[-2000:]
    return dict(json.loads(line) for line in found)


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_what_it_takes(name, parsed):
    path, args = NAMES[name], parsed[name]
    header = smoke.header(path)
    own = set(recipe.load(str(path)))
    wanted = set(smoke.FIELDS) - (set() if {"reward.remote_url", "train.agent_func_path"} & own else {"Reward"})
    assert wanted <= set(header)
    text = " ".join(header.values())
    named = set(re.findall(r"(?:recipes|sdpo_plugin|docs)/[\w./]+\w", text))
    assert [str(file) for file in named if not (ROOT / file).exists()] == []
    for key in ("reward.remote_url", "train.agent_func_path"):
        if args[key]:
            assert (ROOT / args[key]).exists() and (key not in own or Path(args[key]).name in header["Reward"])


@pytest.mark.parametrize("name", [*NAMES, *SMALL])
def test_a_launch_line_is_understood_and_its_last_recipe_wins(name, parsed):
    line = SMALL.get(name) or smoke.launch(NAMES[name])
    assert name.removesuffix(", small") in smoke.configs(line)
    wanted = {}
    for config in smoke.configs(line):
        wanted |= recipe._flatten(YAML(typ="safe", pure=True).load(ROOT / config))
    if "--actor.model_name_or_path" in line:  # flags win over recipes
        wanted["actor.model_name_or_path"] = line[line.index("--actor.model_name_or_path") + 1]
    assert {key: parsed[name][key] for key in wanted} == wanted


@pytest.mark.parametrize("page", TRAINING, ids=where)
def test_the_commands_of_a_page_are_understood(page, parsed):
    assert all(parsed[command] for command in training(page))


def test_every_task_and_the_pages_on_training_have_a_command():
    assert {page for page in PAGES if page.name == "README.md" and page.parent != ROOT} <= set(TRAINING)
    wanted = {"data.md", "gpu.md", "recipes.md", "algorithms.md", "checkpoints.md", "tutorial.md", "hooks.md"}
    assert wanted <= {p.name for p in TRAINING}


@pytest.mark.parametrize("task", sorted({path.parent for path in smoke.RECIPES} - {ROOT / "recipes"}))
def test_a_task_has_a_page_that_names_its_files(task):
    page = (task / "README.md").read_text()
    assert [file.name for file in task.glob("*.yaml") if file.name not in page] == []
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page) if "://" not in link]
    assert [link for link in links if not (task / link).exists()] == []
    assert f"recipes/{task.name}" in (ROOT / "docs" / "recipes.md").read_text()


def test_the_published_recipes_make_the_published_number_of_updates(parsed):
    for name, updates in (("sciknoweval/sdpo", 1), ("tooluse/sdpo", 1), ("livecodebench/sdpo", 32)):
        args = parsed[f"recipes/{name}.yaml"]
        samples = args["rollout.batch_size"] * args["rollout.n_samples_per_prompt"]
        assert samples == 32 * 8 and samples // args["train.batch_size"] == updates == args["teacher.sync_steps"]
    for name in ("tooluse/sdft", "opsd_maths/opsd"):
        args = parsed[f"recipes/{name}.yaml"]
        assert args["train.batch_size"] == args["rollout.batch_size"] == 32
        assert args["rollout.n_samples_per_prompt"] == 1


PROGRAMS = {
    "their sum": "n = int(input())\nprint(sum(map(int, input().split())))",
    "backwards": "word = input().strip()\nprint('YES' if word == word[::-1] else 'NO')",
    "vowels": "def vowels(text):\n    return sum(letter in 'aeiou' for letter in text)",
    "spread": "def spread(numbers):\n    return max(numbers) - min(numbers)",
}


def right_answer(row: dict, reward: str) -> str:
    """A response that answers a row of a task whose reward function is in the file `reward`."""
    if reward.endswith("code.py"):
        question = row["prompt"][-1]["content"]
        return next(f"```python\n{code}\n```" for words, code in PROGRAMS.items() if words in question)
    if reward.endswith("choice.py"):
        return f"<answer>\n{row['label']}\n</answer>"
    if reward.endswith("reasoning.py"):
        return f"<answer>{json.loads(row['label'])['entry']['answer']}</answer>"
    if reward.endswith("maths.py"):
        return f"\\boxed{{{row['label']}}}"
    return row["privileged_context"]  # a demonstration


@pytest.mark.parametrize(
    "name", [str(p.relative_to(ROOT)) for p in smoke.smoked() if "train.agent_func_path" not in recipe.load(str(p))]
)
def test_the_rows_can_be_answered_and_the_reward_function_knows(name, parsed):
    args = parsed[name]
    if args["reward.remote_url"].endswith("reasoning.py"):
        pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'openrlhf-sdpo[reasoning]'")
    spec = importlib.util.spec_from_file_location("reward", ROOT / args["reward.remote_url"])
    spec.loader.exec_module(reward := importlib.util.module_from_spec(spec))
    rows = [json.loads(line) for line in (ROOT / smoke.rows(smoke.launch(NAMES[name]))).read_text().splitlines()]
    assert 3 <= len(rows) <= 8
    for row in rows:
        answers = right_answer(row, args["reward.remote_url"]), "I do not know."
        judged = [reward.reward_func([f"Q?{answer}"], ["Q?"], [row[args["data.label_key"]]]) for answer in answers]
        assert [found["rewards"].item() for found in judged] == [1.0, 0.0], row
        assert judged[0]["feedback"] == [None] and judged[1]["feedback"][0]
        if args["algo.name"] in ("sdft", "opsd"):
            assert row[args["reprompt.privileged_key"]]


def test_a_run_on_one_question_ends_when_it_is_solved():
    import until_solved

    until_solved.openrlhf_metrics(status={"reward": 0.0}, args=SimpleNamespace())
    with pytest.raises(StopTraining, match="solved by 12% of this step's attempts"):
        until_solved.openrlhf_metrics(status={"reward": 0.125}, args=SimpleNamespace())


def test_attempts_until_the_first_success(tmp_path):
    from attempts import attempts
    from torch.utils.tensorboard import SummaryWriter

    for name, rewards in {"solved": [0, 0, 0.125, 0], "not": [0, 0]}.items():
        with SummaryWriter(tmp_path / name) as writer:
            for step, reward in enumerate(rewards, 1):
                writer.add_scalar("train/reward", reward, step)
    assert attempts(str(tmp_path / "solved"), 8) == "solved within 24 attempts"
    assert attempts(str(tmp_path / "not"), 8) == "not solved in 16 attempts"
