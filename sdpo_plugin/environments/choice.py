"""Multiple choice: `--reward.remote_url .../sdpo_plugin/environments/choice.py`. A label is the right letter.

The response's choice is its last `\\boxed{B}`, `<answer>B</answer>` or «answer is B»; without one, a last line that is
a letter.

| `detail`   | what the feedback tells                                          |
| ---------- | ---------------------------------------------------------------- |
| `outcome`  | that the choice is wrong, or that there is none and how to give it |
| `expected` | also the right letter                                            |

The default is `outcome`: with the letter in its context the teacher has nothing to find out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sdpo_plugin.environments.feedback import one_of, reward_function

NAMED = re.compile(
    r"\\boxed\{\s*(?:\\text\{)?\(?([A-Z])\)?\}?\s*\}|<answer>\s*\(?([A-Z])\)?(?![A-Za-z])[^<]*</answer>|"
    r"answer\s*(?:is|:)\s*\**\(?([A-Z])\)?(?![A-Za-z])",
    re.IGNORECASE,
)
ALONE = re.compile(r"[^A-Za-z]*([A-Z])[^A-Za-z]*")
DETAILS = ("outcome", "expected")


def make(detail: str = "outcome", budget: int = 300) -> Callable[..., dict[str, Any]]:
    """A reward function: 1 for the right letter, else 0."""
    one_of(detail, DETAILS)

    def judge(response: str, label: str) -> tuple[float, str | None]:
        chosen, right = choice(response), label.strip().strip("()").upper()
        if chosen == right:
            return 1.0, None
        wrong = f"The choice {chosen} is wrong." if chosen else (
            "The response makes no choice: end it with \\boxed{} and a letter in it."
        )  # fmt: skip
        return 0.0, wrong + f" Right is {right}." * (detail == "expected")

    return reward_function(judge, budget, "choice", detail=detail)


def choice(response: str) -> str | None:
    """The letter that a response ends with, or None."""
    named = [next(filter(None, groups)) for groups in NAMED.findall(response)]
    if named:
        return named[-1].upper()
    alone = ALONE.fullmatch(response.rstrip().rpartition("\n")[2])
    return alone[1] if alone else None


reward_func = make()
