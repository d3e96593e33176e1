"""Other rewards and feedback for the quickstart's vaults. The default is a partial reward for each correct digit."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "quickstart"))

from reward import FEEDBACK, response_text  # noqa: E402

DIGITS = "0123456789"


def whole(answer: str, code: str) -> float:
    return float(answer == code)


def first_digit(answer: str, code: str) -> float:
    """One guess in ten is correct. The rest of the answer is ignored, except for its length."""
    return float(len(answer) == len(code) and answer[0] == code[0])


def right_digits(answer: str, code: str) -> float:
    return sum(a == b for a, b in zip(answer, code, strict=False)) / max(len(answer), len(code))


def other_digits(answer: str, code: str) -> str:
    """A random code that keeps the correct digits and changes all others: Mastermind in the model's own format."""
    guessed = answer.ljust(len(code))
    return "".join(a if a == b else random.choice(DIGITS.replace(a, "")) for a, b in zip(guessed, code, strict=False))


def marks(answer: str, code: str) -> str:
    """The same information in a format that the model has never seen: the correct digits, and `?` for the others."""
    guessed = answer.ljust(len(code))
    return "".join(a if a == b else "?" for a, b in zip(guessed, code, strict=False))


def opposite(code: str) -> str:
    """The same wrong code at every attempt."""
    return "".join(DIGITS[(int(digit) + 5) % 10] for digit in code)


def make(
    reward: Callable[[str, str], float] = right_digits,
    told: Callable[[str, str], str] | None = lambda answer, code: code,
    wrong: float = 0.0,
    stubborn: bool = False,
) -> Callable[[list[str], list[str], list[str]], dict[str, Any]]:
    """A reward function of OpenRLHF's signature.

    reward: the reward of an answer. told: the code that the feedback on a wrong answer contains; None: no feedback.
    wrong: the fraction of feedback that contains a random code instead, or the vault's `opposite` if `stubborn`.
    """

    def feedback(answer: str, code: str) -> str | None:
        if answer == code or told is None:
            return None
        expected = told(answer, code)
        if random.random() < wrong:
            expected = opposite(code) if stubborn else "".join(random.choices(DIGITS, k=len(code)))
        return FEEDBACK.format(expected=expected, got=answer)

    def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, Any]:
        pairs = [(response_text(q, p), str(label)) for q, p, label in zip(queries, prompts, labels, strict=True)]
        rewards = torch.tensor([reward(*pair) for pair in pairs])
        return {"rewards": rewards, "scores": rewards, "feedback": [feedback(*pair) for pair in pairs]}

    return reward_func


reward_func = make()
