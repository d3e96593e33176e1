"""Reward functions with feedback: choice, maths, JSON (code: test_code_environment.py)."""

import json
import threading

import pytest

from sdpo_plugin.environments import choice, maths, structure


def asked(environment, response, label, **options):
    """As OpenRLHF asks: one query at a time, in a thread that is not the main one."""
    found = {}
    reward_func = environment.make(**options)
    ask = lambda: found.update(reward_func([f"Q?{response}"], ["Q?"], [label]))  # noqa: E731
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found["rewards"].item(), found["feedback"][0]


@pytest.mark.parametrize(
    "response, letter",
    [
        ("Because of X, the answer is (B).", "B"), ("A is tempting.\n\\boxed{C}", "C"), ("<answer>d</answer>", "D"),
        ("so **Answer: A**", "A"), ("because of X:\n(B).", "B"), ("I take C", None), ("A or B", None), ("", None),
        ("the answer is A. No: the answer is D", "D"), ("\\boxed{\\text{B}}", "B"), ("the answer is Apple", None),
    ],
)  # fmt: skip
def test_the_choice_of_a_response(response, letter):
    assert choice.choice(response) == letter


def test_a_choice_is_told_to_be_wrong_and_right_only_if_asked():
    assert asked(choice, "The answer is B", "B") == (1.0, None)
    assert asked(choice, "The answer is C", "B") == (0.0, "The choice C is wrong.")
    assert asked(choice, "The answer is C", "(B)", detail="expected")[1] == "The choice C is wrong. Right is B."
    assert "makes no choice" in asked(choice, "I do not know", "B")[1]


def test_answers_are_equal_in_value():
    assert asked(maths, "so it is \\boxed{\\frac{1}{2}}", "0.5") == (1.0, None)
    assert asked(maths, "$x = 7$", "7")[0] == 1.0
    assert asked(maths, "\\boxed{8}", "7") == (0.0, "The final answer 8 is wrong.")
    assert asked(maths, "\\boxed{8}", "7", detail="expected")[1] == "The final answer 8 is wrong. Right is 7."
    assert "no final answer" in asked(maths, "I do not know", "7")[1]


SCHEMA = {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city", "days"], "additionalProperties": False,
}  # fmt: skip


def test_json_is_told_where_it_does_not_fit():
    label = json.dumps(SCHEMA)
    assert asked(structure, '```json\n{"city": "Oslo", "days": 2}\n```', label) == (1.0, None)
    told = asked(structure, '{"city": "Oslo", "days": 0, "hotel": 1}', label)[1]
    assert "At $.days: 0 is less than the minimum of 1" in told and "'hotel' was unexpected" in told
    assert asked(structure, "Oslo", label, detail="outcome") == (0.0, "The response is not JSON.")
    assert asked(structure, "{}", label, detail="outcome") == (0.0, "The JSON does not fit its schema.")


def test_json_is_told_where_it_differs():
    label = json.dumps({"schema": {}, "value": {"city": "Oslo", "days": [1, 2]}})
    assert asked(structure, '{"days": [1.0, 2], "city": "Oslo"}', label)[0] == 1.0
    assert asked(structure, '{"city": "Oslo", "days": [1, 3]}', label)[1].endswith("has another value. At $.days[1].")
    told = asked(structure, '{"city": "Oslo"}', label, detail="expected")[1]
    assert told.endswith("At $.days. Expected [1, 2], got nothing.")
    assert asked(structure, '{"city": "Oslo", "days": [true, 2]}', label)[0] == 0.0  # true is not 1


@pytest.mark.parametrize("environment", [choice, maths, structure])
def test_an_unknown_detail_is_refused(environment):
    with pytest.raises(ValueError, match="detail everything: choose one of outcome, "):
        environment.make(detail="everything")
