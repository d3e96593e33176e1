"""What the environments' reward functions share: the response of a query, and the shape of what they return."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date, datetime, time
from typing import Any

Judge = Callable[[str, Any], tuple[float, str | None]]  # (response, label) -> reward, what was wrong or None
# OpenRLHF decodes queries with special tokens: <|im_end|>, </s>, <eos>, <end_of_turn>, [PAD], <｜end▁of▁sentence｜>.
TOKEN = r"<[|｜][^<>\s]*[|｜]>|</?s>|<(?:pad|eos|bos|unk|end_of_turn)>|\[(?:PAD|SEP|EOS)\]"
SPECIAL = re.compile(rf"(?:\s*(?:{TOKEN}))+\s*\Z")
TAIL = 64  # characters


def reward_function(judge: Judge, budget: int) -> Callable[..., dict[str, Any]]:
    """A reward function for `--reward.remote_url` from one that judges a response. budget: characters of feedback."""

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
        labels = [dates_as_text(label) for label in labels]
        import torch

        judged = [judge(response_of(q, p), label) for q, p, label in zip(queries, prompts, labels, strict=True)]
        rewards = torch.tensor([float(reward) for reward, _ in judged])
        told = [None if words is None else cut(words, budget) for _, words in judged]
        return {"rewards": rewards, "scores": rewards, "feedback": told}

    return reward_func


def response_of(query: str, prompt: str) -> str:
    """A query without its prompt and without the special tokens at its end.

    A prompt that was cut on the left, or that its tokenizer does not give back letter by letter, is known by its end.
    """
    if query.startswith(prompt):
        response = query[len(prompt) :]
    else:
        response = query.rpartition(prompt[-TAIL:])[2]
    return SPECIAL.sub("", response)


def dates_as_text(label: Any) -> Any:
    """A label whose dates, of a Parquet file, say, are ISO 8601; without the time where that is midnight."""
    if isinstance(label, dict):
        return {name: dates_as_text(part) for name, part in label.items()}
    if isinstance(label, list):
        return [dates_as_text(part) for part in label]
    if isinstance(label, datetime) and label.tzinfo is None and label.time() == time():
        label = label.date()
    return label.isoformat() if isinstance(label, (date, time)) else label


def cut(text: str, length: int) -> str:
    """The text, without its middle if it is longer."""
    half = (length - 5) // 2
    return text if len(text) <= length else f"{text[:half]}\n...\n{text[-half:]}"


def one_of(detail: str, known: Sequence[str]) -> None:
    """Raises ValueError for a level of detail that the environment does not have."""
    if detail not in known:
        raise ValueError(f"detail {detail}: choose one of {', '.join(known)}")
