"""JSON that fits a schema: `--reward.remote_url .../sdpo_plugin/environments/structure.py`. A label is the JSON schema.

A label may also be `{"schema": ..., "value": ...}`: then the value must be that one, too. The response's JSON is its
last fenced block, or all of it. Schemas are checked by `jsonschema`. The reward is 1, or 0 for what does not fit.

| `detail`   | what the feedback tells                                         |
| ---------- | --------------------------------------------------------------- |
| `outcome`  | that it is no JSON, does not fit, or has another value          |
| `error`    | also where, and what the schema wants there                     |
| `expected` | also the expected value at the first difference                 |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from sdpo_plugin.environments.feedback import one_of, reward_function

BLOCK = re.compile(r"```[a-zA-Z0-9]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
DETAILS = ("outcome", "error", "expected")
MISSING = object()


def make(detail: str = "error", budget: int = 600) -> Callable[..., dict[str, Any]]:
    """A reward function: 1 for JSON that fits, else 0."""
    one_of(detail, DETAILS)

    def judge(response: str, label: str) -> tuple[float, str | None]:
        from jsonschema import Draft202012Validator

        wanted = json.loads(label)
        has_value = isinstance(wanted, dict) and "schema" in wanted and "value" in wanted
        schema = wanted["schema"] if has_value else wanted
        blocks = BLOCK.findall(response)
        try:
            found = json.loads(blocks[-1] if blocks else response)
        except (ValueError, RecursionError) as error:
            return 0.0, "The response is not JSON." + f" {error}" * (detail != "outcome")
        errors = sorted(Draft202012Validator(schema).iter_errors(found), key=lambda e: (len(e.path), str(e.path)))
        if errors:
            told = "The JSON does not fit its schema."
            for wrong in errors[:3] if detail != "outcome" else ():
                told += f"\nAt {path(wrong.absolute_path)}: {wrong.message}"
            return 0.0, told
        if has_value and (differs := difference(found, wanted["value"])) is not None:
            at, got, expected = differs
            told = "The JSON fits its schema, but has another value." + f" At {path(at)}." * (detail != "outcome")
            if detail == "expected":
                told += f" Expected {shown(expected)}, got {shown(got)}."
            return 0.0, told
        return 1.0, None

    return reward_function(judge, budget, "structure", detail=detail)


def difference(found: Any, wanted: Any, at: tuple[Any, ...] = ()) -> tuple[tuple[Any, ...], Any, Any] | None:
    """Where two values differ first, and what is there in each; None if they are equal."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys: list[Any] = [*wanted, *(key for key in found if key not in wanted)]
        pairs = [(key, found.get(key, MISSING), wanted.get(key, MISSING)) for key in keys]
    elif isinstance(found, list) and isinstance(wanted, list):
        pairs = [(i, *pair) for i, pair in enumerate(zip_longest(found, wanted, fillvalue=MISSING))]
    else:
        equal = type(found) is type(wanted) or not {type(found), type(wanted)} - {int, float}
        return None if equal and found == wanted else (at, found, wanted)
    return next((d for key, a, b in pairs if (d := difference(a, b, (*at, key))) is not None), None)


def path(parts: Any) -> str:
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)


def shown(value: Any) -> str:
    return "nothing" if value is MISSING else json.dumps(value)


reward_func = make()
