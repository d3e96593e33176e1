"""Common parts of the environments' reward functions: the response of a query, and the form of what they return."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date, datetime, time
from typing import Any

from sdpo_plugin.environments.judge_pool import POOL, Judge

# OpenRLHF decodes queries with special tokens. Those of the model, once the engine has set them (`know`); and what
# looks like one, where they are not set: <|im_end|>, <turn|>, <seed:eos>, [|endofturn|], </s>, [PAD], [e~[.
special_tokens: tuple[str, ...] = ()
LONGEST = 64  # characters of a token that looks like a special one
NAMES = "pad|eos|bos|unk|sep|cls|mask|eot|eom|eod|eop|eoa|eoh|sop"
LOOKS_SPECIAL = re.compile(
    r"<(?![^<>]*(?:tool|think|answer))[^<>\s]*[|｜][^<>\s]*>|\[\|[^\[\]\s]+\|\]|</?s>|"
    rf"<(?:[^<>\s/]*[:_.])?(?:{NAMES})(?:[:_.\d][^<>\s]*)?>|"
    r"<(?:[^<>\s/]*[^<>\s/A-Za-z])?(?:(?:start|end)_?of_?|(?:im|turn|role|text|file|message)_?(?:end|sep)|"
    r"(?:special|reserved|unused|extra_id|placeholder)[^<>\s]*\d)[^<>\s]*>|"
    rf"\[/?(?:{NAMES}|inst|g?mask)\]|[\[\]]\w?~!?\w?[\[\]]",
    re.IGNORECASE,
)
# What a response may end with, though it is a special token of some models: </tool_call>, [/THINK], <|tool_call_end|>.
MARKUP = re.compile(r"</?[A-Za-z_]+>|\[/?[A-Z_]+\]|.*(?:tool|think|answer).*", re.IGNORECASE)
TAIL = 64  # characters
LEAST_TAIL = 8


def reward_function(
    judge: Judge, budget: int, environment: str | None = None, **options: Any
) -> Callable[..., dict[str, Any]]:
    """A reward function for `--reward.remote_url` from one that judges a response.

    Args:
        budget: characters of feedback.
        environment: the module here whose `make(**options)` this is; its judge then runs in a process of `judge_pool`.
            None: in this process.
    """

    def judged(response: str, label: Any) -> tuple[float, str | None]:
        return POOL.judge(environment, options, response, label) if environment else judge(response, label)

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
        labels = [dates_as_text(label) for label in labels]
        import torch

        found = [judged(response_of(q, p), label) for q, p, label in zip(queries, prompts, labels, strict=True)]
        rewards = torch.tensor([float(reward) for reward, _ in found])
        feedback = [None if words is None else cut(words, budget) for _, words in found]
        return {"rewards": rewards, "scores": rewards, "feedback": feedback}

    reward_func.judge = judge  # type: ignore[attr-defined]  # what the process of `judge_pool` takes of it
    return reward_func


def response_of(query: str, prompt: str) -> str:
    """A query without its prompt and without the special tokens at its end.

    A prompt that was truncated on the left, that its tokenizer does not reproduce exactly, or whose images have more
    tokens in the query, is found by its end: as much of it as the query has.
    """
    if query.startswith(prompt):
        response = query[len(prompt) :]
    else:
        ends = (prompt[-length:] for length in range(TAIL, LEAST_TAIL - 1, -1))
        response = query.rpartition(next((end for end in ends if end in query), prompt[-TAIL:]))[2]
    return without_end_tokens(response)


def know(tokenizer: Any) -> None:
    """Note the special tokens of the model whose responses are judged in this process; the first one's stay."""
    global special_tokens
    if special_tokens:
        return
    ends = {getattr(tokenizer, "eos_token", None), getattr(tokenizer, "pad_token", None)}
    others = {token for token in getattr(tokenizer, "all_special_tokens", ()) if not MARKUP.fullmatch(token)}
    special_tokens = tuple(filter(None, ends | others))


def without_end_tokens(text: str) -> str:
    """A text without the special tokens at its end, and the white space among them."""
    end = len(text)
    while (start := _token_at_end(text, _stripped(text, end))) is not None:
        end = _stripped(text, start)
    return text[:end]


def _token_at_end(text: str, end: int) -> int | None:
    """Where the special token begins with which `text[:end]` ends, or None."""
    if special_tokens and text.endswith(special_tokens, 0, end):
        return end - max(len(token) for token in special_tokens if text.endswith(token, 0, end))
    if end == 0 or text[end - 1] not in ">[]":
        return None
    starts = [text.rfind(opening, max(0, end - LONGEST), end - 1) for opening in "<[]"]
    return next((at for at in starts if at >= 0 and LOOKS_SPECIAL.fullmatch(text, at, end)), None)


def _stripped(text: str, end: int) -> int:
    while end and text[end - 1].isspace():
        end -= 1
    return end


def dates_as_text(label: Any) -> Any:
    """A label with its dates (of a Parquet file, for example) in ISO 8601; without the time where that is midnight."""
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
