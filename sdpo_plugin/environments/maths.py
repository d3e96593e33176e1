"""Maths with a final answer: `--reward.remote_url .../sdpo_plugin/environments/maths.py`. A label is the right answer.

Answers are read and compared by `math-verify`: the last `\\boxed{...}` or expression of the response, equal in value.

| `detail`   | what the feedback tells                                        |
| ---------- | -------------------------------------------------------------- |
| `outcome`  | that the answer is wrong, and which it was, or that there is none |
| `expected` | also the right answer                                          |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sdpo_plugin.environments.feedback import one_of, reward_function

DETAILS = ("outcome", "expected")


def make(detail: str = "outcome", budget: int = 300) -> Callable[..., dict[str, Any]]:
    """A reward function: 1 for an answer of equal value, else 0."""
    one_of(detail, DETAILS)

    def judge(response: str, label: str) -> tuple[float, str | None]:
        from math_verify import parse, verify

        # Its own time limits are signals, which only a process's main thread may set; --reward.timeout holds here.
        right = parse(label if "\\boxed" in label or "$" in label else f"${label}$", parsing_timeout=None)
        found = parse(response, parsing_timeout=None)
        if not right:
            raise ValueError(f"a label must be an answer that math-verify reads, not {label[:80]!r}")
        if found and verify(right, found, timeout_seconds=None):
            return 1.0, None
        wrong = f"The final answer {found[-1]} is wrong." if found else (
            "The response has no final answer: end it with \\boxed{} and the answer in it."
        )  # fmt: skip
        return 0.0, wrong + f" Right is {label}." * (detail == "expected")

    return reward_function(judge, budget, "maths", detail=detail)


reward_func = make()
