"""What reads a response takes linear time, raises nothing, and gives a reward and feedback that can be written."""

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo_plugin.distillation import thinking
from sdpo_plugin.environments import fences, python_calls, reading, reasoning, structure, tool_calls, tools
from sdpo_plugin.environments.tool_calls import GEMMA, WRAPPERS

TOKENS = sorted({
    *(tag for pair in thinking.JUDGED_TAGS for tag in pair),
    *WRAPPERS, *WRAPPERS.values(), *GEMMA, *GEMMA.values(), "<|python_tag|>",
    "[TOOL_CALLS]", "functools[", "[ARGS]", "[CALL_ID]", "<|tool_call_begin|>", "<|tool_call_argument_begin|>",
    "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "to=functions.f", "<|message|>", "✿FUNCTION✿:", "✿ARGS✿:", "Action:",
    "\nAction: f", "\nAction Input: ", "<function=f>", "<function=", '<invoke name="f">', "<invoke",
    "<function name='", "<parameter=x>", "</parameter>", '<parameter name="x">', "</function>", "<arg_key>",
    "<arg_key>k</arg_key>", "<arg_value>", "</arg_value>", "call:f", "<escape>", '<|"|>', "<answer>",
    "</answer>", "```", "```json\n", "~~~", "`", "\n", "\r\n", " ", "  ", "\t", "{", "}", "[", "]", "(", ")",
    ",", ":", ";", "=", "'", '"', "\\", '\\"', "'''", '"""', "1", "-", "a", ".a", "f(x=1)", "f(", "x=", "from=",
    "from", "print(", "{'a': 1,", '{"a": 1,', '{"name": "f", "arguments": {"x": 1}}', '{"city": "Oslo"}',
    '"\\ud800"', "lambda:", "not ", "1e999", "NaN", "null", "true", "0x" + "f" * 5000, "9" * 4400, "#", "é",
    "\u2028", "\0", "**", "*", "<", "</", "<|", "[" * 200, "]" * 200, "{1: (2, b'a')}", "<tool_call>{",
    "</think>{",
})  # fmt: skip
TEXTS = st.lists(st.sampled_from(TOKENS) | st.text(max_size=8), max_size=14).map("".join)
FUNCTIONS = {
    "thoughts": thinking.visible, "fences": fences.texts, "printable": reading.printable,
    "calls": tool_calls.parse, "python": python_calls.python_calls, "text": lambda text: tool_calls.Text(text).value(),
    "json": structure.parse, "answer": reasoning.answer_of, "literal": reasoning.is_literal,
    "expression": reasoning.is_expression, "equal": lambda text: tools.equal(text, text + "!"),
}  # fmt: skip


def seconds(function, text: str) -> float:
    """Of this thread's processor time; the best of three."""

    def once() -> float:
        began = time.thread_time()
        try:
            function(text)
        except (ValueError, RecursionError):  # what the functions may raise
            pass
        return time.thread_time() - began

    first = once()
    return first if first < 0.01 else min(first, once(), once())


def takes_linear_time(function, before: str, fragment: str, behind: str) -> bool:
    """Whether twice the text takes at most three times the time, if it takes any."""
    times = math.ceil(5000 / len(fragment))
    twice = seconds(function, before + 2 * times * fragment + behind)
    return twice < 0.01 or twice < 3 * seconds(function, before + times * fragment + behind)


# The next two take up to 4 s for `calls`, which reads a response in several ways.
@pytest.mark.parametrize("name", FUNCTIONS)
def test_twice_the_text_takes_twice_the_time(name):
    @settings(max_examples=50, deadline=None)
    @given(*[st.lists(st.sampled_from(TOKENS), min_size=least, max_size=3).map("".join) for least in (0, 1, 0)])
    def check(before, fragment, behind):
        again = range(3)  # a machine that does other things measures wrong now and then
        assert any(takes_linear_time(FUNCTIONS[name], before, fragment, behind) for _ in again)

    check()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_token_repeated(name):
    for token in TOKENS:
        assert any(takes_linear_time(FUNCTIONS[name], "", token, "") for _ in range(3)), token


CALLS = json.dumps([{"f": {"x": [1, "a"], "y": ["", {"a": [1]}]}}])
SCHEMAS = [
    {"type": "object", "properties": {"city": {"type": "string"}}, "additionalProperties": {"multipleOf": 0.01}},
    {"items": {"$ref": "#"}, "uniqueItems": True, "anyOf": [{"type": "array"}, {"multipleOf": 0.1}, {"minLength": 1}]},
    {"schema": {}, "value": {"city": ["Oslo", 1.5]}},
]
JUDGED = [(tools, CALLS), *((structure, json.dumps(schema)) for schema in SCHEMAS)]


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_any_text_gets_a_reward_and_feedback(text):
    for environment, label in JUDGED:
        for detail in environment.DETAILS:
            found = environment.make(detail=detail)([f"Q{text}"], ["Q"], [label])
            reward, told = found["rewards"].item(), found["feedback"][0]
            assert (reward, told) == (1.0, None) or (reward == 0.0 and told and len(told.encode()) < 4000)


@settings(max_examples=100, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
))  # fmt: skip
def test_any_value_is_itself(value):
    """As JSON that is to be this value, and as an argument that is to have it, in JSON and in Python."""
    label = json.dumps({"schema": {}, "value": value})
    structure.check_label(label)
    for response in (json.dumps(value), f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```"):
        assert structure.make()([f"Q{response}"], ["Q"], [label])["rewards"].item() == 1.0
    calls = tools.label_of([("f", {"x": value})])
    for response in (json.dumps({"name": "f", "parameters": {"x": value}}), f"f(x={value!r})"):
        found = tools.make()([f"Q{response}"], ["Q"], [calls])
        assert found["rewards"].item() == 1.0, (response, found["feedback"])
