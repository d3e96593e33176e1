"""Python programs against tests, in a sandbox: `--reward.remote_url .../sdpo_plugin/environments/code.py`.

A label is JSON in LiveCodeBench's layout: a list of tests `{"input", "output", "testtype": "stdin" | "functional"}`,
or an object with `tests`, or `public_test_cases` and `private_test_cases`, and with `fn_name` for functions, whose
`input` has one JSON argument a line. The program is the last fenced block of the response that is one: Python by its
tag, or without a tag. The reward is 1 if all tests pass, else 0.

What the feedback tells, of the first test that failed (`detail`):

| `outcome`  | that it failed, and how many passed before it                     |
| `error`    | also the exception with its line, or the limit that was met       |
| `expected` | also input, expected and actual output, if the test is public     |

Settings other than the defaults: a file of your own with `reward_func = make(detail="error")`.

    python -m sdpo_plugin.environments.code test6.jsonl [--since 2025-02-01] [--until 2025-05-01] [--private 0.5]

prints a data set made of a file of LiveCodeBench (`livecodebench/code_generation_lite`): its problems from the first
date to before the second, with that fraction of their private tests.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import keyword
import pickle
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from sdpo_plugin.distillation.thinking import visible
from sdpo_plugin.environments import sandbox
from sdpo_plugin.environments.feedback import cut, one_of, reward_function
from sdpo_plugin.environments.fences import Block, blocks

PYTHON = re.compile(r"[ci]?py(?:thon|py)?[\d.]*|.*\.py")  # what a block's first word may be
# What a program that is tested by its output has: it reads, and it prints.
READS, PRINTS = re.compile(r"\binput\b|\bstdin\b|\bopen\("), re.compile(r"\bprint\s*\(|=\s*print\b|\bstdout\b|write")
INSTRUCTION = (
    "You are given a programming problem. Write a Python program that meets its specification and passes all tests. "
    "End with the whole program in a fenced block, ```python ... ```."
)
DETAILS = ("outcome", "error", "expected")
MET = {
    "time": "it did not end within {seconds:g} s", "memory": "it used more than {megabytes} MB of memory",
    "output": "it printed more than {kilobytes} KB",
    "died": "it was killed, or ended itself without a result",
}  # fmt: skip


class Case(NamedTuple):  # no dataclass: OpenRLHF loads this file without an entry in sys.modules
    """A test: what a program is given and what is expected, and whether feedback may show it."""

    given: str
    expected: str
    public: bool = True


def make(
    detail: str = "expected", show_private: bool = False, budget: int = 1500, limits: sandbox.Limits | None = None
) -> Callable[..., dict[str, Any]]:
    """A reward function for `--reward.remote_url`.

    Args:
        detail: one of `DETAILS`. show_private: also what private tests expect. budget: characters of feedback.
    """
    one_of(detail, DETAILS)

    def judged(response: str, label: str) -> tuple[float, str | None]:
        passed, feedback = judge(response, label, detail, show_private, limits)
        return float(passed), None if passed else feedback

    return reward_function(judged, budget)


def judge(
    response: str, label: str, detail: str = "expected", show_private: bool = False,
    limits: sandbox.Limits | None = None,
) -> tuple[bool, str]:  # fmt: skip
    """Whether the response's program passes all tests of `label`, and the feedback if not."""
    function, cases = parse(label)
    program = extract(response, function)
    if program is None:
        return False, "The response has no program: put it into a fenced block, ```python ... ```."
    limits = _with_room(limits or sandbox.Limits(), cases)
    outcomes = sandbox.run(program, [case.given for case in cases], function, limits)
    for i, (case, outcome) in enumerate(zip(cases, outcomes, strict=False)):
        if outcome.end == "ok" and (equal_values if function else equal_text)(outcome.output, case.expected):
            continue
        return False, describe(i, cases, outcome, detail, show_private or case.public, limits)
    return len(outcomes) == len(cases), "The program ended before all tests were run."


def _with_room(limits: sandbox.Limits, cases: list[Case]) -> sandbox.Limits:
    """Limits under which what is expected can be printed, in JSON too: twice as much as the longest."""
    longest = max(len(json.dumps(case.expected)) for case in cases)
    return replace(limits, output=max(limits.output, 2 * longest))


def extract(response: str, function: str | None = None) -> str | None:
    """The program of a response, or None: the last fenced block that may be one, thoughts aside.

    Blocks that are Python by their tag, or have none, come before others; among them those that define the function,
    or read and print, if there is none: not the output that is shown after the program, nor how to call it.
    """
    signs = [re.compile(rf"\bdef\s+{function}\b|\b{function}\s*=")] if function else [READS, PRINTS]

    def rank(numbered: tuple[int, Block]) -> tuple[bool, int, bool, int]:
        i, block = numbered
        seen, python = sum(bool(sign.search(block.content)) for sign in signs), bool(PYTHON.fullmatch(block.language))
        return python or not block.language, seen, python, i

    programs = [block for block in blocks(visible(response)) if block.content.strip()]
    found = max(enumerate(programs), key=rank, default=None)
    return found[1].content if found else None


def check_label(label: Any) -> None:
    """The check of a dataset before a run.

    Raises:
        ValueError: the label is not in the layout above, or no program can pass its tests.
    """
    function, cases = parse(label)
    for i, case in enumerate(cases if function else (), 1):
        try:
            for line in filter(bytes.strip, case.given.encode().splitlines()):
                _value(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"input of test {i} must be one JSON argument a line: {error}") from error
        if not equal_values(case.expected, case.expected):
            raise ValueError(f"output of test {i} must be a JSON value that equals itself, not {case.expected[:80]!r}")


def parse(label: Any) -> tuple[str | None, list[Case]]:
    """The function to call, if the tests are of one, and the tests, public ones first.

    Raises:
        ValueError: the label is not in the layout above.
    """
    shown = repr(label)[:80]
    try:
        found = _loaded(label)
        if isinstance(found, list):
            found = {"tests": found}
        tests = []
        for name, public in (("tests", True), ("public_test_cases", True), ("private_test_cases", False)):
            tests += [(test, public) for test in _loaded(found.get(name) or ())]
        cases = [Case(t["input"], t["output"], bool(public and t.get("public", True))) for t, public in tests]
        functional = {t.get("testtype") == "functional" for t, _ in tests if "testtype" in t}
        function = found.get("fn_name") or _loaded(found.get("metadata") or {}).get("func_name")
        for text in (text for case in cases for text in (case.given, case.expected)):
            text.encode()  # neither a number nor half a surrogate pair
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"a label must be JSON with tests of input and output as text, not {shown}: {why}") from error
    if not cases or (True in functional and not function):
        raise ValueError(f"a label must have tests, and fn_name if they are of a function: {shown}")
    if len(functional) > 1 or not (function is None or _is_name(function)):
        raise ValueError(f"a label must have one testtype, and fn_name must be a name: {shown}")
    return function, cases


def _is_name(found: Any) -> bool:
    return isinstance(found, str) and found.isidentifier() and not keyword.iskeyword(found)


def _loaded(found: Any) -> Any:
    """A part of a label: JSON, or what was read of it."""
    return json.loads(found) if isinstance(found, str) else found


def describe(
    i: int, cases: list[Case], outcome: sandbox.Outcome, detail: str, shown: bool, limits: sandbox.Limits
) -> str:
    """Of test `i`, which failed."""
    lines = [f"Test {i + 1} of {len(cases)} failed."]
    if detail == "outcome":
        return lines[0]
    if outcome.end == "error":
        lines.append(outcome.error.strip() or "It ended with an error.")
    elif outcome.end != "ok":
        sizes = {"megabytes": limits.memory // sandbox.MIB, "kilobytes": limits.output // 1024}
        lines.append(f"While it ran, {MET[outcome.end].format(seconds=limits.seconds, **sizes)}.")
    elif detail == "error" or not shown:
        lines.append("Its output is wrong.")
    if detail == "expected" and shown:
        lines += ["Input:", cut(cases[i].given.strip(), 400), "Expected:", cut(cases[i].expected.strip(), 300)]
        if outcome.end == "ok":
            lines += ["Got:", cut(outcome.output.strip(), 300) or "(nothing)"]
    return "\n".join(lines)


def equal_text(printed: str, expected: str) -> bool:
    """Line by line, white space at ends aside; or token by token, where all are numbers of equal value."""
    lines = [[line.strip() for line in text.strip().splitlines()] for text in (printed, expected)]
    if lines[0] == lines[1]:
        return True
    tokens = [text.split() for text in (printed, expected)]
    if len(tokens[0]) != len(tokens[1]) or len(lines[0]) != len(lines[1]):
        return False
    try:
        return all(a == b or Decimal(a) == Decimal(b) for a, b in zip(*tokens, strict=True))
    except InvalidOperation:
        return False


def equal_values(returned: str, expected: str) -> bool:
    """As JSON. Neither is if it is nested more deeply than can be read."""
    try:
        return bool(_value(returned) == _value(expected))
    except (ValueError, RecursionError):
        return False


def _value(text: str | bytes) -> Any:
    """Of JSON. Its integers may have any number of digits."""
    return json.loads(text, parse_int=Decimal)


def rows(path: str, since: str = "", until: str = "9", private: float = 1.0) -> Iterator[dict[str, Any]]:
    """A dataset from a file of LiveCodeBench, with columns `prompt` and `label`.

    Args:
        since, until: dates of contests, `2025-02-01`; the second is not included.
        private: fraction of the private tests, at least one of each problem, drawn with a fixed seed. SDPO's authors
            train with half of them and evaluate with all.
    """
    draw = random.Random(0)
    with open(path) as file:
        for row in map(json.loads, file):
            if not since <= row["contest_date"] < until:
                continue
            hidden = _private(row["private_test_cases"])
            kept = sorted(draw.sample(range(len(hidden)), min(len(hidden), max(1, int(private * len(hidden))))))
            starter = row["starter_code"].strip()
            form = f"Complete this code:\n```python\n{starter}\n```" if starter else (
                "The program reads from standard input and prints to standard output."
            )  # fmt: skip
            label = {
                "fn_name": json.loads(row["metadata"] or "{}").get("func_name"),
                "public_test_cases": json.loads(row["public_test_cases"]),
                "private_test_cases": [hidden[i] for i in kept],
            }
            content = f"{INSTRUCTION}\n\n{row['question_content'].strip()}\n\n{form}"
            yield {"prompt": [{"role": "user", "content": content}], "label": json.dumps(label)}


def _private(text: str) -> list[dict[str, Any]]:
    """Private tests are JSON, or JSON as a string that was pickled, compressed and written as base64."""
    try:
        return json.loads(text)
    except ValueError:
        return json.loads(_Text(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load())


class _Text(pickle.Unpickler):
    """A pickle may call anything that it can name; this one can name nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the private tests must be text, and name {module}.{name}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sdpo_plugin.environments.code")
    parser.add_argument("file", help="a file of LiveCodeBench, JSON lines")
    parser.add_argument("--since", default="", help="first date of the contests")
    parser.add_argument("--until", default="9", help="date after the last one")
    parser.add_argument("--private", type=float, default=1.0, help="fraction of the private tests")
    options = parser.parse_args(arguments)
    for row in rows(options.file, options.since, options.until, options.private):
        print(json.dumps(row))


reward_func = make()

if __name__ == "__main__":
    main()
