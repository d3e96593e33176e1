"""Multiple choice: `--reward.remote_url .../sdpo_plugin/environments/choice.py`. A label is the right letter.

A label may also have several letters, `AC` or `A, C`, all of which a response must name, or the option's text,
`B. Paris`. A response names its choice as people do: in `\\boxed{B}` or `<answer>B</answer>`, as «the answer is (b)»,
«Option B is correct», «I choose B», or with a last line such as `B` or `B) Paris`. The last one counts. The article «a»
names nothing, nor does "A or B".

| `detail`   | what the feedback has                                           |
| ---------- | ---------------------------------------------------------------- |
| `outcome`  | that the choice is wrong, or that there is none and how to give it |
| `expected` | also the right letter                                            |

The default is `outcome`: with the letter in its context the teacher has nothing to find out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from sdpo_plugin.environments.conclusion import end_of, last_line
from sdpo_plugin.environments.feedback import one_of, reward_function

DETAILS = ("outcome", "expected")

# What stands around letters in formulas and Markdown.
WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|rm|bf|operatorname)\s?\{([^{}]{0,200})\}")
MARKUP = re.compile(r"[*`$\"“”‘’]|\\[()\[\] ,;]|\\(?:left|right|bf)\b|(?<!\w)_+|_+(?!\w)")

# A capital A or I before a word is an article or a pronoun, unless the word is one that follows a choice.
GOES_ON = (
    r"and|or|because|since|as|for|which|based|given|due|is|are|from|in|with|according|but|so|if|here|where|while|not"
)
AFTER = r"(?!\w|[+#'^]|-\w|\s?(?:[=+^>]|<(?![/|])))"
CAPITAL = rf"(?:[B-HJ-Z]|[AI](?!\s+(?!(?:{GOES_ON})\b)[A-Za-z])){AFTER}"
SMALL = (  # an "a" that ends a line may be an article of a truncated sentence
    r"(?:[b-hj-z]|a(?=\s?[).,;:!}\]<])|(?:(?<=[:=])|(?<=[:=]\s)|(?<=ption\s)|(?<=hoice\s))a(?=\s*$))"
    rf"(?!\.\w){AFTER}"
)
ITEM = rf"(?:[(\[{{]\s?[A-Za-z]\s?[)\]}}]|{CAPITAL}\)?)"
LIST = rf"{ITEM}(?:\s?(?:,\s?and\b|,\s?or\b|,|;|&|/|\band\b|\bor\b)\s?{ITEM}){{0,9}}"
RUN = r"[A-Z]{2,9}(?!\w)"
LETTERS = re.compile(rf"(?P<list>{LIST})|(?P<run>{RUN})|(?P<small>{SMALL})", re.MULTILINE)

NOUN = r"(?i:answers?|option|choice|selection|letter)"
IS = r"(?:is|are|was|would be|will be|must be|should be|has to be|[:=–-]|->|=>|→|⇒)"
ANNOUNCED = re.compile(
    rf"(?P<strong>\b{NOUN}\b(?: (?:here|to (?:the|this) (?:question|problem)|among these|of these))?\s?{IS}"
    rf"|\b(?:correct|right|best|final|my) (?:answers|options|choices) {IS}"
    r"|\b(?:final|correct|right|best) (?:answer|option|choice)\s*\n|^\s{0,9}#*\s?answer\s*\n|####"
    r"|\\f?boxed\s?\{|<answer>"
    r"|(?:答案|故选|应选|选择|选)\s?[是为:：]?)"
    r"|\b(?:choose|chose|pick|picked|select|selected|go with|going with|opt for|vote for)\b",
    re.IGNORECASE | re.MULTILINE,
)
SKIPPED = re.compile(
    rf"(?:\s|[:=→]|\b(?:thus|therefore|then|clearly|definitely|most likely|likely|indeed|the|be|to be|{NOUN})\b"
    r"|\\f?boxed\s?\{|<answer>){0,12}",
    re.IGNORECASE,
)
CONFIRMED = re.compile(
    rf"(?:^|[.!?;,:]\s|\b(?:(?i:so|thus|therefore|hence|that|only|options|choices|statements?)|{NOUN})\s)\s?(?:{LIST})"
    r"(?=\s(?:is|are|must be|would be|seems?)\s(?:clearly |therefore |thus |indeed |also |both )?(?:the )?"
    r"(?:only |most )?(?:correct|right|best|true|accurate|appropriate|answer)\b)",
    re.MULTILINE,
)
ALONE = re.compile(
    rf"(?:(?i:so|thus|therefore|hence|it is|it's|it must be|conclusion|{NOUN})\b[,:\s]*){{0,4}}"
    rf"(?P<letters>{LIST}|{RUN}|[a-z](?!\w))(?P<rest>\s?[.!)]?|(?:\s?[.):–—-]|(?<=[)\]]))\s.*)",
)
REST = re.compile(r"\s*\Z|\s?[).:}\]]|\s[-–—]\s|(?<=[)\]])")  # after the letters of a label
OPTION = re.compile(r"[-\s]*\(?[A-Z][).:]\s")


def make(detail: str = "outcome", budget: int = 300) -> Callable[..., dict[str, Any]]:
    """A reward function: 1 for the right letter or letters, else 0."""
    one_of(detail, DETAILS)

    def judge(response: str, label: Any) -> tuple[float, str | None]:
        right, chosen = letters_of(label), choice(response)
        if chosen == right:
            return 1.0, None
        wrong = f"The choice {chosen} is wrong." if chosen else (
            "The response makes no choice: end it with \\boxed{} and a letter in it."
        )  # fmt: skip
        return 0.0, wrong + f" Right is {right}." * (detail == "expected")

    return reward_function(judge, budget, "choice", detail=detail)


def check_label(label: Any) -> None:
    """Raises ValueError, with the reason, for a label that names no option by its letter."""
    letters_of(label)


def letters_of(label: Any) -> str:
    """The letters of a label, sorted. Raises ValueError if it names no option by its letter."""
    text = ", ".join(map(str, label)) if isinstance(label, (list, tuple)) else label
    if isinstance(text, str):
        text = ANNOUNCED.sub("", _plain(text.rpartition("####")[2])).strip(" ()[]{}.\n")
        if re.fullmatch("[A-Za-z]", text):
            return text.upper()
        at = SKIPPED.match(text).end()  # type: ignore[union-attr]
        letters = LETTERS.match(text, at)
        if letters and REST.match(text, letters.end()) and (found := _sorted(letters[0], ordered=False)):
            return found
    raise ValueError(f"a label must be the letter of an option, such as B, or letters, not {label!r:.80}")


def choice(response: str) -> str | None:
    """The letter or, sorted, the letters that a response ends with; None if it makes no choice."""
    text = _plain(end_of(response))
    found = max([*_announced(text), *_confirmed(text), *_alone(text)], default=(0, ""))
    return found[1] or None


def _plain(text: str) -> str:
    """Without what marks letters in LaTeX and Markdown."""
    for _ in range(3):
        text = WRAPPED.sub(r"\1", text)
    return MARKUP.sub("", text)


def _announced(text: str) -> Iterator[tuple[int, str]]:
    for match in ANNOUNCED.finditer(text):
        at = SKIPPED.match(text, match.end()).end()  # type: ignore[union-attr]
        letters = LETTERS.match(text, at)
        if letters and (match["strong"] or not letters["small"]):
            yield at, _sorted(letters[0])


def _confirmed(text: str) -> Iterator[tuple[int, str]]:
    """A match of the form: Option B is correct."""
    for match in CONFIRMED.finditer(text):
        letters = re.search(rf"(?:{LIST})\Z", match[0])
        if letters:
            yield match.start() + letters.start(), _sorted(letters[0])


def _alone(text: str) -> Iterator[tuple[int, str]]:
    """A last line that is a letter, or an option with its text that is not the end of a list of options."""
    line = last_line(text).strip(" \t#>-•.")
    match = ALONE.fullmatch(line)
    before = text.rstrip().rpartition("\n")[0].rstrip().rpartition("\n")[2]
    article = match and match["letters"] == "a" and not re.fullmatch(r"(?:.*(?i:option|choice)\s)?a\W*", line)
    if match and not article and not (len(match["rest"].strip()) > 1 and OPTION.match(before)):
        yield len(text.rstrip()) - len(line), _sorted(match["letters"])


def _sorted(letters: str, ordered: bool = True) -> str:
    """The letters that are named; "" for a choice left open (A or B) and for a word. ordered: ACE, but no DNA."""
    if re.search(r"\bor\b|/", letters):
        return ""
    found = re.findall(r"[A-Za-z]", re.sub(r"\band\b", " ", letters).upper())
    if re.fullmatch(RUN, letters) and (found != sorted(set(found)) if ordered else len(set(found)) < len(found)):
        return ""
    return "".join(sorted(set(found)))


reward_func = make()
