"""Samples as people read them: text that cannot act, and what teacher and student think of a token."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from typing import Any

# |log T - log S| in nats from which a token is marked, weakly to strongly.
LEVELS = (0.1, 0.5, 1.5, 4.0)
# Control characters of terminals and of writing direction, invisible characters, and halves of surrogate pairs.
ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Text without characters that act: each is written by its number. Line breaks and tabs stay."""
    return ACTIVE.sub(lambda match: f"\u27e8U+{ord(match[0]):04X}\u27e9", text)


def token_text(piece: str) -> str:
    """A token as it is shown: an empty one and line breaks are seen."""
    return visible(piece).replace("\n", "\u21b5\n") or "\u27e8empty\u27e9"


def prompt_text(prompt: str | list[Mapping[str, Any]]) -> str:
    """A prompt of `samples.jsonl`, of messages each after its role."""
    if isinstance(prompt, str):
        return prompt
    contents = (m["content"] if isinstance(m["content"], str) else json.dumps(m["content"]) for m in prompt)
    return "\n\n".join(f"{m['role']}: {content}" for m, content in zip(prompt, contents, strict=True))


def last_content(prompt: str | list[Mapping[str, Any]]) -> str | None:
    """The text of the last message, which a teacher's prompt begins with; None where there are no messages."""
    last = prompt[-1]["content"] if prompt and not isinstance(prompt, str) else None
    return last if isinstance(last, str) else None


def advantages(sample: Mapping[str, Any]) -> list[float | None]:
    """log T - log S of each token, in nats; None where it is unknown or not in the loss."""
    unknown = [None] * len(sample["tokens"])
    both = zip(sample["teacher"] or unknown, sample["student"] or unknown, sample["in_loss"], strict=True)
    return [t - s if counts and t is not None and s is not None else None for t, s, counts in both]


def disagreement(sample: Mapping[str, Any]) -> float | None:
    """Mean |log T - log S| over the tokens in the loss, in nats a token."""
    found = [abs(advantage) for advantage in advantages(sample) if advantage is not None]
    return statistics.fmean(found) if found else None


def level(advantage: float) -> int:
    """How strongly a token is marked: 0 not, `len(LEVELS)` most; negative where the teacher finds it less likely."""
    strength = sum(abs(advantage) >= bound for bound in LEVELS)
    return strength if advantage > 0 else -strength
