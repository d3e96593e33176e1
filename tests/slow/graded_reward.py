"""The quickstart's reward with a part for each right digit: something for a policy loss to learn from."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "quickstart"))

from reward import response_text  # noqa: E402
from reward import reward_func as right_or_wrong  # noqa: E402


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict:
    answers = [response_text(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
    graded = torch.tensor([
        sum(a == b for a, b in zip(answer, str(label), strict=False)) / max(len(answer), len(str(label)))
        for answer, label in zip(answers, labels, strict=True)
    ])  # fmt: skip
    return right_or_wrong(queries, prompts, labels) | {"rewards": graded, "scores": graded}
