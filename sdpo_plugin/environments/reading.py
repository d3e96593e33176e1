"""JSON as the environments read and show it. Every function takes linear time."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON.")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"The number {text[:20]} is too large.")
    return value


# JSON as its standard has it, without NaN and Infinity. Raises ValueError, or RecursionError for what is nested deeply.
JSON = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)


def printable(text: str) -> str:
    """The text with lone surrogates, which `"\\ud800"` in JSON makes and nothing can encode, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: Any) -> str:
    """A value that was read, as JSON."""
    try:
        return json.dumps(value)
    except (ValueError, RecursionError):  # an integer of 5,000 digits, written in base 16; deep lists
        return f"({type(value).__name__} too large to show)"


def after(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where a match at `at` ends; `at` if there is none."""
    found = pattern.match(text, at)
    return found.end() if found else at
