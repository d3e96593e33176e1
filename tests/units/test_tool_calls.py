"""Tool calls: the forms in which models write them, what is wrong with others, thoughts, odd values, labels."""

import json

import pytest
from common import asked

from sdpo_plugin.environments import tools
from sdpo_plugin.environments.tool_calls import parse

LABEL = json.dumps([{"get_weather": {"city": ["Oslo", "Oslo, Norway"], "days": [2], "parts": [["rain", "wind"], ""]}},
                    {"get_time": {"zone": ["7"], "exact": [True]}}])  # fmt: skip
WEATHER = {"city": "Oslo", "days": 2, "parts": ["rain", "wind"]}
TIME = {"zone": "7", "exact": True}
W, T = json.dumps(WEATHER), json.dumps(TIME)
HERMES = f'<tool_call>\n{{"name": "get_weather", "arguments": {W}}}\n</tool_call>\n'
HERMES += f'<tool_call>\n{{"name": "get_time", "arguments": {T}}}\n</tool_call>'
LLAMA = f'{{"name": "get_weather", "parameters": {W}}}; {{"name": "get_time", "parameters": {T}}}'
OPENAI = [{"id": "call_0", "type": "function", "function": {"name": "get_weather", "arguments": W}},
          {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": T}}]  # fmt: skip
PYTHON = "get_weather(city='Oslo', days=2, parts=['rain', 'wind'])"
PYTHON_TIME = "get_time(zone='7', exact=True)"


def tagged(call, parameter, end):
    """call: with NAME; parameter: with KEY and VALUE."""
    def one(name, given):
        values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}
        inner = "\n".join(parameter.replace("KEY", key).replace("VALUE", value) for key, value in values.items())
        return f"{call.replace('NAME', name)}\n{inner}\n{end}"

    return f"{one('get_weather', WEATHER)}\n{one('get_time', TIME)}"


def gemma(quote):
    return [
        f"call:get_weather{{city:{quote}Oslo{quote},days:2,parts:[{quote}rain{quote},{quote}wind{quote}]}}",
        f"call:get_time{{zone:{quote}7{quote},exact:true}}",
    ]


RIGHT = {
    "Python": f"[{PYTHON}, {PYTHON_TIME}]",
    "Python with JSON's words": f"[{PYTHON}, get_time(zone='7', exact=true)]",
    "Python, a line each": f"{PYTHON}\n{PYTHON_TIME}",
    "OLMo 3": f"<function_calls>\n{PYTHON}\n{PYTHON_TIME}\n</function_calls>",
    "Llama 4": f"<|python_start|>[{PYTHON}, {PYTHON_TIME}]<|python_end|>",
    "LFM 2": f"<|tool_call_start|>[{PYTHON}, {PYTHON_TIME}]<|tool_call_end|>I look it up.",
    "Gemma 3": f"Sure.\n```tool_code\nprint({PYTHON})\nprint({PYTHON_TIME})\n```",
    "JSON": f'[{{"name": "get_weather", "arguments": {W}}}, {{"name": "get_time", "arguments": {T}}}]',
    "JSON, fenced": f'```json\n[{{"name": "get_weather", "arguments": {W}}},\n'
                    f' {{"name": "get_time", "input": {T}}}]\n```',
    "Hermes, Qwen": f"I look it up.\n{HERMES}",
    "Hermes, not closed": HERMES.removesuffix("</tool_call>"),
    "Llama 3": LLAMA,
    "Llama 3, its mark": f"<|python_tag|>{LLAMA}",
    "Llama 3, its tags": f"<function=get_weather>{W}</function>\n<function=get_time>{T}</function>",
    "OpenAI": json.dumps(OPENAI),
    "OpenAI, a message": json.dumps({"role": "assistant", "content": None, "tool_calls": OPENAI}),
    "Mistral": f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {W}, "id": "123456789"}}, '
               f'{{"name": "get_time", "arguments": {T}}}]',
    "Mistral, newer": f"[TOOL_CALLS]get_weather[ARGS]{W}[TOOL_CALLS]get_time[ARGS]{T}",
    "Mistral, with ids": f"[TOOL_CALLS]get_weather[CALL_ID]x1[ARGS]{W}[TOOL_CALLS]get_time[CALL_ID]x2[ARGS]{T}",
    "Qwen3-Coder": tagged("<tool_call>\n<function=NAME>", "<parameter=KEY>\nVALUE\n</parameter>",
                          "</function>\n</tool_call>"),
    "Seed": "<seed:tool_call>\n"
            + tagged("<function=NAME>", "<parameter=KEY>VALUE</parameter>", "</function>") + "\n</seed:tool_call>",
    "GLM": tagged("<tool_call>NAME", "<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>", "</tool_call>"),
    "Claude": tagged('<function_calls>\n<invoke name="NAME">', '<parameter name="KEY">VALUE</parameter>',
                     "</invoke>\n</function_calls>"),
    "DeepSeek 3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
                  f"{W}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_time\n```json\n{T}\n```"
                  "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "DeepSeek 3.1": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{W}<｜tool▁call▁end｜>"
                    f"<｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{T}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "DeepSeek 3.2": tagged(
        '<｜DSML｜invoke name="NAME">', '<｜DSML｜parameter name="KEY" string="true">VALUE</｜DSML｜parameter>',
        "</｜DSML｜invoke>"),
    "Kimi": f"<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{W}"
            f"<|tool_call_end|><|tool_call_begin|>functions.get_time:1<|tool_call_argument_begin|>{T}<|tool_call_end|>",
    "gpt-oss": f"<|channel|>analysis<|message|>get_weather?<|end|><|start|>assistant<|channel|>commentary to=functions."
               f"get_weather <|constrain|>json<|message|>{W}<|call|><|start|>assistant<|channel|>commentary "
               f"to=functions.get_time <|constrain|>json<|message|>{T}<|call|>",
    "FunctionGemma": "".join(f"<start_function_call>{call}<end_function_call>" for call in gemma("<escape>")),
    "Gemma 4": "".join(f"<|tool_call>{call}<tool_call|>" for call in gemma('<|"|>')),
    "Command": f'<|START_ACTION|>[{{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {W}}}, '
               f'{{"tool_call_id": "1", "tool_name": "get_time", "parameters": {T}}}]<|END_ACTION|>',
    "Apertus": f'<|tools_prefix|>[{{"get_weather": {W}}}, {{"get_time": {T}}}]<|tools_suffix|>',
    "Phi-4-mini": f'functools[{{"name": "get_weather", "arguments": {W}}}, {{"name": "get_time", "arguments": {T}}}]',
    "Action": f"Thought: rain?\nAction: get_weather\nAction Input: {W}\n\nAction: get_time\nAction Input: {T}\n",
    "Qwen-Agent": f"✿FUNCTION✿: get_weather\n✿ARGS✿: {W}\n✿FUNCTION✿: get_time\n✿ARGS✿: {T}",
}  # fmt: skip


@pytest.mark.parametrize("form", RIGHT)
def test_a_form(form):
    found = [(call.name, call.arguments) for call in parse(RIGHT[form])]
    assert [(name, [*arguments]) for name, arguments in found] == [("get_weather", [*WEATHER]), ("get_time", [*TIME])]
    assert asked(tools, RIGHT[form], LABEL) == (1.0, None)


@pytest.mark.parametrize("form", RIGHT)
def test_a_wrong_call_in_a_form(form):
    for old, new in (("Oslo", "Bergen"), ("get_time", "get_times"), ("zone", "zones"), ("rain", "sun")):
        reward, told = asked(tools, RIGHT[form].replace(old, new), LABEL)
        assert reward == 0.0 and told.startswith("Call "), (old, told)
    first = RIGHT[form].replace("get_time", "get_weather")
    assert asked(tools, first, LABEL)[0] == 0.0


@pytest.mark.parametrize("form", RIGHT)
def test_thoughts_before_a_form_do_not_count(form):
    response = RIGHT[form]
    wrong = response.replace("Oslo", "Bergen")
    thoughts = f"<think>\n{wrong}\n</think>\n\n", f"{wrong}\n</think>\n", "[THINK][f(x=1)]?[/THINK]", "<think></think>"
    for thought in thoughts:
        assert asked(tools, thought + response, LABEL) == (1.0, None), thought
        assert asked(tools, thought + wrong, LABEL)[0] == 0.0
    assert asked(tools, f"<think>\n{response}", LABEL)[0] == 0.0  # it was cut within its thought
    assert asked(tools, f"<think>\n{response}\n</think>\nI do not know.", LABEL)[0] == 0.0


CALL = json.dumps([{"f": {"x": [1]}}])


@pytest.mark.parametrize(
    "response, told",
    [
        ('{"name": "f", "params": {"x": 1}}', '"params" is not a key of a call; the keys are name and arguments.'),
        ('{"name": "f", "argumnts": {}}', '"argumnts" is not a key of a call'),
        ('[{"name": "f", "arguments": {"x": 1}, "why": ""}]', '"why" is not a key of a call'),
        ('<tool_call>{"nme": "f", "arguments": {"x": 1}}</tool_call>', '"nme" is not a key of a call'),
        ('{"function": {"name": "f", "args": {"x": 1}}}', '"args" is not a key of a call'),
        ('{"tool_calls": [{"name": "f", "kwargs": {"x": 1}}]}', '"kwargs" is not a key of a call'),
        ('{"name": "f", "arguments": {"x": 1}, "parameters": {}}', "A call has arguments and parameters; it takes one"),
        ('{"name": "f", "arguments": "{"}', "Expecting property name"),
        ('{"name": "f", "arguments": "[1]"}', "The arguments of a call are an object."),
        ('{"name": "f", "arguments": {"x": NaN}}', "NaN is not JSON."),
        ('{"name": "f", "arguments": {"x": 1e999}}', "The number 1e999 is too large."),
        ('{"name": "f"}', "Call 1, f: x is missing."),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}} too</tool_call>', "A call is followed by 'too</tool_call>'."),
        ("<function=f>\n<paramater=x>1</paramater>\n</function>", "A call is followed by '<paramater=x>"),
        ("<tool_call>\n<f>1</f>\n</tool_call>", "It cannot be read."),
        ("<|tool_call_begin|>f", "There is no name with arguments after <|tool_call_begin|>."),
        ("<start_function_call>f{x:1}", "A call is call:name{argument:value}."),
        ('[TOOL_CALLS]f[ARGS]{"x": }', "f: its arguments are not JSON: Expecting value"),
        ("f(x=2 - 1)", "f: arguments are values, not expressions."),
        ("[f]", "one element is not a call"),
        ("x = f(x=1)", "It is not a list of calls."),
        ("(lambda: 1)()", "A function is called by its name."),
    ],
)  # fmt: skip
def test_what_cannot_be_read(response, told):
    reward, feedback = asked(tools, response, CALL)
    assert reward == 0.0 and told in feedback
    assert asked(tools, response, CALL, detail="outcome")[1] in (
        "The response is not a list of calls such as [name(argument=value)].", "The calls are wrong."
    )  # fmt: skip


@pytest.mark.parametrize(
    "response, told",
    [
        ("f(x={(1, 2): 3})", "arguments are values, not expressions."),
        ("f(x={b'a': 3})", "arguments are values, not expressions."),
        ("f(x={1: 3})", "arguments are values, not expressions."),
        (f"f(x=0x{'f' * 5000})", "Call 1, f: x is not (int too large to show)."),
        (f"f(x={'9' * 5000})", "It cannot be read."),
        ("f(x=1e999)", "Call 1, f: x is not Infinity."),
        (f"f(x={'[' * 150}{']' * 150})", "Call 1, f: x is not [[["),
        (f"f(x={'-' * 3000}1)", "It cannot be read."),
        (f"a{'.a' * 3000}(x=1)", "It cannot be read."),
        ('{"name": "f", "arguments": {"x": ' + "[" * 5000 + "]" * 5000 + "}}", "It is nested too deeply."),
        ('{"name": "f", "arguments": {"x": ' + "[" * 500 + "]" * 500 + "}}", "Call 1, f: x is not [[["),
        (f'[TOOL_CALLS]f[ARGS]{{"x": {"[" * 5000}}}', "It is nested too deeply."),
        (f"<function=f><parameter=x>{'[' * 5000}</parameter></function>", 'Call 1, f: x is not "[[['),
        ('{"name": "\\ud800", "arguments": {}}', "Call 1, \\ud800: this function is not to be called."),
        ("f(x='\\ud800')", 'Call 1, f: x is not "\\ud800".'),
        ("f(x=1)\0", "It cannot be read."),
        ("", "0 calls were made; it takes 1."),
    ],
)  # fmt: skip
def test_odd_values_get_no_reward(response, told):
    reward, feedback = asked(tools, response, CALL)
    assert reward == 0.0 and told in feedback and feedback.encode()


@pytest.mark.parametrize("value", ["2", "2.0", "2e0"])
def test_a_tag_s_text_is_what_is_wanted_there(value):
    response = f"<function=f><parameter=x>\n{value}\n</parameter></function>"
    assert asked(tools, response, json.dumps([{"f": {"x": [2]}}]))[0] == 1.0
    assert asked(tools, response, json.dumps([{"f": {"x": [value]}}]))[0] == 1.0
    assert asked(tools, response, json.dumps([{"f": {"x": [[2]]}}]))[0] == 0.0
    assert asked(tools, response, json.dumps([{"f": {"x": [3]}}]))[0] == 0.0


def test_python_values_in_tags():
    response = "<function=f><parameter=x>{'a': True}</parameter><parameter=y>\nTrue\n</parameter></function>"
    assert asked(tools, response, json.dumps([{"f": {"x": [{"a": [True]}], "y": [True]}}])) == (1.0, None)
    assert asked(tools, response, json.dumps([{"f": {"x": [{"a": [True]}], "y": ["true"]}}])) == (1.0, None)


@pytest.mark.parametrize(
    "text", ["</think>", "a <tool_call> b", "Action: f\nAction Input: 1", "``` x", "\u2028", "[TOOL_CALLS]"]
)
def test_marks_in_arguments_are_arguments(text):
    label = json.dumps([{"f": {"x": [text]}}])
    call = json.dumps({"name": "f", "arguments": {"x": text}})
    behind_a_thought = f"<think>f(x=1)</think>[TOOL_CALLS][{call}]"
    for response in (call, f"f(x={text!r})", f"<tool_call>{call}</tool_call>", behind_a_thought):
        assert asked(tools, response, label) == (1.0, None), response


@pytest.mark.parametrize(
    "response",
    [
        '```json\n{"name": "f", "arguments": {"x": 1}}\n```\nas in\n```python\nimport f\n```',
        '```json {"name": "f", "arguments": {"x": 1}}```', '~~~json\n{"name": "f", "arguments": {"x": 1}}\n~~~',
        "1. So:\n\n   ```python\n   f(x=1)\n   ```", "```python\r\n[f(x=1)]\r\n```", "```python\n[f(x=1)]```",
        "Use ```f```:\n```\n[f(x=1)]", '```python title="a.py"\n[f(x=1)]\n```', "```python {.x}\n[f(x=1)]\n```",
    ],
)  # fmt: skip
def test_calls_in_fences(response):
    assert asked(tools, response, CALL) == (1.0, None)


def test_arguments_may_be_named_like_words_of_python():
    label = json.dumps([{"f": {"from": [1], "in": ["from = 3"]}}])
    for response in ("f(from=1, in='from = 3')", "[f(from= 1, in='from = 3')]", '{"f": {"in": "from = 3", "from": 1}}'):
        assert asked(tools, response, label) == (1.0, None)
    assert asked(tools, "f(from=2, in='from = 3')", label)[1] == "Call 1, f: from is not 2."


# ── labels ──


@pytest.mark.parametrize(
    "label",
    [
        LABEL, CALL, "[]", json.dumps([{"f": {"x": 1}}]), json.dumps([{"f": {}}]),
        json.dumps({"name": "f", "arguments": {"x": 1}}), json.dumps(OPENAI), json.dumps([{"function": {"name": "f"}}]),
        json.dumps([{"f": {"o": [{"a": [1], "b": ["", 2]}], "l": [[{"a": [1]}], []]}}]),
        json.dumps([{"f": {"x": [1]}}, {"f": {"x": [1]}}]), json.dumps([{"f": {"name": ["x"]}}]),
    ],
)  # fmt: skip
def test_labels_that_can_be_met(label):
    tools.check_label(label)


@pytest.mark.parametrize(
    "label, told",
    [
        ([{"f": {}}], "a label must be text, a JSON list of calls, not a list: use json.dumps"),
        (3, "not a int"), (None, "not a NoneType"),
        ("f(x=1)", "a label must be a JSON list of calls"), ("3", "A call is an object with name and arguments."),
        ('["f"]', "A call is an object"), ('[{"f": 3}]', '"f" is not a key of a call'),
        ('[{"f": {}, "g": {}}]', '"f" is not a key of a call'), ('[{"f": {"x": [NaN]}}]', "NaN is not JSON"),
        ('[{"f": {"x": []}}]', "argument x of f has no right value"),
        ('[{"f": {"x": [{"a": []}]}}]', "no call can be right: Call 1, f: x is not"),
        ('[{"f": {"x": [' + "[" * 3000 + "]" * 3000 + "]}}]", "a label must be a JSON list of calls"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_met(label, told):
    with pytest.raises(ValueError, match="^(a label must|no call can)") as raised:
        tools.check_label(label)
    assert told in str(raised.value)


@pytest.mark.parametrize(
    "label",
    [
        [{"weather": {"city": "Oslo", "days": [2]}}], [{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}],
        {"name": "weather", "parameters": {"city": "Oslo", "days": 2}},
        {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}}]},
    ],
)  # fmt: skip
def test_labels_in_other_forms(label):
    assert asked(tools, "[weather(city='Oslo', days=2)]", json.dumps(label)) == (1.0, None)
    assert asked(tools, "[weather(city='Oslo', days=3)]", json.dumps(label))[1] == "Call 1, weather: days is not 3."
    assert asked(tools, "[weather(city='Oslo')]", json.dumps(label))[1] == "Call 1, weather: days is missing."
