"""Tool calls written as Python, `[get_weather(city="Oslo", days=2)]`, read without running anything."""

from __future__ import annotations

import ast
import keyword
import re
from textwrap import dedent
from typing import Any, NamedTuple


class Call(NamedTuple):  # no dataclass: OpenRLHF loads environments without an entry in sys.modules
    name: str
    arguments: dict[str, Any]


def python_calls(text: str) -> list[Call]:
    """Of calls in a list, in a tuple, or one a line; `print(...)` around them does not count.

    Raises:
        ValueError: it is not that, or an argument is not a value that JSON has. RecursionError: it is nested deeply.
    """
    return [call for statement in _statements(dedent(text).strip()) for call in _calls_in_statement(statement)]


# Arguments with the name of a word of Python's own, `from=3`. Strings are matched, too, so that they are left alone.
STRING_OR_WORD = re.compile(
    rf"""'(?:[^'\\\n]|\\.)*'?|"(?:[^"\\\n]|\\.)*"?|\b(?P<word>{"|".join(keyword.kwlist)})(?=\s*=(?!=))"""
)
RENAMED = {f"{word}__word": word for word in keyword.kwlist}


def _statements(source: str) -> list[ast.stmt]:
    renamed = STRING_OR_WORD.sub(lambda found: f"{found[0]}__word" if found["word"] else found[0], source)
    for text in dict.fromkeys((source, f"[{source}]", renamed, f"[{renamed}]")):
        try:
            return ast.parse(text).body
        except SyntaxError:
            pass
        except (ValueError, RecursionError, MemoryError):  # a NUL, a lone surrogate; what is nested deeply
            break
    raise ValueError("It cannot be read.")


def _calls_in_statement(statement: ast.stmt) -> list[Call]:
    match statement:
        case ast.Expr(value=ast.List(elts=parts) | ast.Tuple(elts=parts)):
            return [_call_in_python(part) for part in parts]
        case ast.Expr(value=ast.Call(func=ast.Name(id="print"), args=[_, *_] as parts, keywords=[])):
            return [_call_in_python(part) for part in parts]
        case ast.Expr(value=ast.Call() as call):
            return [_call_in_python(call)]
    raise ValueError("It is not a list of calls.")


def _call_in_python(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        raise ValueError("It is not a list of calls: one element is not a call.")
    name = _dotted(node.func)
    named = {pair.arg: pair.value for pair in node.keywords if pair.arg is not None}  # None: of `**`
    if node.args or len(named) < len(node.keywords):
        raise ValueError(f"{name}: give arguments by name.")
    try:
        return Call(name, {RENAMED.get(argument, argument): _value(value) for argument, value in named.items()})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise ValueError("A function is called by its name.")
    return ".".join([node.id, *reversed(parts)])


def python_value(text: str) -> Any:
    """The value that a text is in Python. Raises ValueError if JSON does not have it, or RecursionError."""
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, MemoryError) as error:
        raise ValueError("It cannot be read.") from error


def _value(node: ast.expr) -> Any:
    """A value that JSON has, too. Raises ValueError for any other expression."""
    match node:
        case ast.Constant(value=None | str() | int() | float() as value):
            return value
        case ast.Name(id="true" | "false" | "null" as name):
            return {"true": True, "false": False, "null": None}[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_value(part) for part in parts]
        case ast.Dict(keys=keys, values=values) if all(_is_text(key) for key in keys):
            return {key.value: _value(value) for key, value in zip(keys, values, strict=True)}  # type: ignore[union-attr]
    raise ValueError("arguments are values, not expressions.")


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
