"""Tool calls, checked field by field: `--reward.remote_url .../sdpo_plugin/environments/tools.py`.

A label is JSON as in the Berkeley Function-Calling Leaderboard: a list of calls `{"name": {"argument": [right ones]}}`,
where `""` among the values makes an argument optional. Values are compared as there (`ast_checker.py` of
github.com/ShishirPatil/gorilla): strings without case, white space and punctuation, numbers by value, calls in any
order.

A response calls tools as Python, `[get_weather(city="Oslo", days=2)]`, or as JSON, objects with `name` and `arguments`,
one or a list of them, or each in `<tool_call>` tags; in a fenced block or not. Or each as two lines,
`Action: get_weather` and `Action Input: {"city": "Oslo", "days": 2}`.

| `detail`   | what the feedback tells                                     |
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

import ast
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sdpo_plugin.environments.feedback import one_of, reward_function

DETAILS = ("outcome", "error", "expected")
TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
BLOCK = re.compile(r"```[a-zA-Z_]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
ACTION = re.compile(r"^[ \t]*Action:[ \t]*(.+?)[ \t]*\n\s*Action Input:\s*", re.MULTILINE)
IGNORED = re.compile(r"[ \,\.\/\-\_\*\^]")
INSTRUCTION = (
    "You are given a question and functions. Answer with nothing but the calls that it takes, as "
    "[name(argument=value, ...), ...].\n"
)


class Call(NamedTuple):  # no dataclass: OpenRLHF loads this file without an entry in sys.modules
    name: str
    arguments: dict[str, Any]


def make(detail: str = "error", budget: int = 800) -> Callable[..., dict[str, Any]]:
    """A reward function: 1 for the right calls, else 0."""
    one_of(detail, DETAILS)

    def judge(response: str, label: str) -> tuple[float, str | None]:
        wanted = [next(iter(call.items())) for call in json.loads(label)]
        try:
            calls = parse(response)
        except (ValueError, RecursionError) as error:
            told = "The response is no list of calls such as [name(argument=value)]."
            return 0.0, told if detail == "outcome" else f"{told} {error}"
        wrong = compare(calls, wanted, detail == "expected")
        if wrong is None:
            return 1.0, None
        return 0.0, "The calls are wrong." if detail == "outcome" else wrong

    return reward_function(judge, budget, "tools", detail=detail)


def parse(response: str) -> list[Call]:
    """The calls of a response. Raises ValueError, with the reason, if it is none."""
    tagged = TAGGED.findall(response)
    if tagged:
        return [call for text in tagged for call in _calls_in_json(text)]
    if actions := list(ACTION.finditer(response)):
        return [_call_in_action(response, action) for action in actions]
    blocks = BLOCK.findall(response)
    text = (blocks[-1] if blocks else response).strip()
    try:
        return _calls_in_json(text)
    except (ValueError, RecursionError):
        pass
    try:
        tree = ast.parse(text if text.startswith("[") else f"[{text}]", mode="eval")
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("It cannot be read.") from error
    if not isinstance(tree.body, ast.List):
        raise ValueError("It is no list of calls.")
    return [_call_in_python(node) for node in tree.body.elts]


def _calls_in_json(text: str) -> list[Call]:
    found = json.loads(text)
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError("A call is an object with name and arguments.")
        if not isinstance(call.get("arguments", {}), dict):
            raise ValueError("The arguments of a call are an object.")
    return [Call(call["name"], call.get("arguments", {})) for call in calls]


def _call_in_action(response: str, action: re.Match[str]) -> Call:
    try:
        arguments, _ = json.JSONDecoder().raw_decode(response, action.end())
    except ValueError as error:
        raise ValueError(f"{action[1]}: its Action Input is not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"{action[1]}: its Action Input is not an object.")
    return Call(action[1], arguments)


def _call_in_python(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        raise ValueError(f"{ast.unparse(node)[:80]} is no call.")
    name = ast.unparse(node.func)
    named = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg is not None}  # None: of `**`
    if node.args or len(named) < len(node.keywords):
        raise ValueError(f"{name}: give arguments by name.")
    try:
        arguments = {argument: ast.literal_eval(value) for argument, value in named.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: arguments are values, not expressions.") from error
    return Call(name, arguments)


def compare(calls: list[Call], wanted: list[tuple[str, dict[str, list[Any]]]], shown: bool) -> str | None:
    """What is wrong with the calls, or None. shown: with the right values."""
    if len(calls) != len(wanted):
        names = f": {', '.join(name for name, _ in wanted)}" * shown
        return f"{len(calls)} calls were made; it takes {len(wanted)}{names}."
    left = list(wanted)
    for i, call in enumerate(calls, 1):
        reasons = [mismatch(call, name, arguments, shown) for name, arguments in left]
        if None in reasons:
            del left[reasons.index(None)]
            continue
        named = [reason for reason, (name, _) in zip(reasons, left, strict=True) if reason and name == call.name]
        right = f" Right is {left[0][0]}." * shown
        return f"Call {i}, {call.name}: " + (named[0] if named else f"this function is not to be called.{right}")
    return None


def mismatch(call: Call, name: str, wanted: dict[str, list[Any]], shown: bool) -> str | None:
    """How a call differs from a right one, or None."""
    if call.name != name:
        return "another function"
    for argument, values in wanted.items():
        right = f" Right is {' or '.join(json.dumps(v) for v in values if v != '')}." * shown
        if argument not in call.arguments:
            if "" in values:
                continue
            return f"{argument} is missing.{right}"
        if not any(equal(call.arguments[argument], value) for value in values):
            return f"{argument} is not {json.dumps(call.arguments[argument], default=str)}.{right}"
    unknown = [argument for argument in call.arguments if argument not in wanted]
    return f"{unknown[0]} is not to be given." if unknown else None


def equal(given: Any, right: Any) -> bool:
    """As BFCL compares an argument's value with one that is right."""
    if isinstance(given, str) and isinstance(right, str):
        return IGNORED.sub("", given).lower().replace("'", '"') == IGNORED.sub("", right).lower().replace("'", '"')
    if isinstance(given, bool) or isinstance(right, bool):
        return given is right
    if isinstance(given, (int, float)) and isinstance(right, (int, float)):
        return given == right
    if isinstance(given, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(given) == len(right) and all(map(equal, given, right))
    if isinstance(given, dict) and isinstance(right, dict):  # in answers, values of a dict are lists of right ones
        options = {key: value if isinstance(value, list) else [value] for key, value in right.items()}
        return given.keys() <= options.keys() and all(
            any(equal(given[key], value) for value in values) if key in given else "" in values
            for key, values in options.items()
        )
    return given == right


def label_of(calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Of calls, names and arguments, each with one right value; an argument that is "" may be left out."""
    return json.dumps([{name: {key: [_right(value)] for key, value in given.items()}} for name, given in calls])


def _right(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: [_right(part)] for key, part in value.items()}
    return [_right(part) for part in value] if isinstance(value, list) else value


def bfcl(questions: str, answers: str) -> Iterator[dict[str, Any]]:
    """A data set of a file of BFCL and its answers, with columns `prompt` and `label`; single-turn questions only."""
    with open(answers) as file:
        right = {row["id"]: row["ground_truth"] for row in map(json.loads, file)}
    with open(questions) as file:
        for row in map(json.loads, file):
            if row["id"] in right and "function" in row and len(row["question"]) == 1:
                functions = "\n".join(json.dumps(function) for function in row["function"])
                system = {"role": "system", "content": f"{INSTRUCTION}Functions as JSON:\n{functions}"}
                yield {"prompt": [system, *row["question"][0]], "label": json.dumps(right[row["id"]])}


def toolalpaca(path: str) -> Iterator[dict[str, Any]]:
    """A data set of a file of ToolAlpaca, with columns `prompt` and `label`.

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
