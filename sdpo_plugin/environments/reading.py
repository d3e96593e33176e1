"""What the environments read in a response: thoughts, fenced blocks, JSON. Every function takes linear time."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

# A model's thought begins and ends with these. Where its template opens the thought, the response has only the end.
THOUGHTS = {
    "<think>": "</think>", "<thinking>": "</thinking>", "<thought>": "</thought>", "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>", "[THINK]": "[/THINK]", "◁think▷": "◁/think▷", "<|channel>thought": "<channel|>",
    "<|START_THINKING|>": "<|END_THINKING|>", "<|inner_prefix|>": "<|inner_suffix|>",
    "<|begin_of_thought|>": "<|end_of_thought|>", "<|channel|>analysis<|message|>": "<|end|>",
}  # fmt: skip
# What ends a thought that the template opened. `<|end|>` ends any message; gpt-oss's answer is in a channel of its own.
THOUGHT_ENDS = [*(end for end in THOUGHTS.values() if end != "<|end|>"), "<|channel|>final<|message|>"]
THOUGHT = re.compile(
    f"(?P<thought>{'|'.join(map(re.escape, THOUGHTS))})|(?P<thought_end>{'|'.join(map(re.escape, THOUGHT_ENDS))})"
)
FENCE = re.compile(r"`{3,}|~{3,}")
INFO = re.compile(r"[^`{\[]*")  # what a fence says of its block, up to JSON on the same line


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON.")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"The number {text[:20]} is too large.")
    return value


# JSON as its standard has it, without NaN and Infinity. Raises ValueError, or RecursionError for what is nested deeply.
JSON = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)


def without_thoughts(text: str) -> str:
    """The text without thoughts; a thought that is not closed is all that follows."""
    kept: list[str] = []
    at = 0
    while tag := THOUGHT.search(text, at):
        if tag["thought"]:
            kept.append(text[at : tag.start()])
        else:
            kept.clear()
        at = end_of_thought(text, tag)
    return "".join([*kept, text[at:]])


def end_of_thought(text: str, tag: re.Match[str]) -> int:
    """Where the thought ends that begins, or ends, with this match of THOUGHT."""
    if not tag["thought"]:
        return tag.end()
    closing = THOUGHTS[tag["thought"]]
    end = text.find(closing, tag.end())
    return len(text) if end < 0 else end + len(closing)


def last_end_of_thought(text: str, at: int) -> int:
    """Where the last thought ends whose end stands at or behind `at`; -1 if none does."""
    found = ((text.rfind(end, at), len(end)) for end in THOUGHT_ENDS)
    return max((start + length for start, length in found if start >= 0), default=-1)


def fenced_blocks(text: str) -> list[str]:
    """The contents of fenced blocks; the last may lack its closing fence.

    A fence opens a block at the end of a line, behind any text; on its line may be a language, attributes and content.
    A block with something like content there is given without and with it. A fence closes a block at the end of a line:
    elsewhere backticks are content.
    """
    blocks: list[str] = []
    fence, lines = "", [""]
    for line in text.split("\n"):
        rest = line.rstrip()
        if not fence:
            if not (opening := FENCE.search(rest)):
                continue
            rest = rest[opening.end() :]
            if opening[0][0] in rest and not rest.endswith(opening[0]):  # ```code``` in a sentence
                continue
            fence, lines = opening[0], []
            line = rest = rest[after(INFO, rest, 0) :]
        if rest.endswith(fence):
            blocks += _contents([*lines, rest.rstrip(fence[0])])
            fence = ""
        else:
            lines.append(line)
    return [*blocks, *_contents(lines)] if fence else blocks


def _contents(lines: list[str]) -> list[str]:
    """Of a block whose first line is what stands on its fence's line."""
    first, *others = lines
    return ["\n".join(others)] * bool(others or not first) + ["\n".join(lines)] * bool(first)


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
