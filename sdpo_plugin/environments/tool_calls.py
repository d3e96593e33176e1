"""The tool calls of a response, in the forms in which models write them.

A form begins with a mark, such as `<tool_call>`, and text between calls is not read. The tables below were made from
the chat templates and the documentation of the models that they name. Without a mark, the response as a whole or its
last fenced block that can be read is JSON or Python. Thoughts are not read. Every function takes linear time.
"""

from __future__ import annotations

import json
import re
from typing import Any

from sdpo_plugin.distillation.thinking import JUDGED_TAGS, end_of_thought, tag_pattern, visible
from sdpo_plugin.environments import fences
from sdpo_plugin.environments.python_calls import Call, python_calls, python_value
from sdpo_plugin.environments.reading import JSON, after


class Text(str):
    """An argument in a form that does not separate text from other values: `<parameter=days>2</parameter>`."""

    def value(self) -> Any:
        """The text as a JSON or Python value; the text itself if it is neither."""
        try:
            return JSON.decode(self.strip())
        except (ValueError, RecursionError):
            pass
        try:
            return python_value(self)
        except (ValueError, RecursionError):
            return str(self)


# ── the forms ──

# What stands around calls as JSON, as Python, or in tags of their own.
WRAPPERS = {
    "<tool_call>": "</tool_call>",  # Hermes, Qwen 2.5 and 3, Granite 4, ERNIE; with tags in it Qwen3-Coder and GLM
    "<tool_calls>": "</tool_calls>",  # Jamba, Hunyuan
    "<|tool_call|>": "<|/tool_call|>",  # Phi-4, Granite 3
    "<function_call>": "</function_call>",  # Granite 20B
    "<functioncall>": "</functioncall>",  # Glaive
    "<function_calls>": "</function_calls>",  # OLMo 3
    "<TOOLCALL>": "</TOOLCALL>",  # Nemotron
    "<longcat_tool_call>": "</longcat_tool_call>",  # LongCat
    "<|tools_prefix|>": "<|tools_suffix|>",  # Apertus
    "<|tool_call_start|>": "<|tool_call_end|>",  # LFM 2
    "<|python_start|>": "<|python_end|>",  # Llama 4
    "<|START_ACTION|>": "<|END_ACTION|>",  # Command
    "<|action_start|><|plugin|>": "<|action_end|>",  # InternLM
    "```tool_code": "\n```",  # Gemma 3
}
UNCLOSED = r"<\|python_tag\|>|\[TOOL_CALLS\]|\bfunctools(?=\[)"  # Llama 3, Mistral, Phi-4-mini
# A mark, then the name, then the arguments as JSON.
HEADS = {
    r"<\|tool_call_begin\|>": r"\s*(?:functions\.)?([^\s<]{1,200}?)(?::\d+)?\s*<\|tool_call_argument_begin\|>",  # Kimi
    r"<｜tool▁call▁begin｜>": r"\s*(?:function\s*<｜tool▁sep｜>\s*)?([^\s<]{1,200})\s*(?:<｜tool▁sep｜>)?",  # DeepSeek
    r"\bto=functions\.": r"([^\s<]{1,200})[^{}]{0,200}?<\|message\|>",  # gpt-oss
    r"✿FUNCTION✿:": r"([^\n]*)\n\s*✿ARGS✿:",  # Qwen-Agent
    r"^[ \t]*Action:(?=[^\n]*\n\s*Action Input:)": r"([^\n]*)\n\s*Action Input:",  # ReAct
}
MISTRAL = r"([^\s\[\](){}<>,]{1,200})\s*(?:\[CALL_ID\][^\[{]{0,200})?(?:\[ARGS\]\s*)?(?=\{)"  # after [TOOL_CALLS]
# Parameters in tags of their own: Qwen3-Coder, Seed, Nemotron 3; MiniMax, Step, DeepSeek 3.2, Claude; MiniCPM.
TAGGED = (
    r"<function=(?P<function>[^<>\s]{1,200})>|"
    r"<[^\s<>/=\"']{0,20}(?:invoke|function)\s{1,9}name=[\"']?(?P<invoke>[^<>\"']{1,200})[\"']?>"
)
PARAMETERS = (
    re.compile(r"\s*<(?P<tag>parameter)=(?P<key>[^<>]{1,200})>"),
    re.compile(
        r"\s*<(?P<tag>[^\s<>/=\"']{0,20}param(?:eter)?)\s{1,9}name=[\"']?(?P<key>[^<>\"']{1,200})[\"']?[^<>]{0,40}>"
    ),
    re.compile(r"\s*<arg_key>(?P<key>[^<>]{1,200})</arg_key>\s*<(?P<tag>arg_value)>"),  # GLM
)
GLM = re.compile(r"([^\s<>(){}\[\]]{1,200})\s*(?:<tool_sep>\s*)?(?=<arg_key>|</tool_call>|\Z)")  # in <tool_call>
# FunctionGemma and Gemma 4: call:name{key:<escape>text<escape>,other:2}
GEMMA = {"<start_function_call>": "<end_function_call>", "<|tool_call>": "<tool_call|>"}
GEMMA_HEAD = re.compile(r"\s*call:([^\s{]{1,200})\s*(?=\{)")
GEMMA_TEXT = re.compile(r"<escape>|<\|\"\|>")
BARE_KEY = re.compile(r"([{,]\s*)([^\s{}\[\],:\"]+)(?=\s*:)")

FORMS = [
    ("wrapper", "|".join(map(re.escape, WRAPPERS))), ("unclosed", UNCLOSED), ("tagged", TAGGED),
    ("gemma", "|".join(map(re.escape, GEMMA))), *((f"head{i}", mark) for i, mark in enumerate(HEADS)),
]  # fmt: skip
MARK = re.compile("|".join(f"(?P<{name}>{mark})" for name, mark in FORMS), re.MULTILINE)
THOUGHT = tag_pattern(JUDGED_TAGS)
MARK_OR_THOUGHT = re.compile(f"{THOUGHT.pattern}|{MARK.pattern}", re.MULTILINE)
BEHIND = {f"head{i}": re.compile(head) for i, head in enumerate(HEADS.values())} | {"mistral": re.compile(MISTRAL)}
START = re.compile(r"\s*(?:```\w*\s*)?")  # of JSON or Python: models put fences there
LIKE_JSON = re.compile(r"\s*(?:\[\s*)?[{\"\]]")
BETWEEN = re.compile(r"[\s;,]*")

# ── reading ──


def parse(response: str) -> list[Call]:
    """The calls of a response. Raises ValueError, with the reason, or RecursionError if they cannot be read."""
    try:
        return _unmarked(response)
    except (ValueError, RecursionError):
        pass
    calls = _marked(response)
    if calls is not None:
        return calls
    seen = visible(response)
    blocks = fences.texts(seen)
    for text in [seen] * (seen != response) + blocks[::-1]:
        try:
            return _unmarked(text)
        except (ValueError, RecursionError):
            pass
    return _unmarked(blocks[-1] if blocks else seen)


def _marked(text: str) -> list[Call] | None:
    """The calls after marks; None if there is no mark."""
    calls: list[Call] = []
    marked, at = False, 0
    while mark := MARK_OR_THOUGHT.search(text, at):
        if mark["thought"]:
            at = end_of_thought(text, mark, JUDGED_TAGS) or len(text)
        elif mark["thought_end"]:  # all that stands before it was a thought
            marked, at = False, mark.end()
            calls.clear()
        else:
            marked = True
            try:
                found, at = _behind(text, mark)
                calls += found
            except (ValueError, RecursionError):  # in a thought it would not matter
                ends = [tag.end() for tag in THOUGHT.finditer(text, mark.end()) if tag["thought_end"]]
                if not ends:
                    raise
                marked, at = False, ends[-1]
                calls.clear()
    return calls if marked else None


def _behind(text: str, mark: re.Match[str]) -> tuple[list[Call], int]:
    """The calls that a mark begins, and where they end."""
    form, at = mark.lastgroup or "", mark.end()
    if form == "wrapper":
        return _wrapped(text, at, WRAPPERS[mark[0]])
    if form == "unclosed":
        return _wrapped(text, at, "")
    if form == "gemma":
        return _gemma(text, at, GEMMA[mark[0]])
    if form == "tagged":
        return _tagged(text, at, mark["function"] or mark["invoke"])
    if head := BEHIND[form].match(text, at):
        return _headed(text, head)
    raise ValueError(f"There is no name with arguments after {mark[0].strip()}.")


def _wrapped(text: str, at: int, closing: str) -> tuple[list[Call], int]:
    at = after(START, text, at)
    if LIKE_JSON.match(text, at):
        calls, at = _json_calls(text, at)
        _nothing_but(text, at, closing)
        return calls, at
    if MARK.match(text, at) or (closing and text.startswith(closing, at)):
        return [], at
    if head := BEHIND["mistral"].match(text, at):
        return _headed(text, head)
    if head := GLM.match(text, at):
        return _tagged(text, head.end(), head[1])
    end = text.find(closing, at) if closing else -1
    end = len(text) if end < 0 else end
    return python_calls(text[at:end].rstrip("`")), end


def _nothing_but(text: str, at: int, closing: str) -> None:
    """Raises ValueError unless what follows is the closing tag, another mark or nothing."""
    at = after(START, text, at)
    if closing and not (at == len(text) or text.startswith(closing, at) or MARK.match(text, at)):
        raise ValueError(f"A call is followed by {text[at : at + 40]!r}.")


def _unmarked(text: str) -> list[Call]:
    if not LIKE_JSON.match(text):
        return python_calls(text)
    calls, at = _json_calls(text, after(BETWEEN, text, 0))
    if text[at:].strip(" \t\r\n;"):
        raise ValueError(f"A call is followed by {text[at:].strip()[:40]!r}.")
    return calls


# ── JSON ──


def _json_calls(text: str, at: int) -> tuple[list[Call], int]:
    """Of one value, or of several objects one after the other."""
    calls: list[Call] = []
    while True:
        value, at = JSON.raw_decode(text, at)
        calls += calls_in(value)
        following = after(BETWEEN, text, at)
        if not text.startswith("{", following):
            return calls, at
        at = following


NAMES = ("name", "tool_name", "function")
ARGUMENTS = ("arguments", "parameters", "input")
NEUTRAL = {"id", "type", "index", "call_id", "tool_call_id", "status"}
MESSAGE = {"role", "content", "refusal", "annotations", "audio", "reasoning", "reasoning_content"}


def calls_in(value: Any) -> list[Call]:
    """The calls in a JSON value: one, a list of them, or a message that has some.

    Raises:
        ValueError: it is none, or it has a key that no call has.
    """
    if isinstance(value, list):
        return [call for part in value for call in calls_in(part)]
    if not isinstance(value, dict):
        raise ValueError("A call is an object with name and arguments.")
    if "tool_calls" in value:
        _only(value, MESSAGE | NEUTRAL | {"tool_calls"})
        return calls_in(value["tool_calls"] or [])
    for key in ("function", "function_call"):  # OpenAI's, now and before
        if isinstance(value.get(key), dict):
            _only(value, NEUTRAL | {key} | (MESSAGE if key == "function_call" else set()))
            return [_call_in(value[key])]
    return [_call_in(value)]


def _call_in(value: dict[str, Any]) -> Call:
    if len(value) == 1:  # Apertus: {name: arguments}
        ((name, given),) = value.items()
        if isinstance(given, dict) and name not in (*NAMES, *ARGUMENTS):
            return Call(name, given)
    _only(value, {*NAMES, *ARGUMENTS, *NEUTRAL})
    names, given = ([key for key in keys if key in value] for keys in (NAMES, ARGUMENTS))
    if len(names) != 1 or not isinstance(value[names[0]], str):
        raise ValueError("A call is an object with name and arguments.")
    if len(given) > 1:
        raise ValueError(f"A call has {' and '.join(given)}; it takes one of them.")
    return Call(value[names[0]], _arguments(value[given[0]]) if given else {})


def _only(value: dict[str, Any], known: set[str]) -> None:
    if unknown := [key for key in value if key not in known]:
        raise ValueError(f"{json.dumps(unknown[0])} is not a key of a call; the keys are name and arguments.")


def _arguments(value: Any) -> dict[str, Any]:
    """An object; OpenAI writes it as text."""
    if isinstance(value, str) and value.strip():
        value = JSON.decode(value)
    if value is None or value == "":
        return {}
    if not isinstance(value, dict):
        raise ValueError("The arguments of a call are an object.")
    return value


def _headed(text: str, head: re.Match[str]) -> tuple[list[Call], int]:
    """A call whose name was read and whose arguments follow."""
    name = head[1].strip()
    given = "Action Input is" if head[0].endswith("Action Input:") else "arguments are"
    try:
        value, at = JSON.raw_decode(text, after(START, text, head.end()))
    except ValueError as error:
        raise ValueError(f"{name}: its {given} not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: its {given} not an object.")
    return [Call(name, value)], at


# ── tags ──


def _tagged(text: str, at: int, name: str) -> tuple[list[Call], int]:
    """A call whose parameters stand in tags, or together as JSON (Llama 3)."""
    arguments: dict[str, Any] = {}
    if text.startswith("{", start := after(START, text, at)):
        value, at = JSON.raw_decode(text, start)
        arguments = _arguments(value)
    while tag := next((tag for form in PARAMETERS if (tag := form.match(text, at))), None):
        closing = f"</{tag['tag']}>"
        end = text.find(closing, tag.end())
        arguments[tag["key"].strip()] = Text(_without_line_ends(text[tag.end() : end if end >= 0 else len(text)]))
        at = len(text) if end < 0 else end + len(closing)
    _nothing_but(text, at, "</")
    return [Call(name, arguments)], at


def _without_line_ends(value: str) -> str:
    """Without the line ends after the opening and before the closing tag."""
    return value.removeprefix("\r").removeprefix("\n").removesuffix("\n").removesuffix("\r")


def _gemma(text: str, at: int, closing: str) -> tuple[list[Call], int]:
    end = text.find(closing, at)
    end = len(text) if end < 0 else end
    body = text[at:end]
    if not (head := GEMMA_HEAD.match(body)):
        raise ValueError("A call is call:name{argument:value}.")
    parts = GEMMA_TEXT.split(body[head.end() :])  # every other one is text
    as_json = (json.dumps(part) if i % 2 else BARE_KEY.sub(r'\1"\2"', part) for i, part in enumerate(parts))
    return [Call(head[1], _arguments(JSON.raw_decode("".join(as_json))[0]))], end
