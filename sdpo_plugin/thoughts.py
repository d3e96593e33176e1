"""The thoughts in a response: the tags that models put around them, and what is left without them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

Tags = tuple[tuple[str, str], ...]  # opening and closing tag of each form

KNOWN_TAGS: Tags = (
    ("<think>", "</think>"),  # Qwen3, DeepSeek-R1, GLM, Kimi, MiniMax, OLMo, ERNIE, Hunyuan
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<mm:think>", "</mm:think>"),  # MiniMax M3
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    ("<|channel>", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
)
SPACE = re.compile(r"\s*")


def tags_with(more: str | None) -> Tags:
    """The known tags and those of `--reprompt.thinking_tags`, opening and closing in turn."""
    words = (more or "").split()
    return (*KNOWN_TAGS, *zip(words[0::2], words[1::2], strict=True))


def without_thoughts(text: str, tags: Tags = KNOWN_TAGS) -> str:
    """`text` without closed thoughts, and without everything before a closing tag that is left.

    Its opening tag is in the prompt (DeepSeek-R1, Qwen3's thinking models), or was that of a thought with another in
    it. These models' chat templates, too, keep what follows the last closing tag of an answer. In linear time.
    """
    for opening, closing in tags:
        kept, at = [], 0
        while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start + len(opening))) >= 0:
            kept.append(text[at:start])
            at = _after_space(text, end + len(closing))
        _, found, answer = "".join([*kept, text[at:]]).rpartition(closing)
        text = answer.lstrip() if found else answer
    return text


def _after_space(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return match.end() if match else at


def is_unclosed(text: str, tags: Tags = KNOWN_TAGS) -> bool:
    """Whether `text` begins with a thought that never ends, so that it shows no answer."""
    return without_thoughts(text, tags).lstrip().startswith(tuple(opening for opening, _ in tags))


def response_text(ids: Sequence[int], tokenizer: Any, tags: Tags = KNOWN_TAGS) -> str:
    """The text of a response without special tokens, but for those that tags of thoughts are made of.

    Magistral's `[THINK]` and gpt-oss's `<|channel|>` are special: without them a thought looks like an answer.
    tokenizer: a Hugging Face tokenizer.
    """
    of_tags = _special_tokens_of(tags, tokenizer, len(tokenizer))
    texts: list[str] = []
    run: list[int] = []
    for i in ids:
        if i in of_tags:
            texts += [tokenizer.decode(run, skip_special_tokens=True), of_tags[i]]
            run = []
        else:
            run.append(i)
    return "".join([*texts, tokenizer.decode(run, skip_special_tokens=True)])


@lru_cache(maxsize=4)  # `size` notices a token that is added later
def _special_tokens_of(tags: Tags, tokenizer: Any, size: int) -> dict[int, str]:
    """By id, the special tokens that occur in a tag."""
    every_tag = [tag for pair in tags for tag in pair]
    return {
        i: token.content
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content.strip() and any(token.content in tag for tag in every_tag)
    }
