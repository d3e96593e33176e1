"""JSON that fits a schema: `--reward.remote_url .../sdpo_plugin/environments/structure.py`. A label is the JSON schema.

A label may also be `{"schema": ..., "value": ...}`: then the value must be that one, too. The response's JSON is all of
it, without a thought, or the last fenced block that is JSON. Schemas are checked by `jsonschema`, of the draft that
`$schema` names; without it, of 2020-12, together with what the drafts 4 and 7 wrote differently. Nothing is fetched: a
`$ref` leads to a place in the schema itself. The reward is 1, or 0 for what does not fit.

| `detail`   | what the feedback has                                          |
| ---------- | --------------------------------------------------------------- |
| `outcome`  | that it is not JSON, does not fit, or has another value          |
| `error`    | also where, and what the schema requires                      |
| `expected` | also the expected value at the first difference                 |
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import islice, zip_longest
from typing import Any

from sdpo_plugin.distillation.thinking import visible
from sdpo_plugin.environments import fences, reading
from sdpo_plugin.environments.feedback import one_of, reward_function
from sdpo_plugin.environments.reading import JSON, printable

DETAILS = ("outcome", "error", "expected")
MISSING = object()
MOST = 1000  # errors that are looked at


def make(detail: str = "error", budget: int = 600) -> Callable[..., dict[str, Any]]:
    """A reward function: 1 for JSON that fits, else 0."""
    one_of(detail, DETAILS)

    def judge(response: str, label: str) -> tuple[float, str | None]:
        from referencing.exceptions import Unresolvable

        validator, expected = read_label(label)
        try:
            found = parse(response)
        except (ValueError, RecursionError) as error:
            reason = "It is nested too deeply." if isinstance(error, RecursionError) else error
            return 0.0, "The response is not JSON." + f" {reason}" * (detail != "outcome")
        try:
            feedback = wrong(found, validator, expected, detail)
        except RecursionError:
            feedback = "The JSON cannot be checked: it is nested too deeply, or a $ref of its schema leads to itself."
        except (Unresolvable, ValueError):  # the latter for a reference that is not a URI
            feedback = "The JSON cannot be checked: a $ref leads out of its schema."
        return (1.0, None) if feedback is None else (0.0, printable(feedback))

    return reward_function(judge, budget, "structure", detail=detail)


def parse(response: str) -> Any:
    """The JSON of a response. Raises ValueError, or RecursionError for what is nested deeply."""
    seen = visible(response)
    blocks = fences.texts(seen)
    for text in dict.fromkeys((response, seen, *reversed(blocks))):
        try:
            return JSON.decode(text.strip())
        except (ValueError, RecursionError):
            pass
    return JSON.decode(blocks[-1] if blocks else seen)


def wrong(found: Any, validator: Any, expected: Any, detail: str) -> str | None:
    """What is wrong with a value, or None. expected: MISSING if any value is right that fits."""
    errors = sorted(islice(validator.iter_errors(found), MOST), key=lambda e: (len(e.path), str(e.path)))
    if errors:
        feedback = "The JSON does not fit its schema."
        for error in errors[:3] if detail != "outcome" else ():
            feedback += f"\nAt {path(error.absolute_path)}: {error.message}"
        return feedback
    if expected is MISSING or (differs := difference(found, expected)) is None:
        return None
    at, got, right = differs
    feedback = "The JSON fits its schema, but has another value." + f" At {path(at)}." * (detail != "outcome")
    return feedback + f" Expected {shown(right)}, got {shown(got)}." * (detail == "expected")


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
    return "nothing" if value is MISSING else reading.shown(value)


# ── labels ──


def read_label(label: Any) -> tuple[Any, Any]:
    """The validator of a label, and the value that it requires or MISSING. Raises ValueError for another form."""
    if not isinstance(label, str):
        raise ValueError(f"a label must be text, a JSON schema, not a {type(label).__name__}: use json.dumps")
    return _read(label)


@functools.lru_cache(maxsize=1024)
def _read(label: str) -> tuple[Any, Any]:
    from sdpo_plugin.environments.schemas import validator_of

    try:
        wanted = JSON.decode(label)
        has_value = isinstance(wanted, dict) and "schema" in wanted and "value" in wanted
        return validator_of(wanted["schema"] if has_value else wanted), wanted["value"] if has_value else MISSING
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a label must be a JSON schema, not {label[:80]!r}: {error}") from error


def check_label(label: Any) -> None:
    """Raises ValueError, with the reason, if a label is not of the form above, or no JSON could get a reward."""
    from sdpo_plugin.environments.schemas import check_refs

    validator, expected = read_label(label)
    if validator.schema is False:
        raise ValueError("no JSON fits the schema false")
    try:
        check_refs(validator)
        feedback = wrong({} if expected is MISSING else expected, validator, expected, "error")
    except RecursionError as error:
        raise ValueError("a schema must not be nested too deeply, and no $ref may lead to itself") from error
    if feedback and expected is not MISSING:
        raise ValueError(f"no JSON can be right: {feedback}")


reward_func = make()
