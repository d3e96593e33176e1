"""Reward functions with feedback: choice, maths, JSON, tools; and what all environments have in common.

The others have files of their own, test_code_environment.py and test_reasoning_environment.py.
"""

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from common import asked

from sdpo_plugin import environments
from sdpo_plugin.environments import choice, feedback, maths, published, sandbox, structure, tools
from sdpo_plugin.environments.feedback import response_of, without_end_tokens


def test_a_choice_is_reported_as_wrong_and_right_only_if_asked():
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


def test_json_is_reported_where_it_does_not_fit():
    label = json.dumps(SCHEMA)
    assert asked(structure, '```json\n{"city": "Oslo", "days": 2}\n```', label) == (1.0, None)
    told = asked(structure, '{"city": "Oslo", "days": 0, "hotel": 1}', label)[1]
    assert "At $.days: 0 is less than the minimum of 1" in told and "'hotel' was unexpected" in told
    assert asked(structure, "Oslo", label, detail="outcome") == (0.0, "The response is not JSON.")
    assert asked(structure, "{}", label, detail="outcome") == (0.0, "The JSON does not fit its schema.")


def test_json_is_reported_where_it_differs():
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
        'Thought: rain?\nAction: weather.get\nAction Input: {"city": "Oslo", "days": 2}\nThat is all.',
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
        ("It rains.", "The response is not a list of calls such as [name(argument=value)]. It cannot be read."),
        ("[weather.get('Oslo', 2)]", "weather.get: give arguments by name."),
        ("[weather.get(city=open('/etc/passwd').read(), days=2)]", "arguments are values, not expressions."),
        ("Action: weather.get\nAction Input: Oslo", "weather.get: its Action Input is not JSON: Expecting value"),
        ('Action: weather.get\nAction Input: ["Oslo"]', "weather.get: its Action Input is not an object."),
        ("[weather.get(city='Oslo')] + [1]", "It is not a list of calls."),
        ("[weather.get(**{'city': 'Oslo'})]", "weather.get: give arguments by name."),
        ('{"name": 3}', "not a list of calls"), ("[" * 9999, "not a list of calls"),
    ],
)  # fmt: skip
def test_wrong_calls_are_distinguished(response, told):
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
    questions = [question, question | {"id": "multi_0", "question": [[], []]}, question | {"id": "simple_1"}]
    (tmp_path / "q.json").write_text("".join(json.dumps(q) + "\n" for q in questions))
    answers = [{"id": "simple_0", "ground_truth": json.loads(WEATHER)}, {"id": "multi_0", "ground_truth": []},
               {"id": "simple_1", "ground_truth": [{"weather.get": {"city": []}}]}]  # fmt: skip
    (tmp_path / "a.json").write_text("".join(json.dumps(a) + "\n" for a in answers))
    (row,) = tools.bfcl(str(tmp_path / "q.json"), str(tmp_path / "a.json"))
    assert [m["role"] for m in row["prompt"]] == ["system", "user"] and "weather.get" in row["prompt"][0]["content"]
    assert asked(tools, "[weather.get(city='Oslo', days=2)]", row["label"])[0] == 1.0


API = {
    "NLDocumentation": "find: Finds.", "Function_Projection": {"find": ["/find", "get"]},
    "Instructions": ["Find a wild one", "Find its friend", "Find what nobody documented"],
    "Golden_Answers": [
        [{"Action": "find", "Action_Input": '{"colour": "wild", "size": "", "tags": {"a": [1]}}'}],
        [{"Action": "find", "Action_Input": '{"id": ${id from find}}'}],
        [{"Action": "lose", "Action_Input": "{}"}],
    ],
}  # fmt: skip


def test_a_file_of_toolalpaca_becomes_a_data_set(tmp_path):
    step = [["find", '{"colour": "red"}', "Thought..."], "found"]
    talks = [{"input": "Find a red one\nHint: page 1", "intermediate_steps": [step]},
             {"input": "Find two", "intermediate_steps": [step, step]}]  # fmt: skip
    training = {key: value for key, value in API.items() if key != "Golden_Answers"} | {"Instances": talks}
    (tmp_path / "alpaca.json").write_text(json.dumps([API, training]))
    first, second = tools.toolalpaca(str(tmp_path / "alpaca.json"))
    assert "find: Finds." in first["prompt"][0]["content"] and first["prompt"][1]["content"] == "Find a wild one"
    assert asked(tools, "[find(colour='wild', tags={'a': [1]})]", first["label"]) == (1.0, None)  # "" may be left out
    assert "find: tags is not" in asked(tools, "[find(colour='wild', tags={'a': 1})]", first["label"])[1]
    assert second["prompt"][1]["content"] == "Find a red one"
    assert asked(tools, "[find(colour='red')]", second["label"]) == (1.0, None)


PUBLISHED = {  # as in the authors' files
    "mcq": {"prompt": "Which?\n\nA: x\nB: y\nPlease reason step by step.", "system": "Respond in the following format",
            "answer": "B", "tests": "-"},
    "tooluse": {"prompt": "Begin!\nQuestion: Find it", "system": None, "tests": None,
                "answer": '[{"Action": "find", "Action_Input": "{\\"page\\": 1}"}]'},
    "code": {"prompt": "def double(self, n: int)", "system": None, "answer": "-",
             "tests": json.dumps({"inputs": ["2"], "outputs": ["4"], "testtype": "functional", "fn_name": "double",
                                  "time_limit": 6})},
}  # fmt: skip


def test_the_authors_files_become_data_sets(tmp_path):
    from sdpo_plugin.environments import code

    made = {}
    for kind, row in PUBLISHED.items():
        lines, array = tmp_path / f"{kind}.jsonl", tmp_path / f"{kind}.json"
        lines.write_text(json.dumps(row | {"kind": kind}) + "\n")
        array.write_text(json.dumps([row | {"kind": kind}]))
        (made[kind],) = published.rows(str(lines))
        assert list(published.rows(str(array))) == [made[kind]]
    assert [m["role"] for m in made["mcq"]["prompt"]] == ["system", "user"]
    assert asked(choice, "<reasoning>\n...\n</reasoning>\n<answer>\nB\n</answer>", made["mcq"]["label"])[0] == 1.0
    assert asked(tools, 'Action: find\nAction Input: {"page": 1}', made["tooluse"]["label"])[0] == 1.0
    assert made["code"]["prompt"][0]["content"] == "def double(n: int)"
    assert code.parse(made["code"]["label"]) == ("double", [code.Case("2", "4")])
    (tmp_path / "mixed.json").write_text(json.dumps([{"kind": "mcq"}, {"kind": "code"}]))
    with pytest.raises(ValueError, match="rows of code, mcq; they must be of one of mcq, math, tooluse, code"):
        list(published.rows(str(tmp_path / "mixed.json")))


# ── all of them ──

RIGHT = {
    "choice": ("The answer is (B)", "B"), "maths": ("so $7$", "7"), "structure": ('{"a": 1}', '{"type": "object"}'),
    "tools": ("[weather.get(city='Oslo', days=2)]", WEATHER),
    "code": ("```python\nprint(2 * int(input()))\n```", json.dumps([{"input": "2", "output": "4"}])),
    "reasoning": ("<answer>5</answer>", json.dumps({"name": "chain_sum", "parameters": {}, "entry": {"answer": "5"}})),
}  # fmt: skip
ENDS = ("<|im_end|>", "</s>", "<eos>", "<pad><pad>", "<|eot_id|>\n", "<end_of_turn>", "<｜end▁of▁sentence｜>", "[PAD]")


def usable(name: str) -> str:
    if name == "reasoning":
        pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'openrlhf-sdpo[reasoning]'")
    if name == "code" and sandbox._bubblewrap() is None:
        pytest.skip("needs a kernel that allows namespaces")
    return name


@pytest.mark.parametrize("name", RIGHT)
def test_as_openrlhf_alone_loads_and_calls_it(name):
    """By its path, one query at a time, with special tokens; of the rest of the plugin only what reads thoughts."""
    response, label = RIGHT[usable(name)]
    path = Path(environments.__file__).with_name(f"{name}.py")
    program = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("reward_func", {str(path)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
prompt = "<|im_start|>user\\nSay <answer>this</answer> or A.<|im_end|>\\n<|im_start|>assistant\\n"
for end in ("", *{ENDS!r}):
    found = module.reward_func([prompt + {response!r} + end], [prompt], [{label!r}])
    assert found["rewards"].tolist() == [1.0] and found["feedback"] == [None], (end, found)
print([m for m in sys.modules if m.startswith("sdpo_plugin.") and not m.startswith("sdpo_plugin.environments")])
"""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert ran.stdout == "['sdpo_plugin.distillation', 'sdpo_plugin.distillation.thinking']\n", ran.stdout + ran.stderr


def test_the_response_of_a_query():
    prompt = f"<s>{'Say A or B. ' * 20}\n<|assistant|>\n"
    assert response_of(f"{prompt}I say B.</s>", prompt) == "I say B."
    assert response_of(f"{prompt[100:]}I say B.<pad><pad>", prompt) == "I say B."  # cut on the left
    assert response_of(f"{prompt.replace('<s>', '<s> ')}I say B.", prompt) == "I say B."  # not letter by letter


END_TOKENS = (
    "<|im_end|>", "<|endoftext|>", "</s>", "<eos>", "<pad>", "<|eot_id|>", "<|eot|>", "<|EOT|>", "<end_of_turn>",
    "<turn|>", "<seed:eos>", "[|endofturn|]", "[e~[", "]~b]", "]~!b[", "<SPECIAL_12>", "<end_of_utterance>",
    "<｜end▁of▁sentence｜>", "[/INST]", "[PAD]", "[EOS]", "[gMASK]", "<|return|>", "<|call|>",
    "<|END_OF_TURN_TOKEN|>", "<|plamo:eos|>", "<EOT>", "<eop>", "<eoh>", "<extra_id_1>", "<reserved_106>",
    "<unused12>", "<start_of_turn>", "<file_sep>", "<endoftext>", "<EOD>", "<|reserved_special_token_5|>", "<|user|>",
    "<im_end>", "<sep>", "<mask>", "<unk>", "<s>", "<special_token_3>",
)  # fmt: skip
NO_END_TOKENS = (
    "</answer>", "<b>", "</b>", "</tool_call>", "<answer>", "[1]", "[f(x=1)]", '["a"]', "[]", "<br/>", "</html>",
    "List<T>", "vector<int>", "a < b > c", "[INFO]", "[[1], [2]]", "</think>", "<|tool_call_end|>",
    "<｜tool▁calls▁end｜>", "<legend>", "<blend_of_tea>", "<special>", "2 > 1", "x]", "[A]", "<turn>", "->",
    "<>", "[/THINK]", "<end>", "]", ">",
)  # fmt: skip


@pytest.mark.parametrize("end", END_TOKENS)
def test_an_end_token_of_an_unknown_model_is_left_out(end):
    assert without_end_tokens(f"I say B.{end}") == "I say B."
    assert without_end_tokens(f"I say B. \n{end}\n {end}{end}\n") == "I say B."
    assert without_end_tokens(f"I say {end} B.\n") == f"I say {end} B.\n"


@pytest.mark.parametrize("end", NO_END_TOKENS)
def test_the_end_of_a_response_is_left_alone(end):
    assert without_end_tokens(f"I say B {end}") == f"I say B {end}"
    assert without_end_tokens(f"I say B {end}<|im_end|>") == f"I say B {end}"


class Tokenizer:
    eos_token, pad_token = "<<over>>", "</pad>"
    all_special_tokens = ["<<over>>", "</pad>", "<think>", "</tool_call>", "[/THINK]", "%%turn%%", "%%turn"]


def test_the_special_tokens_of_a_model_that_is_known(monkeypatch):
    assert without_end_tokens("B%%turn%%</pad> <<over>>") == "B%%turn%%</pad> <<over>>"
    monkeypatch.setattr(feedback, "special_tokens", ())
    feedback.know(Tokenizer)
    assert without_end_tokens("B%%turn%%</pad> <<over>>") == "B"
    assert without_end_tokens("<tool_call>B</tool_call>%%turn") == "<tool_call>B</tool_call>"
    feedback.know(None)  # the first one's stay
    assert without_end_tokens("B<<over>>") == "B"


PAGE = (Path(__file__).parents[2] / "docs" / "environments.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}
SHOWN = {"Choice": "choice", "Maths": "maths", "JSON": "structure", "Tool calls": "tools", "Reasoning": "reasoning",
         "Code with tests": "code"}  # fmt: skip


def told(environment, response, label, **options):
    print(asked(environment, response, label, **options)[1])


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_shows_the_feedback_of_environments(section):
    name = usable(SHOWN[section])
    modules = {name: importlib.import_module(f"sdpo_plugin.environments.{name}")}
    text = SECTIONS[section].replace("\n```\n", "\n\n")  # what a fence ends is not expected
    shown = modules | {"told": told, "json": json, "Limits": sandbox.Limits}
    page = doctest.DocTestParser().get_doctest(text, shown, section, None, None)
    assert sum("told(" in example.source for example in page.examples) >= 3
    results: list[str] = []
    doctest.DocTestRunner().run(page, out=results.append)
    assert not results, "".join(results)


@pytest.mark.parametrize("environment", [choice, maths, structure, tools])
def test_an_unknown_detail_is_rejected(environment):
    with pytest.raises(ValueError, match="detail everything: choose one of outcome, "):
        environment.make(detail="everything")
