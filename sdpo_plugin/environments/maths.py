"""Maths with a final answer: `--reward.remote_url .../sdpo_plugin/environments/maths.py`. A label is the right answer.

An answer is what stands in the last `\\boxed{...}` of the response; without one in `<answer>`, after «the answer is» or
`####`, or at the end of its last line. Reports are read and compared by value, by `math-verify`: text, numbers, LaTeX;
units, currency and degrees are ignored. Several answers are separated by commas or "and", in any order, or by `;`,
in this order: `$5$;$10$`. Of a solution as in GSM8K the label is what follows `####`.

| `detail`   | what the feedback has                                         |
| ---------- | -------------------------------------------------------------- |
| `outcome`  | that the answer is wrong, and which it was, or that there is none |
| `expected` | also the right answer                                          |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sdpo_plugin.environments import answers, conclusion
from sdpo_plugin.environments.feedback import one_of, reward_function

DETAILS = ("outcome", "expected")


def make(detail: str = "outcome", budget: int = 300) -> Callable[..., dict[str, Any]]:
    """A reward function: 1 for an answer of equal value, else 0."""
    one_of(detail, DETAILS)

    def judge(response: str, label: Any) -> tuple[float, str | None]:
        right = answers.text_of(label)
        found = answer(response)
        if found and answers.equal(right, found):
            return 1.0, None
        wrong = f"The final answer {found} is wrong." if found else (
            "The response has no final answer: end it with \\boxed{} and the answer in it."
        )  # fmt: skip
        return 0.0, wrong + f" Right is {right}." * (detail == "expected")

    return reward_function(judge, budget, "maths", detail=detail)


def answer(response: str) -> str | None:
    """The final answer of a response as text, or None."""
    text = conclusion.end_of(response)
    if boxed := conclusion.boxes(text):
        return ", ".join(boxed)
    if tagged := conclusion.tagged(text):
        return answers.in_words(tagged)
    if announced := conclusion.announced(text):
        return answers.in_words(announced)
    line = conclusion.last_line(text)
    return None if "\\boxed" in line else answers.in_words(line, last=True)  # a box that was truncated, or is empty


def check_label(label: Any) -> None:
    """Raises ValueError, with the reason, for a label that no final answer can equal."""
    answers.check(answers.text_of(label))


def warm_up() -> None:
    """Let sympy import its parts, for a second or two, before the time of the first judgement begins."""
    for right, found in (("7", "8"), ("\\frac{1}{2}", "0.5"), ("x^2+1", "\\sin x"), ("x>2", "(1,2)"), ("1,2", "2,3")):
        answers.equal(right, found)


reward_func = make()
