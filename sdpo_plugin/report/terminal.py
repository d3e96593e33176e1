"""The samples of a step in the terminal, token by token; without colors the difference follows the token."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sdpo_plugin.config import ConfigError
from sdpo_plugin.report.readable import LEVELS, advantages, disagreement, level, prompt_text, token_text, visible

# By level: the teacher finds a token more likely (blue, bold) or less likely (orange, underlined).
MORE = ("", "on #1e3a5f", "on #1f5796", "bold on #1f6fd0", "bold black on #6cb0ff")
LESS = ("", "underline on #4a2f14", "underline on #7a4310", "underline on #b85c00", "underline black on #ffa64d")
MOST_TOKENS = 500  # of a response
MOST_CHARACTERS = 2_000  # of a text
MOST_ROWS = 5  # of the tokens on which the two differ most


def show(title: str, samples: Sequence[dict[str, Any]], step: int | None, number: int | None) -> None:
    """Print the samples of a step (the last if None), or the one of them with `number`.

    Raises ConfigError where there is none.
    """
    steps = sorted({sample["step"] for sample in samples})
    step = steps[-1] if step is None else step
    chosen = [s for s in samples if s["step"] == step and number in (None, s["sample"])]
    if not chosen:
        there = [str(s["sample"]) for s in samples if s["step"] == step]
        what = f"of step {step} the samples {', '.join(there)}" if there else f"steps {steps[0]} to {steps[-1]}"
        raise ConfigError(f"report: no such sample; recorded are {what}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where a pipe's encoding lacks characters of the samples
    console = Console(highlight=False, markup=False, emoji=False)
    coloured = console.color_system is not None and not console.no_color
    console.print(legend(coloured))
    for sample in chosen:
        console.print(view(title, sample, coloured))


def legend(coloured: bool) -> Text:
    text = Text("log T - log S in nats, ")
    if not coloured:
        return text.append(f"after each token on which the teacher differs by {LEVELS[1]} or more")
    text.append("teacher finds the token less likely ")
    for strength in range(-len(LEVELS), len(LEVELS) + 1):
        bound = LEVELS[abs(strength) - 1] if strength else 0
        text.append(f" {'-' if strength < 0 else '+' if strength else ''}{bound:g} ", style_of(strength)).append(" ")
    return text.append("more likely")


def view(title: str, sample: dict[str, Any], coloured: bool) -> RenderableType:
    """One sample, whatever its texts hold."""
    mean = disagreement(sample)
    facts = [
        title, f"step {sample['step']}, sample {sample['sample']}",
        "no reward" if sample["reward"] is None else f"reward {sample['reward']:g}",
        "no teacher" if mean is None else f"mean |log T - log S| {mean:.2f}",
        "truncated at the length limit" if sample["truncated"] else "",
    ]  # fmt: skip
    parts: list[RenderableType] = [Rule(Text(" · ".join(filter(None, facts))), characters="-")]
    parts += _block("prompt", Text(_bounded(prompt_text(sample["prompt"]))))
    parts += _block("response", response(sample, coloured))
    if sample["feedback"] is not None:
        parts += _block("feedback", Text(_bounded(sample["feedback"])))
    if sample["teacher_prompt"] is not None:
        truncated = visible(", ".join(map(str, sample["truncated_at"])))
        note = f" (truncated to fit: {truncated})" if truncated else ""
        parts += _block("teacher's prompt" + note, teacher_prompt(sample))
    if sample["alternatives"]:
        parts += _block("where they differ most", differences(sample))
    return Group(*parts)


def response(sample: dict[str, Any], coloured: bool) -> Text:
    """The tokens, in colors or with the difference in braces after them."""
    text = Text()
    for piece, advantage in list(zip(sample["tokens"], advantages(sample), strict=True))[:MOST_TOKENS]:
        shown = token_text(piece[:MOST_CHARACTERS])
        if coloured:
            text.append(shown, "dim italic" if advantage is None else style_of(level(advantage)))
        else:
            marked = advantage is not None and abs(advantage) >= LEVELS[1]
            text.append(shown + (f"{{{advantage:+.1f}}}" if marked else ""))
    more = len(sample["tokens"]) - MOST_TOKENS
    return text.append(f"\n… {more:,} more tokens in the page and in the file") if more > 0 else text


def teacher_prompt(sample: dict[str, Any]) -> Text:
    """The teacher's prompt, with a sign where a part of a section is missing."""
    read, text, start = sample["teacher_prompt"], Text(), 0
    for at, name in sorted((at, str(name)) for name, places in sample["truncated_at"].items() for at in places):
        if at <= MOST_CHARACTERS:
            text.append(visible(read[start:at])).append(f"[... {visible(name)} truncated here ...]", "bold")
            start = at
    return text.append(visible(read[start:MOST_CHARACTERS]) + _more(read))


def differences(sample: dict[str, Any]) -> Table:
    """The tokens on which teacher and student differ most, with the teacher's likeliest in their places."""
    table = Table(box=None, pad_edge=False, header_style="")
    for name in ("at", "token", "student", "teacher", "log T - log S", "the teacher's likeliest"):
        table.add_column(name, justify="left" if name in ("token", "the teacher's likeliest") else "right")
    known = [(i, advantage) for i, advantage in enumerate(advantages(sample)) if advantage is not None]
    for i, advantage in sorted(known, key=lambda one: -abs(one[1]))[:MOST_ROWS]:
        likeliest = "  ".join(f"{_short(piece)} {math.exp(p):.0%}" for piece, p in sample["alternatives"][i])
        shares = (f"{math.exp(log_prob[i]):.1%}" for log_prob in (sample["student"], sample["teacher"]))
        table.add_row(str(i + 1), Text(_short(sample["tokens"][i])), *shares, f"{advantage:+.2f}", Text(likeliest))
    return table


def style_of(strength: int) -> str:
    return MORE[strength] if strength > 0 else LESS[-strength]


def _block(title: str, body: RenderableType) -> list[RenderableType]:
    return [Text(title, "bold"), Padding(body, (0, 0, 1, 2))]


def _bounded(text: str) -> str:
    return visible(text[:MOST_CHARACTERS]) + _more(text)


def _more(text: str) -> str:
    more = len(text) - MOST_CHARACTERS
    return f"\n… {more:,} more characters in the file" if more > 0 else ""


def _short(piece: str) -> str:
    return repr(token_text(piece[:20]).replace("\n", ""))
