"""What the environments' reward functions share: the response of a query, and the shape of what they return."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from sdpo_plugin.environments.judge_pool import POOL, Judge

# OpenRLHF decodes queries with special tokens: <|im_end|>, </s>, <eos>, <end_of_turn>, [PAD], <｜end▁of▁sentence｜>.
TOKEN = r"<[|｜][^<>\s]*[|｜]>|</?s>|<(?:pad|eos|bos|unk|end_of_turn)>|\[(?:PAD|SEP|EOS)\]"
SPECIAL = re.compile(rf"(?:\s*(?:{TOKEN}))+\s*\Z")
TAIL = 64  # characters


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
        import torch

        found = [judged(response_of(q, p), label) for q, p, label in zip(queries, prompts, labels, strict=True)]
        rewards = torch.tensor([float(reward) for reward, _ in found])
        told = [None if words is None else cut(words, budget) for _, words in found]
        return {"rewards": rewards, "scores": rewards, "feedback": told}

    reward_func.judge = judge  # type: ignore[attr-defined]  # what the process of `judge_pool` takes of it
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


def cut(text: str, length: int) -> str:
    """The text, without its middle if it is longer."""
    half = (length - 5) // 2
    return text if len(text) <= length else f"{text[:half]}\n...\n{text[-half:]}"


def one_of(detail: str, known: Sequence[str]) -> None:
    """Raises ValueError for a level of detail that the environment does not have."""
    if detail not in known:
        raise ValueError(f"detail {detail}: choose one of {', '.join(known)}")
