"""The house: it obeys the first line of an answer if that is the command for the request, and else says what it is."""

from __future__ import annotations

from typing import Any

import torch

FEEDBACK = "Unknown command. The command is:\n{command}"
END = "<|im_end|>"


def answer(response: str) -> str:
    """What the house reads."""
    return response.split(END)[0].strip().partition("\n")[0].strip()


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, Any]:
    right = [
        answer(query.removeprefix(prompt)) == label
        for query, prompt, label in zip(queries, prompts, labels, strict=True)
    ]
    rewards = torch.tensor(right, dtype=torch.float32)
    feedback = [None if r else FEEDBACK.format(command=label) for r, label in zip(right, labels, strict=True)]
    return {"rewards": rewards, "scores": rewards, "feedback": feedback}
