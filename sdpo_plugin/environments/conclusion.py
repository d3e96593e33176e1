"""Where a response gives its final answer: its last boxes, its last tag, or the last words that announce one.

Every search goes once over the text: a model may repeat a character 30,000 times.
"""

from __future__ import annotations

import re

from sdpo_plugin.distillation.thinking import visible

TAIL = 20_000  # characters that are read; a final answer stands at the end
TOKEN = re.compile(r"\\(?:boxed|fbox)\s{0,9}(?:\{|(?P<bare>[^\s{]))|\\.|[{}]", re.DOTALL)
BETWEEN = re.compile(r"(?:[\s$,;.*()\[\]\\]|and|or|[A-Za-z]\s?=|[\u548c\u6216\u3001]){0,20}")  # of one answer's boxes
TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
ANNOUNCED = re.compile(
    r"####|\banswers?\b[\s*_:]{0,9}(?:to (?:the|this) (?:question|problem))?\s{0,9}"
    r"(?:\b(?:is|are|would be|must be)\b|[:=])|\u7b54\u6848?\s{0,9}[\u662f\u4e3a:\uff1a]",
    re.IGNORECASE,
)


def end_of(response: str) -> str:
    """The part that is read: without thoughts, and no more than the last `TAIL` characters."""
    return visible(response)[-TAIL:]


def boxes(text: str) -> list[str]:
    """What stands in the last `\\boxed{...}`, and in those right before it: `$\\boxed{5}$ and $\\boxed{10}$`."""
    found: list[tuple[int, int, str]] = []  # start, end, content
    opened: list[tuple[int, int, bool]] = []  # braces: start of the token, of the content, whether it is a box's
    for token in TOKEN.finditer(text):
        if token[0] == "}":
            if opened:
                start, inside, is_box = opened.pop()
                content = text[inside : token.start()].strip()
                if is_box and content and not (found and found[-1][0] > start):  # a box in a box counts itself
                    found.append((start, token.end(), content))
        elif token["bare"]:
            found.append((token.start(), token.end(), token["bare"]))
        elif token[0][-1] == "{" and token[0] != "\\{":
            opened.append((token.start(), token.end(), token[0] != "{"))
    last: list[str] = []
    until = None
    for start, end, content in reversed(found):
        if until is not None and not BETWEEN.fullmatch(text, end, until):
            break
        if content not in last:
            last.insert(0, content)
        until = start
    return last


def tagged(text: str) -> str | None:
    """What stands in the last `<answer>...</answer>`, or after an `<answer>` that was not closed."""
    tags = list(TAG.finditer(text))
    for i in reversed(range(len(tags))):
        if not tags[i][1]:
            end = tags[i + 1].start() if i + 1 < len(tags) else len(text)
            return text[tags[i].end() : end].strip() or None
    return None


def announced(text: str) -> str | None:
    """The line after the last "the answer is", "Answer:" or `####`; the next line that has text if it ends there."""
    last = None
    for last in ANNOUNCED.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    lines = text[last.end() :].lstrip(" :*_\n\t").splitlines()
    return lines[0].strip() if lines and lines[0].strip() else None


def last_line(text: str) -> str:
    """The last line that has text, or ""."""
    return text.rstrip().rpartition("\n")[2].strip()
