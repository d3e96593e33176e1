"""Right answers of BFCL in every form of calls that tools.py reads, and wrong ones: how many are judged right.

    python3 -m pip download --no-deps bfcl-eval -d /tmp/bfcl && unzip -q /tmp/bfcl/*.whl -d /tmp/bfcl
    python tests/slow/bench/tool_calls.py /tmp/bfcl/bfcl_eval/data

A row is rendered with the first right value of each argument. Wrong are: an argument less, another value, another name,
a call more; none may get 1.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sdpo_plugin.environments import tools

Calls = list[tuple[str, dict[str, Any]]]


def answers(folder: Path) -> Iterator[str]:
    """The labels of the single-turn files."""
    for path in sorted((folder / "possible_answer").glob("*.json")):
        if not any(kind in path.name for kind in ("multi_turn", "memory", "web_search")):
            for row in map(json.loads, path.read_text().splitlines()):
                yield json.dumps(row["ground_truth"])


def right_calls(label: str) -> Calls:
    """One answer that is right: of each argument the first value that is not "", or none if there is no other."""

    def first(values: Any) -> Any:
        value = next((value for value in values if value != ""), "") if isinstance(values, list) else values
        return plain(value)

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: first(part) for key, part in value.items() if part != [""]}
        return [plain(part) for part in value] if isinstance(value, list) else value

    calls = [next(iter(call.items())) for call in json.loads(label)]
    return [(name, {key: first(values) for key, values in arguments.items() if values not in ([""], [])})
            for name, arguments in calls]  # fmt: skip


# ── forms ──


def python(calls: Calls, end: str = ", ") -> str:
    return end.join(f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in calls)


def as_json(calls: Calls, arguments: str = "arguments", **more: Any) -> list[str]:
    return [json.dumps({**more, "name": name, arguments: given}, ensure_ascii=False) for name, given in calls]


def openai(calls: Calls) -> list[dict[str, Any]]:
    return [{"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}
            for i, (name, given) in enumerate(calls)]  # fmt: skip


def each(calls: Calls, form: str, value: Callable[[Any], str] = json.dumps, between: str = "\n") -> str:
    """form: with {name} and {given}, the arguments as JSON."""
    return between.join(form.replace("{name}", name).replace("{given}", value(given)) for name, given in calls)


def text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def tags(calls: Calls, call: str, parameter: str) -> str:
    """call: with {name} and {parameters}; parameter: with {key} and {value}."""
    return "\n".join(
        call.replace("{name}", name).replace(
            "{parameters}", "\n".join(parameter.replace("{key}", key).replace("{value}", text(value))
                                      for key, value in given.items())
        ) for name, given in calls
    )  # fmt: skip


def gemma(value: Any, quote: str) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{gemma(part, quote)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(gemma(part, quote) for part in value) + "]"
    return f"{quote}{value}{quote}" if isinstance(value, str) else json.dumps(value)


HERMES = "<tool_call>\n{call}\n</tool_call>"
FORMS: dict[str, Callable[[Calls], str]] = {
    "Python, a list": lambda c: f"[{python(c)}]",
    "Python, fenced": lambda c: f"I call:\n```python\n[{python(c)}]\n```",
    "Python, one a line (OLMo 3)": lambda c: f"<function_calls>\n{python(c, chr(10))}\n</function_calls>",
    "Python (Llama 4)": lambda c: f"<|python_start|>[{python(c)}]<|python_end|>",
    "Python (LFM 2)": lambda c: f"<|tool_call_start|>[{python(c)}]<|tool_call_end|>I call them.",
    "```tool_code (Gemma 3)": lambda c: "```tool_code\n" + "\n".join(f"print({python([x])})" for x in c) + "\n```",
    "JSON, a list": lambda c: f"[{', '.join(as_json(c))}]",
    "JSON, fenced": lambda c: "```json\n[" + ",\n".join(as_json(c)) + "]\n```",
    "JSON, behind a thought": lambda c: f"<think>\n[f(x=1)]? No.\n</think>\n\n[{', '.join(as_json(c))}]",
    "<tool_call> JSON (Hermes, Qwen)": lambda c: "\n".join(HERMES.replace("{call}", call) for call in as_json(c)),
    "the same, behind a thought": lambda c: 'so <tool_call>{"name": "f"}</tool_call>?\n</think>\n'
    + "\n".join(HERMES.replace("{call}", call) for call in as_json(c)),
    "Llama 3": lambda c: "; ".join(as_json(c, "parameters")),
    "Llama 3, <|python_tag|>": lambda c: "<|python_tag|>" + "; ".join(as_json(c, "parameters", type="function")),
    "Llama 3, <function=...>": lambda c: each(c, "<function={name}>{given}</function>"),
    "OpenAI, a list": lambda c: json.dumps(openai(c)),
    "OpenAI, tool_calls": lambda c: json.dumps({"role": "assistant", "content": None, "tool_calls": openai(c)}),
    "Mistral, a list": lambda c: f"[TOOL_CALLS] [{', '.join(as_json(c))}]",
    "Mistral, [ARGS]": lambda c: each(c, "[TOOL_CALLS]{name}[ARGS]{given}", between=""),
    "Mistral, [CALL_ID]": lambda c: each(c, "[TOOL_CALLS]{name}[CALL_ID]a1b2c3d4e[ARGS]{given}", between=""),
    "Qwen3-Coder": lambda c: tags(
        c, "<tool_call>\n<function={name}>\n{parameters}\n</function>\n</tool_call>",
        "<parameter={key}>\n{value}\n</parameter>"),
    "GLM": lambda c: tags(
        c, "<tool_call>{name}\n{parameters}\n</tool_call>",
        "<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>"),
    "Claude, MiniMax": lambda c: "<function_calls>\n" + tags(
        c, '<invoke name="{name}">\n{parameters}\n</invoke>',
        '<parameter name="{key}">{value}</parameter>') + "\n</function_calls>",
    "DeepSeek 3": lambda c: "<｜tool▁calls▁begin｜>" + each(
        c, "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{given}\n```<｜tool▁call▁end｜>"
    ) + "<｜tool▁calls▁end｜>",
    "DeepSeek 3.1": lambda c: "<｜tool▁calls▁begin｜>" + each(
        c, "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{given}<｜tool▁call▁end｜>", between="") + "<｜tool▁calls▁end｜>",
    "DeepSeek 3.2": lambda c: "<｜DSML｜function_calls>\n" + tags(
        c, '<｜DSML｜invoke name="{name}">\n{parameters}\n</｜DSML｜invoke>',
        '<｜DSML｜parameter name="{key}" string="true">{value}</｜DSML｜parameter>') + "\n</｜DSML｜function_calls>",
    "Kimi": lambda c: "<|tool_calls_section_begin|>" + each(
        c, "<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>{given}<|tool_call_end|>", between=""
    ) + "<|tool_calls_section_end|>",
    "gpt-oss": lambda c: "<|channel|>analysis<|message|>Hm.<|end|>" + each(
        c, "<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{given}<|call|>"),
    "FunctionGemma": lambda c: each(
        c, "<start_function_call>call:{name}{given}<end_function_call>", lambda v: gemma(v, "<escape>")),
    "Gemma 4": lambda c: each(c, "<|tool_call>call:{name}{given}<tool_call|>", lambda v: gemma(v, '<|"|>'), ""),
    "Command": lambda c: "<|START_ACTION|>[" + ", ".join(
        json.dumps({"tool_call_id": "0", "tool_name": name, "parameters": given}) for name, given in c
    ) + "]<|END_ACTION|>",
    "Apertus": lambda c: f"<|tools_prefix|>{json.dumps([{name: given} for name, given in c])}<|tools_suffix|>",
    "Phi-4-mini": lambda c: f"functools[{', '.join(as_json(c))}]",
    "Granite 3": lambda c: f"<|tool_call|>[{', '.join(as_json(c))}]",
    "Jamba, Hunyuan": lambda c: f"<tool_calls>[{', '.join(as_json(c))}]</tool_calls>",
    "InternLM": lambda c: "".join(
        f"<|action_start|><|plugin|>\n{call}<|action_end|>" for call in as_json(c, "parameters")),
    "Action, Action Input": lambda c: each(c, "Thought: I call it.\nAction: {name}\nAction Input: {given}"),
    "Qwen-Agent": lambda c: each(c, "✿FUNCTION✿: {name}\n✿ARGS✿: {given}"),
}  # fmt: skip


# ── what is wrong ──


def mutants(calls: Calls, label: str) -> Iterator[Calls]:
    """Wrong answers: without a needed argument, with another value, another name, a call more or less."""
    wanted = [next(iter(call.items()))[1] for call in json.loads(label)]
    for i, (name, given) in enumerate(calls):
        for key in given:
            if "" not in wanted[i][key]:
                yield [*calls[:i], (name, {k: v for k, v in given.items() if k != key}), *calls[i + 1 :]]
            yield [*calls[:i], (name, given | {key: "no such value 7"}), *calls[i + 1 :]]
        yield [*calls[:i], (f"{name}_x", given), *calls[i + 1 :]]
        yield [*calls[:i], (name, given | {"no_such_argument": 1}), *calls[i + 1 :]]
    yield [*calls, calls[-1]]
    yield calls[:-1]


def main(folder: Path) -> None:
    rows = [(label, right_calls(label)) for label in answers(folder)]
    judge = tools.make()
    judge(["Q"], ["Q"], [rows[0][0]])  # imports
    rewarded = 0
    longest = 0.0
    wrong = 0

    def reward(form: Callable[[Calls], str], calls: Calls, label: str) -> float:
        nonlocal longest
        began = time.perf_counter()
        found = judge([f"Q{form(calls)}"], ["Q"], [label])["rewards"].item()
        longest = max(longest, time.perf_counter() - began)
        return found

    for name, form in FORMS.items():
        right = [reward(form, calls, label) for label, calls in rows]
        wrong_calls = [(label, m) for label, calls in rows[::10] for m in mutants(calls, label)]
        rewarded += sum(reward(form, calls, label) > 0 for label, calls in wrong_calls)
        wrong += len(wrong_calls)
        print(f"{name:34} {100 * sum(right) / len(right):6.2f}%  {sum(right):.0f} of {len(right)}", flush=True)
    print(f"wrong calls that got a reward: {rewarded} of {wrong}; longest judgement {1000 * longest:.1f} ms")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
