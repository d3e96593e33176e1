"""Reward functions with feedback: choice, maths, JSON, tools (code: test_code_environment.py)."""

import json
import threading

import pytest

from sdpo_plugin.environments import choice, maths, structure, tools


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


WEATHER = json.dumps([{"weather.get": {"city": ["Oslo", "Oslo, Norway"], "days": [2], "unit": ["C", ""]}}])


@pytest.mark.parametrize(
    "response",
    [
        "[weather.get(city='Oslo', days=2)]", "weather.get(city='oslo norway', days=2.0, unit='c')",
        '```python\n[weather.get(city="Oslo", days=2)]\n```',
        '{"name": "weather.get", "arguments": {"city": "Oslo", "days": 2}}',
        'I call\n<tool_call>\n{"name": "weather.get", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>',
    ],
)  # fmt: skip
def test_right_calls(response):
    assert asked(tools, response, WEATHER) == (1.0, None)


@pytest.mark.parametrize(
    "response, told",
    [
        ("[weather.get(city='Bergen', days=2)]",
         'Call 1, weather.get: city is not "Bergen". Right is "Oslo" or "Oslo, Norway".'),
        ("[weather.get(city='Oslo')]", "Call 1, weather.get: days is missing. Right is 2."),
        ("[weather.get(city='Oslo', days=True)]", "Call 1, weather.get: days is not true. Right is 2."),
        ("[weather.get(city='Oslo', days=2, wind=1)]", "Call 1, weather.get: wind is not to be given."),
        ("[get(city='Oslo', days=2)]", "Call 1, get: this function is not to be called. Right is weather.get."),
        ("[]", "0 calls were made; it takes 1: weather.get."),
        ("It rains.", "The response is no list of calls such as [name(argument=value)]. It cannot be read: "),
        ("[weather.get('Oslo', 2)]", "weather.get: give arguments by name."),
        ("[weather.get(city=open('/etc/passwd').read(), days=2)]", "arguments are values, not expressions."),
        ('{"name": 3}', "no list of calls"), ("[" * 9999, "no list of calls"),
    ],
)  # fmt: skip
def test_wrong_calls_are_told_apart(response, told):
    reward, feedback = asked(tools, response, WEATHER, detail="expected")
    assert reward == 0.0 and told in feedback
    if "Right is" in told:
        assert told.partition(" Right")[0] in asked(tools, response, WEATHER)[1]
        assert "Right is" not in asked(tools, response, WEATHER)[1]
    assert len(asked(tools, response, WEATHER, detail="outcome")[1]) < 80


def test_calls_come_in_any_order():
    label = json.dumps([{"f": {"x": [1]}}, {"f": {"x": [[1, 2]]}}, {"g": {"o": [{"a": [1], "b": ["", 2]}]}}])
    assert asked(tools, "[g(o={'a': 1}), f(x=[1, 2]), f(x=1)]", label) == (1.0, None)
    assert asked(tools, "[g(o={'a': 1}), f(x=1), f(x=1)]", label)[1] == "Call 3, f: x is not 1."


def test_a_file_of_the_leaderboard_becomes_a_data_set(tmp_path):
    question = {"id": "simple_0", "question": [[{"role": "user", "content": "How is the weather in Oslo?"}]],
                "function": [{"name": "weather.get", "parameters": {}}]}  # fmt: skip
    several = question | {"id": "multi_0", "question": [[], []]}
    (tmp_path / "q.json").write_text(f"{json.dumps(question)}\n{json.dumps(several)}\n")
    answers = [{"id": "simple_0", "ground_truth": json.loads(WEATHER)}, {"id": "multi_0", "ground_truth": []}]
    (tmp_path / "a.json").write_text("".join(json.dumps(a) + "\n" for a in answers))
    (row,) = tools.rows(str(tmp_path / "q.json"), str(tmp_path / "a.json"))
    assert [m["role"] for m in row["prompt"]] == ["system", "user"] and "weather.get" in row["prompt"][0]["content"]
    assert asked(tools, "[weather.get(city='Oslo', days=2)]", row["label"])[0] == 1.0


@pytest.mark.parametrize("environment", [choice, maths, structure, tools])
def test_an_unknown_detail_is_refused(environment):
    with pytest.raises(ValueError, match="detail everything: choose one of outcome, "):
        environment.make(detail="everything")
