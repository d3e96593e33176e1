"""A teacher's prompt as token ids, in which untrusted sections cannot become chat mark-up."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from sdpo_plugin.config import ConfigError, RepromptConfig
from sdpo_plugin.distillation.context import TeacherContext
from sdpo_plugin.distillation.prompts import (
    ids_without_markup,
    markup,
    not_printed,
    rendered,
    text_tokenizer,
    user_text,
    whole_characters,
)
from sdpo_plugin.distillation.template import SECTIONS, fill

# Only so much of the sections is tokenized at all: a megabyte of log output must not stall the controller. Text has
# about 4 characters per token, indented code and tables up to 10; beyond 16 the limit may truncate more than needed.
MAX_CHARS_PER_TOKEN = 16
TEXTS_AT_ONCE = 64  # that are tokenized together: more take memory, and have no more threads
# Where a teacher's prompt is truncated: by section, the positions in its token ids before which a part of the section
# is missing. There is none where nothing is left of it.
TruncationOffsets = dict[str, list[int]]


def teacher_prompt_ids(
    context: TeacherContext,
    tokenizer: Any,
    config: RepromptConfig,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], TruncationOffsets]:
    """`TeacherPrompts.ids` of one context."""
    return TeacherPrompts(tokenizer, config, chat_template_kwargs).ids(context)


class TeacherPrompts:
    """Teachers' prompts as token ids, to be followed by the response. Of equal contexts one is tokenized.

    Send these ids to an engine, not their text: as text, a section could become mark-up again.

    Args:
        tokenizer: a Hugging Face tokenizer or processor.
        chat_template_kwargs: what the teacher's prompts are rendered with (`tools`, `enable_thinking`, ...).
    """

    def __init__(
        self, tokenizer: Any, config: RepromptConfig, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer, self.config, self.chat = text_tokenizer(tokenizer), config, chat_template_kwargs
        self.special, self.pattern = markup(self.tokenizer)
        self._frames: dict[Hashable, _Frames] = {}
        self._whole: dict[str, tuple[list[int], list[int]]] = {}  # by text: its ids, and those of mark-up among them
        self._sections: dict[str, list[int]] = {}  # by text

    def prepare(self, contexts: Iterable[TeacherContext]) -> None:
        """Tokenize these together, so that the tokenizer uses a thread for each core; `ids` finds them done."""
        waiting = (context for context in contexts if context.prompt is not None and self._is_bounded(context))
        texts = list(dict.fromkeys(self._text(context) for context in waiting))
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            self._tokenize(texts[start : start + TEXTS_AT_ONCE])

    def ids(self, context: TeacherContext, max_len: int | None = None) -> tuple[list[int], TruncationOffsets]:
        """The teacher's prompt, in at most `max_len` tokens (`config.max_len`), and where it is truncated.

        An inactive context gives the student's ids. An active one gives the ids of the plain rendering, unless a
        section would change the mark-up or the prompt must be truncated. Then sections are tokenized on their own:
        tokens do not merge across their borders (SentencePiece may insert a space there). They are truncated together,
        at `config.truncation`; a section of which nothing is left is dropped with its frame. Everything else is kept,
        even if it alone is longer than `max_len`. Where a chat template strips the user turn, a section at its very
        border keeps its white space. The list belongs to all equal contexts.

        Raises:
            ConfigError: chat messages and a tokenizer without a chat template, or with one that rejects them or does
                not print the sections; a prompt that is too long where `config.truncation` is `error`.
        """
        max_len = self.config.max_len if max_len is None else max_len
        if context.prompt is None:
            return self._tokenized(rendered(context.messages, self.tokenizer, self.chat))[0], {}
        frames = self._framed(context)
        if self._is_bounded(context, max_len):
            plain, structure = self._tokenized(self._text(context))
            if len(plain) <= max_len and structure == frames.structure:
                return plain, {}
        shown, gaps = self._section_ids([_utf8(context.sections[name]) for name in frames.order], max_len)
        ids = _interleave(frames.ids, shown)
        if len(ids) <= max_len:
            return ids, _offsets(frames.order, gaps, frames.ids, shown)
        if self.config.truncation == "error":
            raise _too_long(len(ids), max_len, zip(frames.order, shown, strict=True))
        budget = max(max_len - sum(map(len, frames.ids)), 0)
        kept, gaps = _truncated(shown, gaps, budget, self.config.truncation, self.tokenizer)
        left = {name: context.sections[name] for name, part in zip(frames.order, kept, strict=True) if part}
        if len(left) < len(context.sections):
            ids, offsets = self.ids(replace(context, sections=left), max_len)
            kept_or_gone = (name for name in frames.order if name in offsets or name not in left)
            return ids, {name: offsets.get(name, []) for name in kept_or_gone}
        return _interleave(frames.ids, kept), _offsets(frames.order, gaps, frames.ids, kept)

    def _is_bounded(self, context: TeacherContext, max_len: int | None = None) -> bool:
        """Whether the sections are short enough to be tokenized whole."""
        longest = (self.config.max_len if max_len is None else max_len) * MAX_CHARS_PER_TOKEN
        return self.config.truncation == "error" or sum(map(len, context.sections.values())) <= longest

    def _framed(self, context: TeacherContext) -> _Frames:
        key = repr(context.prompt), frozenset(context.sections)
        if key not in self._frames:
            texts, order = _frames(context, self.tokenizer, self.config, self.chat)
            ids = self._encode(texts)
            structure = [i for frame in ids for i in frame if i in self.special]
            self._frames[key] = _Frames(texts, order, ids, structure)
        return self._frames[key]

    def _text(self, context: TeacherContext) -> str:
        frames = self._framed(context)
        return "".join(_alternate(frames.texts, [_utf8(context.sections[name]) for name in frames.order]))

    def _tokenized(self, text: str) -> tuple[list[int], list[int]]:
        self._tokenize([text])
        return self._whole[text]

    def _tokenize(self, texts: Sequence[str]) -> None:
        new = [text for text in texts if text not in self._whole]
        for text, ids in zip(new, self._encode(new), strict=True):
            self._whole[text] = ids, [i for i in ids if i in self.special]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _section_ids(self, texts: Sequence[str], max_len: int) -> tuple[list[list[int]], list[list[int]]]:
        """The token ids of each section, of very long ones without a part, and the positions of these gaps."""
        bounded = [(text, "") for text in texts]
        if self.config.truncation != "error":
            bounded = _cut(texts, max_len * MAX_CHARS_PER_TOKEN, self.config.truncation)
        for end in {end for both in bounded for end in both} - self._sections.keys():
            self._sections[end] = ids_without_markup(end, self._encode, self.special, self.pattern)
        ends = [[self._sections[end] for end in both] for both in bounded]
        whole = [before + after == text for (before, after), text in zip(bounded, texts, strict=True)]
        gaps = [[] if its else [len(before)] for its, (before, _) in zip(whole, ends, strict=True)]
        return [before + after for before, after in ends], gaps


class _Frames(NamedTuple):
    """What stands before, between and after the sections.

    Attributes:
        texts, ids: of each frame, one more than there are sections.
        order: the sections' names.
        structure: the mark-up tokens of all frames.
    """

    texts: list[str]
    order: list[str]
    ids: list[list[int]]
    structure: list[int]


def _utf8(text: str) -> str:
    """Environments hand over what they read: half of a surrogate pair has no UTF-8 form, and tokenizers raise on it."""
    return text.encode("utf-8", "replace").decode()


def truncated_section(
    ids: list[int], room: int, config: RepromptConfig, tokenizer: Any, name: str
) -> tuple[list[int], list[int]]:
    """The tokens of a prompt's one section that fit into `room`, and the positions before which some are missing."""
    if len(ids) <= room:
        return ids, []
    if config.truncation == "error":
        raise _too_long(config.max_len + len(ids) - room, config.max_len, [(name, ids)])
    (kept,), (gaps,) = _truncated([ids], [[]], room, config.truncation, tokenizer)
    return kept, gaps


def _too_long(length: int, max_len: int, sections: Iterable[tuple[str, list[int]]]) -> ConfigError:
    parts = ", ".join(f"{name} {len(ids)}" for name, ids in sections)
    return ConfigError(
        f"--reprompt.truncation error: a teacher's prompt of {length} tokens ({parts}) is longer than the "
        f"{max_len} of --reprompt.max_len, or that its response leaves of the model's positions; give a "
        f"--reprompt.max_len of at least {length}, shorter responses, or --reprompt.truncation right"
    )


def _frames(
    context: TeacherContext, tokenizer: Any, config: RepromptConfig, chat_template_kwargs: Mapping[str, Any] | None
) -> tuple[list[str], list[str]]:
    """The rendered text before, between and after the sections, and their names in the order in which they appear.

    Sentinels stand for the sections while the chat template runs, so that it can neither read nor change them.
    """
    assert context.prompt is not None
    bare = rendered(fill(context.prompt, {}, config), tokenizer, chat_template_kwargs)
    names = dict(zip((c for c in map(chr, range(0xE000, 0xF900)) if c not in bare), SECTIONS, strict=False))
    sentinels = {name: sentinel for sentinel, name in names.items() if name in context.sections}
    filled = fill(context.prompt, sentinels, config)
    pieces = re.split(f"([{''.join(names)}])", rendered(filled, tokenizer, chat_template_kwargs))
    order = [names[sentinel] for sentinel in pieces[1::2]]
    for name, sentinel in sentinels.items():
        if sentinel in user_text(filled) and name not in order:
            raise not_printed(f"the {name} section in the last turn", tokenizer)
    return pieces[0::2], order


def _truncated(
    shown: Sequence[list[int]], gaps: Sequence[list[int]], budget: int, side: str, tokenizer: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """The sections with at most `budget` tokens together, none of which is a part of a character, and their gaps."""
    kept, found = [], []
    for section, known, (before, after) in zip(shown, gaps, _cut(shown, budget, side), strict=True):
        if len(before) + len(after) < len(section):
            before, after = whole_characters(before, tokenizer, -1), whole_characters(after, tokenizer, 0)
            removed = len(section) - len(before) - len(after)
            earlier = [gap if gap < len(before) else max(gap - removed, len(before)) for gap in known]
            known = sorted({*earlier, len(before)})
        kept.append(before + after)
        found.append(known)
    return kept, found


def _offsets(
    order: Sequence[str], gaps: Sequence[Sequence[int]], trusted: Sequence[list[int]], shown: Sequence[list[int]]
) -> TruncationOffsets:
    """`gaps` inside of each section as positions in the prompt, by the section's name."""
    offsets: TruncationOffsets = {}
    start = 0
    for name, its, frame, section in zip(order, gaps, trusted, shown, strict=False):  # a frame more than sections
        start += len(frame)
        if its:
            offsets.setdefault(name, []).extend(start + gap for gap in its)
        start += len(section)
    return offsets


def _cut(sections: Sequence[Any], budget: int, side: str) -> list[tuple[Any, Any]]:
    """The part of each section (str or list) that stays before and after its truncation, for `budget` in all."""
    total = sum(map(len, sections))
    start = {"right": budget, "left": 0, "middle": (budget + 1) // 2}[side]
    stop = start + max(total - budget, 0)
    left = []
    for section in sections:
        left.append((section[: max(start, 0)], section[max(stop, 0) :]))
        start, stop = start - len(section), stop - len(section)
    return left


def _interleave(trusted: Sequence[Any], shown: Sequence[Any]) -> list[Any]:
    """The token ids of trusted[0], shown[0], trusted[1], ... in one list."""
    return list(chain.from_iterable(_alternate(trusted, shown)))


def _alternate(trusted: Sequence[Any], shown: Sequence[Any]) -> list[Any]:
    return [part for pair in zip_longest(trusted, shown, fillvalue=()) for part in pair][: len(trusted) + len(shown)]
