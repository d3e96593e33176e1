"""Tool calls, checked field by field: `--reward.remote_url .../sdpo_plugin/environments/tools.py`.

A label is JSON as in the Berkeley Function-Calling Leaderboard: a list of calls `{"name": {"argument": [right ones]}}`,
where `""` among the values makes an argument optional. Values are compared as there (`ast_checker.py` of
github.com/ShishirPatil/gorilla): strings without case, white space and punctuation, numbers by value, calls in any
order.

A label may also have OpenAI's form, `{"name": ..., "arguments": {...}}`, with the one right value of each argument.

The forms in which a response may call are those of `tool_calls.py`: as Python, `[get_weather(city="Oslo", days=2)]`, as
JSON, or as models were trained to.

| `detail`   | what the feedback has                                      |
| ---------- | ----------------------------------------------------------- |
| `outcome`  | that the calls are wrong                                    |
| `error`    | also which call, which argument, and how                    |
| `expected` | also the values that would have been right                  |

    python -m sdpo_plugin.environments.tools BFCL_v4_simple_python.json possible_answer/BFCL_v4_simple_python.json
    python -m sdpo_plugin.environments.tools eval_simulated.json

print data sets: of a file of the leaderboard and its answers (single-turn; the wheel `bfcl-eval` has them in `data`),
and of a file of ToolAlpaca (github.com/tangqiaoyu/ToolAlpaca).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sdpo_plugin.environments.feedback import one_of, reward_function
from sdpo_plugin.environments.python_calls import Call
from sdpo_plugin.environments.reading import JSON, printable, shown
from sdpo_plugin.environments.tool_calls import Text, calls_in, parse

DETAILS = ("outcome", "error", "expected")
IGNORED = re.compile(r"[ \,\.\/\-\_\*\^]")
INSTRUCTION = (
    "You are given a question and functions. Answer with nothing but the calls that it takes, as "
    "[name(argument=value, ...), ...].\n"
)


Wanted = list[tuple[str, dict[str, list[Any]]]]  # of each right call the name, and of each argument the right values


def make(detail: str = "error", budget: int = 800) -> Callable[..., dict[str, Any]]:
    """A reward function: 1 for the right calls, else 0."""
    one_of(detail, DETAILS)

    def judge(response: str, label: str) -> tuple[float, str | None]:
        wanted = right_calls(label)
        try:
            wrong = compare(parse(response), wanted, detail == "expected")
        except (ValueError, RecursionError) as error:
            reason = "It is nested too deeply." if isinstance(error, RecursionError) else error
            feedback = "The response is not a list of calls such as [name(argument=value)]."
            return 0.0, feedback if detail == "outcome" else printable(f"{feedback} {reason}")
        if wrong is None:
            return 1.0, None
        return 0.0, "The calls are wrong." if detail == "outcome" else printable(wrong)

    return reward_function(judge, budget, "tools", detail=detail)


def right_calls(label: Any) -> Wanted:
    """The calls that a label requires.

    Raises:
        ValueError: it is not a label of this environment.
    """
    if not isinstance(label, str):
        raise ValueError(f"a label must be text, a JSON list of calls, not a {type(label).__name__}: use json.dumps")
    try:
        found = JSON.decode(label)
        return [call for part in (found if isinstance(found, list) else [found]) for call in _right_calls(part)]
    except (ValueError, RecursionError) as error:
        form = '[{"name": {"argument": [right values]}}]'
        raise ValueError(f"a label must be a JSON list of calls, {form}, not {label[:80]!r}: {error}") from error


def _right_calls(call: Any) -> Wanted:
    if isinstance(call, dict) and len(call) == 1:
        ((name, arguments),) = call.items()
        if isinstance(arguments, dict) and not isinstance(arguments.get("name"), str):
            return [(name, {key: right if isinstance(right, list) else [right] for key, right in arguments.items()})]
    return [(name, {key: [_right(value)] for key, value in given.items()}) for name, given in calls_in(call)]


def check_label(label: Any) -> None:
    """Raises ValueError, with the reason, if a label has another form, or requires an argument without a value."""
    wanted = right_calls(label)
    for name, arguments in wanted:
        if none := [argument for argument, values in arguments.items() if not values]:
            raise ValueError(f"no call can be right: argument {none[0]} of {name} has no right value")
    try:
        wrong = compare([Call(name, _first(arguments)) for name, arguments in wanted], wanted, show_expected=False)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if wrong:
        raise ValueError(f"no call can be right: {wrong}")


def _first(arguments: dict[str, list[Any]]) -> dict[str, Any]:
    """Of each argument the first of the right values."""
    return {argument: _plain(values[0]) for argument, values in arguments.items()}


def _plain(right: Any) -> Any:
    """A right value as a call gives it: in a dict, too, values are lists of right ones."""
    if isinstance(right, dict):
        return {key: _plain(value[0] if isinstance(value, list) and value else value) for key, value in right.items()}
    return [_plain(part) for part in right] if isinstance(right, list) else right


def compare(calls: list[Call], wanted: Wanted, show_expected: bool) -> str | None:
    """What is wrong with the calls, or None. show_expected: with the expected values."""
    if len(calls) != len(wanted):
        names = f": {', '.join(name for name, _ in wanted)}" * show_expected
        return f"{len(calls)} calls were made; it takes {len(wanted)}{names}."
    left = list(wanted)
    for i, call in enumerate(calls, 1):
        reasons = [mismatch(call, name, arguments, show_expected) for name, arguments in left]
        if None in reasons:
            del left[reasons.index(None)]
            continue
        named = [reason for reason, (name, _) in zip(reasons, left, strict=True) if reason and name == call.name]
        right = f" Right is {left[0][0]}." * show_expected
        return f"Call {i}, {call.name}: " + (named[0] if named else f"this function is not to be called.{right}")
    return None


def mismatch(call: Call, name: str, wanted: dict[str, list[Any]], show_expected: bool) -> str | None:
    """How a call differs from a right one, or None."""
    if call.name != name:
        return "another function"
    for argument, values in wanted.items():
        right = f" Right is {' or '.join(json.dumps(v) for v in values if v != '')}." * show_expected
        if argument not in call.arguments:
            if "" in values:
                continue
            return f"{argument} is missing.{right}"
        if not any(equal(call.arguments[argument], value) for value in values):
            return f"{argument} is not {shown(call.arguments[argument])}.{right}"
    unknown = [argument for argument in call.arguments if argument not in wanted]
    return f"{unknown[0]} is not to be given." if unknown else None


def equal(given: Any, right: Any) -> bool:
    """As BFCL compares an argument's value with one that is right."""
    if isinstance(given, Text) and not isinstance(right, str):
        given = given.value()
    if isinstance(given, str) and isinstance(right, str):
        return IGNORED.sub("", given).lower().replace("'", '"') == IGNORED.sub("", right).lower().replace("'", '"')
    if isinstance(given, bool) or isinstance(right, bool):
        return given is right
    if isinstance(given, (int, float)) and isinstance(right, (int, float)):
        return given == right
    if isinstance(given, list) and isinstance(right, list):
        return len(given) == len(right) and all(map(equal, given, right))
    if isinstance(given, dict) and isinstance(right, dict):  # in answers, values of a dict are lists of right ones
        options = {key: value if isinstance(value, list) else [value] for key, value in right.items()}
        return given.keys() <= options.keys() and all(
            any(equal(given[key], value) for value in values) if key in given else "" in values
            for key, values in options.items()
        )
    return given is None and right is None


def label_of(calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Of calls, names and arguments, each with one right value; an argument that is "" may be left out."""
    return json.dumps([{name: {key: [_right(value)] for key, value in given.items()}} for name, given in calls])


def _right(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: [_right(part)] for key, part in value.items()}
    return [_right(part) for part in value] if isinstance(value, list) else value


def bfcl(questions: str, answers: str) -> Iterator[dict[str, Any]]:
    """A dataset from a file of BFCL and its answers, with columns `prompt` and `label`.

    Of questions of a single turn, that a response can answer.
    """
    with open(answers) as file:
        right = {row["id"]: row["ground_truth"] for row in map(json.loads, file)}
    with open(questions) as file:
        for row in map(json.loads, file):
            if row["id"] in right and "function" in row and len(row["question"]) == 1 and _can_be_met(right[row["id"]]):
                functions = "\n".join(json.dumps(function) for function in row["function"])
                system = {"role": "system", "content": f"{INSTRUCTION}Functions as JSON:\n{functions}"}
                yield {"prompt": [system, *row["question"][0]], "label": json.dumps(right[row["id"]])}


def _can_be_met(calls: list[dict[str, dict[str, list[Any]]]]) -> bool:
    """Two of BFCL's answers demand an argument and have no right value for it."""
    return all(values for call in calls for arguments in call.values() for values in arguments.values())


def toolalpaca(path: str) -> Iterator[dict[str, Any]]:
    """A dataset from a file of ToolAlpaca, with columns `prompt` and `label`.

    Of its evaluation files the instructions and their golden answers, without those that take a value from another call
    (`${...}`); of its training file the conversations of a single call: later calls follow what the first returned.
    """
    with open(path) as file:
        apis = json.load(file)
    for api in apis:
        asked = list(zip(api.get("Instructions", ()), api.get("Golden_Answers", ()), strict=False))
        for talk in api.get("Instances", ()):
            steps = talk.get("intermediate_steps", ())
            if len(steps) == 1:
                (name, arguments, _), _ = steps[0]
                question = talk["input"].rsplit("\nHint: ", 1)[0]
                asked.append((question, [{"Action": name, "Action_Input": arguments}]))
        for question, actions in asked:
            try:
                right = [(action["Action"], json.loads(action["Action_Input"])) for action in actions]
            except ValueError:  # "${animeId from searchAnime}" stands there without quotes
                continue
            known = all(name in api["Function_Projection"] for name, _ in right)
            if known and "${" not in json.dumps(right):
                system = {"role": "system", "content": f"{INSTRUCTION}Functions:\n{api['NLDocumentation']}"}
                yield {"prompt": [system, {"role": "user", "content": question}], "label": label_of(right)}


reward_func = make()

if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m sdpo_plugin.environments.tools QUESTIONS ANSWERS | TOOLALPACA")
    for row in (bfcl if len(sys.argv) == 3 else toolalpaca)(*sys.argv[1:]):
        print(json.dumps(row))
