"""Reports of maths as people write them, and whether two are equal; `math-verify` reads and compares single ones."""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from itertools import accumulate, product
from typing import Any

from sdpo_plugin.environments.conclusion import boxes

LONGEST = 2_000  # characters of an answer; longer ones are wrong
PARSED, DEEPEST = 400, 25  # characters and nested brackets of what a parser reads; the rest is compared as text
WORDS = 12  # of a label; more are an explanation, which no response repeats
MOST = 64  # answers in one

SIGNS = str.maketrans({
    **{sign: f"^{n}" for n, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}, "°": "^{\\circ}", "−": "-", "–": "-", "⁄": "/", "、": ",",
    "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∞": "\\infty ", "~": " ",
    "±": "\\pm ", "·": "\\cdot ", "∅": "\\emptyset ", "π": "\\pi ",
})  # fmt: skip
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp lim max min sqrt gcd lcm mod sup inf".split()
)
NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
VALUE = re.compile(rf"{NUMBER}(?:\s?[/:]\s?\d+)?(?:\s?(?:\\?%|percent\b))?")
TEXT = r"\\(?:text|mathrm|mbox|textbf|textit|mathbf|textrm|operatorname)\s?\{([^{}]*)\}"
IN_TEXT = re.compile(TEXT)
LETTER = re.compile(r"\\(?:mathrm|text)\s?\{\s?([eid])\s?\}")
DEGREES = re.compile(r"\s?\^\s?(?:\{\s?\\circ\s?\}|\\circ)(?:\s?[CF]\b)?")
BEFORE = re.compile(r"(?:US|USD|EUR|Rs\.?|[€£¥₹])\s?(?=\d)")
UNITS = (  # what is left out after a value
    re.compile(rf"(?<=[\w)}}%.])(?:\s|/|\\cdot)*{TEXT}(?:\s|/|\\cdot|\^\{{?-?\d\}}?|{TEXT})*$"),
    re.compile(r"(?<=[\w)}%.])\s+\(?[A-Za-z]{2}[A-Za-z ./'-]*\)?(?:\^?\d)?$"),
    re.compile(rf"(?<=^)({NUMBER})(?:\s[msghJVWNLKAFC]|\s?(?:[cdkmnμ]m|[km]g|m[lL]|cc|km/h|m/s|Hz|mph|ft|lbs?))(?:\^?\d)?$"),
)
GROUPS = re.compile(r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,]*\d|\s?[)\]}])")
POWER = re.compile(r"(\d\.?)[eE]([-+]?\d{1,4})\b")
REPEATING = re.compile(r"(?<![\d.])(\d{0,9})\.(\d{0,9})\\(?:overline|bar|dot)\s?\{(\d{1,9})\}")
CONDITION = re.compile(r"\\\{\s?\w\s?(?:\\in\s?(?:\\mathbb\s?\{?R\}?|R)\s?)?(?:\\mid|[|:])(.*)\\\}")
BASE = re.compile(r"\w+_\{?(\d+)\}?")
FRACTION = re.compile(r"^([-+]?)\\frac\{(\d+)\}\{(\d+)\}")
RATIONAL = re.compile(r"([-+]?\d{1,40}(?:\.\d{1,40}|/\d{1,40})?)(\\?%)?")
SEPARATOR = re.compile(
    r"(?P<word>\\text\s?\{\s?,?\s?(?:and|or)\s?\}|\b(?:and|or)\b|[和或])|\\(?P<part>begin|end)\b|\\[A-Za-z]+|\\.|[()\[\]{},;]"
)
MATHS = re.compile(r"(?<!\\)\$\$?(?!\s)([^$]+?)(?<![\s\\])\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]")
LINK = re.compile(r"\s*(?:,|and|or|, and|;|和)\s*")


# ── texts ──


def text_of(label: Any) -> str:
    """The right answer of a label: text, a number, or a list with one of them.

    Raises:
        ValueError: it is none.
    """
    if isinstance(label, (list, tuple)) and len(label) == 1:
        (label,) = label
    if isinstance(label, (int, float)) and not isinstance(label, bool) and math.isfinite(label):
        number = Decimal(repr(label))
        return f"{number.to_integral_value() if number == number.to_integral_value() else number:f}"
    if not isinstance(label, str):
        raise ValueError(f"a label must be an answer, text or a number, not {label!r:.80}")
    text = label.rpartition("####")[2].strip()
    text = ", ".join(boxes(text)) or text
    if not 0 < len(cleaned(text)) <= LONGEST:
        raise ValueError(f"a label must be an answer of 1 to {LONGEST} characters, not {label!r:.80}")
    return text


def check(text: str) -> None:
    """Raises ValueError for a label that is an explanation."""
    if len(words := _words(cleaned(text))) > WORDS:
        raise ValueError(f"a label must be an answer that can be compared; it has {len(words)} words: {text!r:.80}")


def cleaned(text: str) -> str:
    """Without what does not change an answer: delimiters, spaces of LaTeX, currency, degrees, the full stop."""
    text = re.sub(r"[\s\x00-\x1f\x7f\u200b-\u200f]+", " ", unicodedata.normalize("NFKC", text.translate(SIGNS)))
    text = re.sub(r"(?<=\d)\s?(?:,\s?)?(?:\\[!,]|\{,\})\s?(?=\d{3})", ",", text)
    text = re.sub(r"(?<!\\)\\[()\[\]!,;: ]|\\?\$|\\q?quad\b", " ", text)
    text = re.sub(r"\\(?:displaystyle|left|right|[bB]igg?[lr]?)(?![A-Za-z])", " ", text)
    text = LETTER.sub(r"\1", DEGREES.sub("", BEFORE.sub("", text)))
    text = REPEATING.sub(_fraction, re.sub(r"(?<=\d)\.(?=[/*)}^+-])", "", text))
    text = POWER.sub(r"\1 \\times 10^{\2}", text)
    text = re.sub(r"√\s?(\d+|\([^()]*\)|[A-Za-z])", r"\\sqrt{\1}", re.sub(r" {2,}", " ", text))
    text = re.sub(r"\s?(?:percent|per cent|percentage)\b", "\\\\%", text)
    text = re.sub(r"^[ =]*(?:\\approx\b|\\sim\b|≈|about\b|approximately\b)", "", text)
    text = re.sub(r"^\s?\\text\s?\{([^{}]*\d[^{}]*)\}\s?$", r"\1", text)
    return text.lstrip(" ,;:*_`\"").rstrip(" .,;:*_`\\\"\u3002")


def _fraction(repeating: re.Match[str]) -> str:
    """0.1\\overline{6} as \\frac{15}{90}."""
    whole, fixed, again = repeating.groups()
    numerator = int(whole + fixed + again) - int(whole + fixed or 0)
    return f"\\frac{{{numerator}}}{{{10 ** len(fixed + again) - 10 ** len(fixed)}}}"


def _words(text: str) -> list[str]:
    """Words of three letters and more that are no functions or commands."""
    text = re.sub(r"\\(?:begin|end)\s?\{\w+\*?\}|\\[A-Za-z]+", " ", IN_TEXT.sub(r" \1 ", text))
    return [word for word in re.findall(r"[^\W\d_]{3,}", text) if word not in FUNCTIONS and word != "and"]


def _is_text(text: str) -> bool:
    """Whether an answer is words and nothing else, which are compared as such: as a product, `listen` is `silent`."""
    return bool(_words(text)) and not re.search(r"[\d=^+<>|\\]", IN_TEXT.sub(r"\1", text))


def in_words(text: str, last: bool = False) -> str | None:
    """The answer in a line of words: its formula, its first value, or its words.

    Args:
        last: the line announces no answer, so the last formula or value counts, and words do not.
    """
    text = re.sub(r"\*\*|__|`", "", text[-LONGEST:] if last else text[:LONGEST]).strip(" *_")
    if found := list(MATHS.finditer(text)):
        return _linked(text, found, last)
    sentences = [part.strip() for part in re.split(r"(?<=[^\s\\])[.!](?:\s|$)|\u3002", text) if part.strip()] or [""]
    text = sentences[-1 if last else 0]
    if text and (_is_text(text) and not last or not _words(text)):
        return text
    values = list(VALUE.finditer(text))
    formula = re.split(r"\\(?:text|mbox|mathrm)\b|(?<![\\A-Za-z{])[A-Za-z]{3,}", text, maxsplit=1)[0].strip(" ,")
    if not last and "\\" in formula:
        return formula
    if values:
        return values[-1 if last else 0][0]
    return None if last else text or None


def _linked(text: str, found: list[re.Match[str]], last: bool) -> str:
    """The first or last formula of a line, with those that a comma or "and" links to it."""
    runs = [[found[0]]]
    for before, match in zip(found, found[1:], strict=False):
        if LINK.fullmatch(text, before.end(), match.start()):
            runs[-1].append(match)
        else:
            runs.append([match])
    run = runs[-1 if last else 0]
    percent = "\\%" if re.match(r"\s?(?:\\?%|percent)", text[run[-1].end() :]) else ""
    return ", ".join(next(filter(None, match.groups())) for match in run) + percent


# ── values ──


def equal(right: str, found: str) -> bool:
    """Whether an answer that was found is the right one."""
    if len(found) > LONGEST:
        return False
    return _equal(cleaned(right), cleaned(found))


def _equal(right: str, found: str) -> bool:
    if _key(right) == _key(found) != "":
        return True
    if _is_text(right) or _is_text(found):
        return False
    if len(ordered := _parts(right, ";")) > 1:
        parts = _parts(found, ";")
        parts = parts if len(parts) == len(ordered) else _parts(found)
        return len(parts) == len(ordered) and all(map(_equal, ordered, parts))
    readings = list(product(_readings(right), _readings(found)))
    return _any_order(right, found) or any(_same(a, b) for a, b in readings)


def _key(text: str) -> str:
    """Equal for texts that differ in spaces only and, in words, in case and punctuation."""
    if _is_text(text):
        return re.sub(r"[\W_]+", "", IN_TEXT.sub(r" \1 ", text)).casefold()
    text = re.sub(r"\\[dt]frac\b", r"\\frac", re.sub(r"\\mid\b", "|", re.sub(r"\\(le|ge|ne)q\b", r"\\\1", text)))
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", IN_TEXT.sub(r"\1", text))


def canonical(text: str) -> str:
    """A text that is the same for answers that differ in notation only, as 0.50, \\frac{1}{2} and 1/2 do.

    Much less than `equal` compares, and in linear time: answers of a model are counted by it.
    """
    text = cleaned(text) if len(text) <= LONGEST else ""
    if len(ordered := _parts(text, ";")) > 1:
        return ";".join(map(_canonical, ordered))
    return ",".join(sorted(map(_canonical, _parts(GROUPS.sub(lambda match: match[0].replace(",", ""), text)))))


def _canonical(text: str) -> str:
    key = _key((_readings(text) or [text])[0])
    if not (number := RATIONAL.fullmatch(FRACTION.sub(r"\1\2/\3", key))):
        return key
    try:
        return str(Fraction(number[1]) / (100 if number[2] else 1))
    except (ValueError, ZeroDivisionError):
        return key


def _any_order(right: str, found: str) -> bool:
    wanted, left = _parts(right), _parts(found)
    if not 1 < len(wanted) == len(left) <= MOST:
        return False
    for text in wanted:
        at = next((i for i, other in enumerate(left) if _equal(text, other)), None)
        if at is None:
            return False
        del left[at]
    return True


def _parts(text: str, separators: str = ",;") -> list[str]:
    """The answers in a text: what separators outside of brackets divide. The words and, or count as `,;`."""
    depth, begin, parts = 0, 0, []
    for token in SEPARATOR.finditer(text):
        opens = token[0] in ("(", "[", "{", "\\{") or token["part"] == "begin"
        closes = token[0] in (")", "]", "}", "\\}") or token["part"] == "end"
        depth += opens - closes
        if depth == 0 and (token[0] in separators or (token["word"] and "," in separators)):
            parts.append(text[begin : token.start()])
            begin = token.end()
    if depth != 0:
        return [text]
    return [part for part in map(cleaned, [*parts, text[begin:]]) if part]


def _readings(text: str) -> list[str]:
    """A text, without its unit, and with 1,234 as one number."""
    units = text
    for unit in UNITS:
        units = unit.sub(lambda match: match[1] if unit is UNITS[2] else "", units)  # noqa: B023
    texts = [units, GROUPS.sub(lambda match: match[0].replace(",", ""), units)]
    if condition := CONDITION.fullmatch(text):
        texts.append(condition[1])  # {x | x > 2}
    if not _words(text):
        texts.append(text)  # what looks like a unit may be a variable
    return list(dict.fromkeys(filter(None, texts)))


def _same(right: str, found: str) -> bool:
    """Whether two texts are of equal value."""
    from math_verify import verify

    base, other = BASE.fullmatch(right), BASE.fullmatch(found)
    if base and other and base[1] != other[1]:
        return False
    if not _readable(right) or not _readable(found):
        return False
    a, b = _parsed(right), _parsed(found)
    if not a or not b or not verify(a, b, allow_set_relation_comp=True, timeout_seconds=None):
        return False
    return "%" in right + found or _near(a[0], b[0])


def _readable(text: str) -> bool:
    """Whether a parser gets through a text: its time grows faster than length and depth."""
    depths = accumulate((c in "([{") - (c in ")]}") for c in text)
    return len(text) <= PARSED and max(depths, default=0) <= DEEPEST


def _parsed(text: str) -> list[Any]:
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # Units were left out before: here, the `ab` of 3ab and the `t` of 2t would be units.
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    config = LatexExtractionConfig(normalization_config=rules)
    return parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None)


def _near(a: Any, b: Any) -> bool:
    """Whether numbers are equal to five digits. Math-Verify rounds to six decimals: 3e-10 and 2e-10 would be equal."""
    try:
        a, b = complex(a), complex(b)
    except (TypeError, ValueError, OverflowError):
        return True
    return abs(a - b) <= 1e-5 * max(abs(a), abs(b))
