"""The fenced blocks of a response: ```` ```python ````, `~~~`, indented in a list, with attributes, closed or not.

Where CommonMark is strict, models are not: a fence may open after words and close after code. What stands in the
quotes or comments of a block does not close it. Every search goes once over the text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# A run of backticks with the rest of its line; or up to the next run, an inline block; or up to brackets, as of JSON.
OPENING = re.compile(
    r"(?<!`)(?P<ticks>`{3,})(?!`)"
    r"(?:(?P<word>(?:[ \t]*(?:\w+[ \t]|json))?[ \t]*)(?=[\[{])|(?P<info>[^`\n]*)(?P<end>`{3,}|\n|\Z))"
    r"|^[ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?(?P<tildes>~{3,})(?P<words>[^\n]*)(?:\n|\Z)",
    re.MULTILINE,
)
# What in a block can hide a fence: strings of Python and JSON, comments. One that is not closed ends with its line.
CONTENT = re.compile(
    r"(?P<ticks>`{3,})"
    r'|(?P<open>"""|\'\'\')'
    r'|"(?:\\[^\n]|[^"\\\n])*"?'
    r"|'(?:\\[^\n]|[^'\\\n])*'?"
    r"|\#[^\n]*"
)
TRIPLE = {quotes: re.compile(rf"(?:\\.|[^\\])*?{quotes}", re.DOTALL) for quotes in ('"""', "'''")}
INFO = re.compile(r"[\s{.]*([\w+#.-]*)(.*)", re.DOTALL)
LINE_END = re.compile(r"[ \t]*(?:\n|\Z)")


class Block(NamedTuple):
    """A fenced block.

    The first word of its info string, in small letters; its content without indentation; and, in brackets on the
    fence's line, attributes or the beginning of the content.
    """

    language: str
    content: str
    begun: str = ""


def blocks(text: str) -> list[Block]:
    """All that have content, in order. One that is not closed ends with the text."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    found: list[Block] = []
    at, quotes = 0, True
    while opening := OPENING.search(text, at):
        info, begun = opening["words"] or opening["info"] or "", ""
        if (opening["end"] or "").startswith("`"):
            start, at = opening.span()
            alone = text[max(0, start - 1) : start] in ("", "\n") and text[at : at + 1] in ("", "\n")
            more = INFO.findall(info)[0][1]
            content = more.strip() if alone and more[:1].isspace() else ""  # from one in a sentence nothing is taken
        else:
            end, at, quotes = _closing(text, opening.end(), opening["tildes"] or opening["ticks"], quotes)
            content = text[opening.end() : end]
            if opening["word"] is not None:
                begun, line_end, content = content.partition("\n")
                info = opening["word"] + begun
                if not line_end:
                    content, begun = begun if LINE_END.match(text, at) else "", ""
            content = _without_indentation(content)
        if content.strip() or begun:
            found.append(Block(INFO.findall(info)[0][0].lower(), content, begun))
    return found


def texts(text: str) -> list[str]:
    """What the blocks may have as JSON or calls, in order: the content, and what begins on the fence's line."""
    both = ((block.content, block.begun and f"{block.begun}\n{block.content}") for block in blocks(text))
    return [found for pair in both for found in pair if found.strip()]


def _closing(text: str, start: int, fence: str, quotes: bool) -> tuple[int, int, bool]:
    """Where the content from `start` ends, where what follows the block begins, and whether quotes can be followed.

    A string that never ends shows that they cannot: the closing fence is then a line of its own, here and from here on.
    """
    at = start
    while quotes and fence[0] == "`":
        token = CONTENT.search(text, at)
        if token is None:
            return len(text), len(text), True
        at = token.end()
        if token["ticks"] and len(token["ticks"]) >= len(fence):
            return token.start(), at, True
        if token["open"]:
            string = TRIPLE[token["open"]].match(text, at)
            quotes, at = string is not None, string.end() if string else at
    line = re.compile(rf"^[ \t]*{fence[0]}{{{len(fence)},}}[ \t]*$", re.MULTILINE).search(text, start)
    return (line.start(), line.end(), quotes) if line else (len(text), len(text), quotes)


def _without_indentation(content: str) -> str:
    """What its first line is indented by, no line is."""
    first = re.search(r"^([ \t]*)\S", content, re.MULTILINE)
    return re.sub(rf"^[ \t]{{0,{len(first[1])}}}", "", content, flags=re.MULTILINE) if first and first[1] else content
