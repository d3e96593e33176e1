"""Python programs against tests, in a sandbox: `--reward.remote_url .../sdpo_plugin/environments/code.py`.

A label is JSON in LiveCodeBench's layout: a list of tests `{"input", "output", "testtype": "stdin" | "functional"}`,
or an object with `tests`, or `public_test_cases` and `private_test_cases`, and with `fn_name` for functions, whose
`input` has one JSON argument a line. The program is the last fenced block of the response. The reward is 1 if all tests
pass, else 0.

What the feedback tells, of the first test that failed (`detail`):

| `outcome`  | that it failed, and how many passed before it                     |
| `error`    | also the exception with its line, or the limit that was met       |
| `expected` | also input, expected and actual output, if the test is public     |

Settings other than the defaults: a file of your own with `reward_func = make(detail="error")`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from sdpo_plugin.environments import sandbox
from sdpo_plugin.environments.feedback import cut, one_of, reward_function

BLOCK = re.compile(r"```[a-zA-Z0-9_+-]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
DETAILS = ("outcome", "error", "expected")
MET = {
    "time": "it did not end within {seconds:g} s", "memory": "it used more than {megabytes} MB of memory",
    "output": "it printed more than {kilobytes} KB", "died": "it was killed, or ended itself without a result",
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
        passed, told = judge(response, label, detail, show_private, limits)
        return float(passed), None if passed else told

    return reward_function(judged, budget)


def judge(
    response: str, label: str, detail: str = "expected", show_private: bool = False,
    limits: sandbox.Limits | None = None,
) -> tuple[bool, str]:  # fmt: skip
    """Whether the response's program passes all tests of `label`, and what to say if not."""
    limits = limits or sandbox.Limits()
    program = extract(response)
    if program is None:
        return False, "The response has no program: put it into a fenced block, ```python ... ```."
    function, cases = parse(label)
    outcomes = sandbox.run(program, [case.given for case in cases], function, limits)
    for i, (case, outcome) in enumerate(zip(cases, outcomes, strict=False)):
        if outcome.end == "ok" and (equal_values if function else equal_text)(outcome.output, case.expected):
            continue
        return False, describe(i, cases, outcome, detail, show_private or case.public, limits)
    return len(outcomes) == len(cases), "The program ended before all tests were run."


def extract(response: str) -> str | None:
    """The last fenced block, or None."""
    blocks = BLOCK.findall(response)
    return blocks[-1] if blocks else None


def parse(label: str) -> tuple[str | None, list[Case]]:
    """The function to call, if the tests are of one, and the tests, public ones first.

    Raises:
        ValueError: the label is not in the layout above.
    """
    try:
        found = json.loads(label)
        if isinstance(found, list):
            found = {"tests": found}
        tests = []
        for name, public in (("tests", True), ("public_test_cases", True), ("private_test_cases", False)):
            group = found.get(name, ())
            tests += [(test, public) for test in (json.loads(group) if isinstance(group, str) else group)]
        cases = [Case(t["input"], t["output"], public and t.get("public", True)) for t, public in tests]
        functional = any(t.get("testtype") == "functional" for t, _ in tests)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"a label must be JSON with tests of input and output, not {label[:80]!r}: {error}") from error
    function = found.get("fn_name") or (found.get("metadata") or {}).get("func_name")
    if not cases or (functional and not function):
        raise ValueError(f"a label must have tests, and fn_name if they are of a function: {label[:80]!r}")
    return function, cases


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
    """As JSON."""
    try:
        return json.loads(returned) == json.loads(expected)
    except ValueError:
        return False


reward_func = make()
