"""Generated reasoning tasks: `--reward.remote_url .../sdpo_plugin/environments/reasoning.py`.

`reasoning-gym` (github.com/open-thought/reasoning-gym) generates the tasks, and its scorers give the rewards, partial
ones too. A label is JSON, `{"name", "parameters", "entry"}`: all that the scorer needs. The answer of a response is its
last `<answer>...</answer>`, of at most 10,000 characters more than the right one: some scorers take quadratic time.

| `detail`   | what the feedback has                                                                     |
| ---------- | ------------------------------------------------------------------------------------------ |
| `outcome`  | that the answer is wrong and what it scores, or that there is none and how to give it        |
| `error`    | also what is wrong with it, where that can be stated: too large, the first wrong line or word, |
|            | the rule of a puzzle that is broken                                                        |
| `expected` | also a right answer, if the task has one written down                                       |

    python -m sdpo_plugin.environments.reasoning NAME [PARAMETER=VALUE ...] ... --size 500 --seed 0 [--level L ...]

prints a dataset: of each task `--size` rows, and that for each level of its curriculum that is given.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from sdpo_plugin.distillation.thinking import visible
from sdpo_plugin.environments.feedback import one_of, reward_function
from sdpo_plugin.environments.reading import printable

DETAILS = ("outcome", "error", "expected")
MOST = 10_000  # characters of an answer, beyond the length of the right one
NOTHING = "?"  # what a scorer gets for an answer that it must not evaluate: it makes nothing of it
FUNCTIONS = frozenset("sin cos tan sec csc cot asin acos atan sinh cosh tanh exp log ln sqrt Abs".split())


def make(detail: str = "error", budget: int = 600) -> Callable[..., dict[str, Any]]:
    """A reward function: what reasoning-gym's scorer gives, 0 to 1."""
    one_of(detail, DETAILS)

    def judge(response: str, label: str) -> tuple[float, str | None]:
        name, dataset, entry = read_label(label)
        answer, right = answer_of(visible(response)), entry["answer"]
        if not answer:
            return 0.0, "The response has no answer: end it with <answer>, the answer alone, and </answer>."
        if len(answer) > MOST + len(right or ""):
            return 0.0, f"The answer is wrong. It is too long: it has {len(answer)} characters."
        safe = EVALUATED.get(name, _any)(answer)
        reward = score(dataset, answer if safe else NOTHING, entry)
        if reward >= 1.0:
            return 1.0, None
        feedback = "The answer is wrong." if "\n" in answer or len(answer) > 100 else f"The answer {answer} is wrong."
        feedback += f" It scores {reward:.2f} of 1." * (reward > 0)
        if detail != "outcome" and safe and (reason := wrong(name, dataset, answer, entry)):
            feedback += f" {reason}"
        if detail == "expected" and right is not None:
            feedback += f" Right is:\n{right}" if "\n" in right else f" Right is {right}."
        return reward, printable(feedback)

    return reward_function(judge, budget, "reasoning", detail=detail)


def answer_of(response: str) -> str:
    """The content of the last pair of tags, as reasoning-gym finds it; empty if there is none."""
    answer, at = "", 0
    while (start := response.find("<answer>", at)) >= 0 and (end := response.find("</answer>", start)) >= 0:
        answer, at = response[start + len("<answer>") : end], end
    return answer.strip()


def score(dataset: Any, answer: str, entry: dict[str, Any]) -> float:
    """What the scorer of a task gives an answer; 0 where it raises, as some do for answers that they cannot read."""
    try:
        reward = float(dataset.score_answer(answer, entry))
    except Exception:
        return 0.0
    return reward if math.isfinite(reward) else 0.0


# ── what is wrong ──


def wrong(name: str, dataset: Any, answer: str, entry: dict[str, Any]) -> str | None:
    """Feedback on a wrong answer that does not contain the right one."""
    from reasoning_gym.dataset import ProceduralDataset

    if name in RULES:
        try:
            return RULES[name](answer, entry["metadata"])
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            return "It is not of the form that the question asks for."
    right = entry["answer"]
    if not isinstance(right, str):
        return None
    if (wanted := _number(right)) is not None:
        found = _number(answer)
        return "It is not a number." if found is None else f"It is too {'large' if found > wanted else 'small'}."
    # Tasks with a scorer of their own may have several right answers, and positions in one do not apply to another.
    if type(dataset).score_answer is ProceduralDataset.score_answer:
        return _place(answer.splitlines(), right.splitlines(), "line") or _place(answer.split(), right.split(), "word")
    return None


def _number(text: str) -> Decimal | None:
    try:
        found = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
    return found if found.is_finite() else None


def _place(found: list[str], right: list[str], part: str) -> str | None:
    if len(right) == 1 == len(found):
        return None
    if len(found) != len(right):
        return f"It has {len(found)} {part}{'s' * (len(found) != 1)}; it takes {len(right)}."
    at = next((i for i, pair in enumerate(zip(found, right, strict=True), 1) if pair[0] != pair[1]), None)
    return None if at is None else f"The first wrong {part} is number {at}."


def _countdown(answer: str, metadata: dict[str, Any]) -> str:
    from sympy import parse_expr

    used = sorted(int(n) for n in re.findall(r"\d+", answer))
    given, target = sorted(metadata["numbers"]), metadata.get("target", 24)
    if used != given:
        return f"It uses {', '.join(map(str, used)) or 'no numbers'}; given are {', '.join(map(str, given))}."
    return f"Its value is {parse_expr(answer)}, not {target}."


def _sudoku(answer: str, metadata: dict[str, Any]) -> str:
    puzzle = metadata["puzzle"]
    size, box = len(puzzle), math.isqrt(len(puzzle))
    grid = [[int(n) for n in line.split()] for line in answer.splitlines()]
    if [len(row) for row in grid] != [size] * size:
        return f"It is not a grid of {size} lines with {size} numbers each."
    for r, c in ((r, c) for r in range(size) for c in range(size)):
        if puzzle[r][c] not in (0, grid[r][c]):
            return f"Row {r + 1}, column {c + 1} was given as {puzzle[r][c]}."
    boxes = [[grid[r // box * box + i // box][r % box * box + i % box] for i in range(size)] for r in range(size)]
    columns = list(zip(*grid, strict=True))
    for part, units in (("row", grid), ("column", columns), ("box", boxes)):
        for i, unit in enumerate(units, 1):
            if twice := [n for n in unit if unit.count(n) > 1]:
                return f"The number {twice[0]} stands {unit.count(twice[0])} times in {part} {i}."
    return f"Only the numbers 1 to {size} are allowed."


def _graph_color(answer: str, metadata: dict[str, Any]) -> str:
    from reasoning_gym.algorithmic.graph_color import verify_graph_coloring_solution

    return verify_graph_coloring_solution(metadata["puzzle"], json.loads(answer))[1]


RULES: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "countdown": _countdown, "puzzle24": _countdown, "sudoku": _sudoku, "mini_sudoku": _sudoku,
    "graph_color": _graph_color,
}  # fmt: skip


# ── answers that scorers evaluate as Python ──


def _any(answer: str) -> bool:
    return True


def is_literal(answer: str) -> bool:
    """Whether evaluating the answer as Python gives a list of values, or nothing at all."""
    try:
        tree = ast.parse(answer, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    if isinstance(tree.body, ast.Name):  # an answer such as ABCA is not Python; `entry` would be the right answer
        return answer.isupper()
    allowed = (ast.Expression, ast.List, ast.Tuple, ast.Constant, ast.Load, ast.UnaryOp, ast.USub)
    return all(isinstance(node, allowed) for node in ast.walk(tree))


def is_expression(answer: str, functions: frozenset[str] = frozenset(), most: int = 200) -> bool:
    """Whether the answer is arithmetic with numbers, up to four letters and `functions`, of a degree up to `most`."""
    try:
        tree = ast.parse(answer, mode="eval")
        letters = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - functions - {"pi"}
        return len(letters) <= 4 and all(len(name) == 1 for name in letters) and _degree(tree.body, functions) <= most
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _degree(node: ast.AST, functions: frozenset[str]) -> float:
    """Of an expression; a number counts as a letter. Raises ValueError for what is not allowed."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return 1
        case ast.Name():
            return 1
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=inner):
            return _degree(inner, functions)
        case ast.BinOp(left, ast.Add() | ast.Sub(), right):
            return max(_degree(left, functions), _degree(right, functions))
        case ast.BinOp(left, ast.Mult() | ast.Div(), right):
            return _degree(left, functions) + _degree(right, functions)
        case ast.BinOp(left, ast.Pow(), right):
            inside = list(ast.walk(right))
            if not any(isinstance(part, ast.Pow) for part in inside):
                values = [part.value for part in inside if isinstance(part, ast.Constant)]
                numbers = [abs(value) for value in values if isinstance(value, (int, float))]
                return _degree(left, functions) * max(_degree(right, functions), math.prod(numbers))
        case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in functions:
            return 1 + _degree(inner, functions)
    raise ValueError(ast.dump(node))


_integral = functools.partial(is_expression, functions=FUNCTIONS)


def _moves(answer: str) -> bool:
    """A scorer writes R3 out as R R R."""
    return not re.search(r"\d{3}", answer)


# Every scorer that evaluates an answer, and which ones it may.
EVALUATED: dict[str, Callable[[str], bool]] = {
    "string_insertion": is_literal, "spiral_matrix": is_literal, "binary_matrix": is_literal, "n_queens": is_literal,
    "countdown": is_expression, "puzzle24": is_expression, "polynomial_multiplication": is_expression,
    "simple_integration": _integral, "intermediate_integration": _integral, "rubiks_cube": _moves,
}  # fmt: skip


# ── labels ──


def read_label(label: Any) -> tuple[str, Any, dict[str, Any]]:
    """The task of a label, its dataset, which scores, and the entry.

    Raises:
        ValueError: it is not `{"name", "parameters", "entry"}` as JSON, or reasoning-gym has no such task.
    """
    form = '{"name": ..., "parameters": {...}, "entry": {..., "answer": ...}}'
    try:
        task = json.loads(label)
        name, parameters, entry = task["name"], task["parameters"], _unpacked(task["entry"])
        if not isinstance(entry["answer"], (str, type(None))):
            raise ValueError("an answer must be text, or null")
        return name, _dataset(name, json.dumps(parameters)), entry
    except (AssertionError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"a label must be JSON, {form}, not {str(label)[:80]!r}: {error}") from error


def check_label(label: Any) -> None:
    """Raises ValueError, with the reason, if a label is not of the form above, or its own answer does not score 1."""
    name, dataset, entry = read_label(label)
    right = entry["answer"]
    if right is not None and (reward := score(dataset, right, entry)) < 1.0:
        raise ValueError(f"the answer of the label itself, {right[:80]!r}, scores {reward:g} of 1 in {name}")


# ── data sets ──


def rows(
    name: str, size: int = 500, seed: int = 0, level: int | None = None, **parameters: Any
) -> Iterator[dict[str, Any]]:
    """A dataset of a task, with columns `prompt` and `label`.

    Args:
        level: of the task's curriculum. parameters: fields of its configuration; they come before the level's.

    Raises:
        ValueError: there is no such task, parameter, value or curriculum, or JSON does not keep what the scorer reads.
    """
    from reasoning_gym.factory import CURRICULA, DATASETS, create_curriculum, create_dataset
    from reasoning_gym.utils import SYSTEM_PROMPTS

    if name not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {name}; it has {', '.join(sorted(DATASETS))}")
    kind = DATASETS[name][1]
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := [parameter for parameter in parameters if parameter not in known]:
        raise ValueError(f"{name} has no parameter {unknown[0]}; it has {', '.join(known)}")
    if level is not None:
        if name not in CURRICULA:
            raise ValueError(f"{name} has no curriculum, so no levels")
        curriculum = create_curriculum(name)
        curriculum.set_global_level(level)
        parameters = _changed(curriculum.generate_configuration(), kind()) | parameters
    try:
        dataset = create_dataset(name, **parameters | {"size": size, "seed": seed})
    except AssertionError as error:  # how configurations are checked
        raise ValueError(f"{name} cannot be made with {parameters}: {error}") from error
    packed = _packed(parameters)
    for i in range(size):
        entry = dataset[i]
        label = json.dumps({"name": name, "parameters": packed, "entry": _packed(entry)})
        read = _unpacked(json.loads(label)["entry"])
        if score(_dataset(name, json.dumps(packed)), entry["answer"], read) != score(dataset, entry["answer"], entry):
            raise ValueError(f"entry {i} of {name} is scored differently after it was written as JSON")
        system = {"role": "system", "content": SYSTEM_PROMPTS["default"]}
        yield {"prompt": [system, {"role": "user", "content": entry["question"]}], "label": label}


@functools.lru_cache
def _dataset(name: str, parameters: str) -> Any:
    import reasoning_gym  # waits while another thread imports it; one of its modules would not, and have no tasks

    return reasoning_gym.create_dataset(name, **_unpacked(json.loads(parameters)), size=1, seed=0)


def _changed(configuration: Any, default: Any) -> dict[str, Any]:
    values = {field.name: getattr(configuration, field.name) for field in dataclasses.fields(configuration)}
    return {key: value for key, value in values.items() if value != getattr(default, key)}


def _packed(value: Any) -> Any:
    """For JSON, which has no tuples: scorers compare them."""
    if isinstance(value, tuple):
        return {"tuple": [_packed(part) for part in value]}
    if isinstance(value, list):
        return [_packed(part) for part in value]
    return {key: _packed(part) for key, part in value.items()} if isinstance(value, dict) else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(part) for part in value]
    if isinstance(value, dict):
        if value.keys() == {"tuple"}:
            return tuple(_unpacked(part) for part in value["tuple"])
        return {key: _unpacked(part) for key, part in value.items()}
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sdpo_plugin.environments.reasoning")
    parser.add_argument("tasks", nargs="+", help="names, each followed by its PARAMETER=VALUEs (values are JSON)")
    parser.add_argument("--size", type=int, default=500, help="rows of each task, at each level")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--level", type=int, nargs="+", default=[None], help="of the curriculum")
    options = parser.parse_intermixed_args(arguments)
    tasks: list[tuple[str, dict[str, Any]]] = []
    for word in options.tasks:
        key, given, value = word.partition("=")
        if not given:
            tasks.append((word, {}))
        elif tasks:
            tasks[-1][1][key] = _value(value)
        else:
            parser.error(f"{word} stands before the name of a task")
    try:
        for level in options.level:
            for name, parameters in tasks:
                for row in rows(name, options.size, options.seed, level, **parameters):
                    print(json.dumps(row))
    except ValueError as error:
        parser.error(str(error))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


reward_func = make()

if __name__ == "__main__":
    main()
