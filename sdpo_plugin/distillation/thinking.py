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
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<mm:think>", "</mm:think>"),  # MiniMax M3
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel>", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
)
# For responses that are judged: their special tokens are all there, and prompts define a form of their own.
JUDGED_TAGS: Tags = (
    *KNOWN_TAGS,
    ("<reasoning>", "</reasoning>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),  # gpt-oss, before a call
)


def tags_with(more: str | None) -> Tags:
    """The known tags and those of `--reprompt.thinking_tags`, opening and closing in turn."""
    words = (more or "").split()
    return (*KNOWN_TAGS, *zip(words[0::2], words[1::2], strict=True))


@lru_cache(maxsize=8)
def tag_pattern(tags: Tags) -> re.Pattern[str]:
    """Of a tag that opens a `thought`, and of a `thought_end` with the white space after it."""
    opening, closing = ("|".join(map(re.escape, side)) for side in zip(*tags, strict=True))
    return re.compile(rf"(?P<thought>{opening})|(?P<thought_end>{closing})\s*")


def end_of_thought(text: str, tag: re.Match[str], tags: Tags) -> int | None:
    """Where the thought ends that begins, or ends, with this match of `tag_pattern`; None if it never ends."""
    if tag["thought_end"]:
        return tag.end()
    closing = "|".join(re.escape(closing) for opening, closing in tags if opening == tag["thought"])
    end = re.compile(rf"(?:{closing})\s*").search(text, tag.end())
    return end.end() if end else None


def without_thoughts(text: str, tags: Tags = KNOWN_TAGS) -> str:
    """`text` without closed thoughts, and without everything before a closing tag that is left.

    Its opening tag is in the prompt (DeepSeek-R1, Qwen3's thinking models), or was that of a thought with another in
    it. These models' chat templates, too, keep what follows the last closing tag of an answer. In linear time.
    """
    if not any(tag in text for pair in tags for tag in pair):  # many times faster than the pattern
        return text
    kept: list[str] = []
    at = 0
    while (tag := tag_pattern(tags).search(text, at)) and (end := end_of_thought(text, tag, tags)) is not None:
        kept.append(text[at : tag.start()])
        if tag["thought_end"]:
            kept.clear()
        at = end
    return "".join([*kept, text[at:]])


def is_unclosed(text: str, tags: Tags = KNOWN_TAGS) -> bool:
    """Whether `text` begins with a thought that never ends, so that it shows no answer."""
    tag = tag_pattern(tags).match(without_thoughts(text, tags).lstrip())
    return tag is not None and tag["thought"] is not None


def visible(response: str) -> str:
    """What a judge reads of a response: no thoughts, and nothing from a line on that begins one without an end."""
    left = without_thoughts(response, JUDGED_TAGS)
    unclosed = tag_pattern(JUDGED_TAGS).search(left)
    before = left[: unclosed.start()] if unclosed else left
    return left if before.rpartition("\n")[2].strip() else before  # in a line it may be text: print("<think>")


def response_text(ids: Sequence[int], tokenizer: Any, tags: Tags = KNOWN_TAGS) -> str:
    """`response_texts` of one."""
    return response_texts([ids], tokenizer, tags)[0]


def response_texts(responses: Sequence[Sequence[int]], tokenizer: Any, tags: Tags = KNOWN_TAGS) -> list[str]:
    """The texts of responses without special tokens, except those in tags of thoughts.

    Magistral's `[THINK]` and gpt-oss's `<|channel|>` are special: without them a thought looks like an answer.
    tokenizer: a Hugging Face tokenizer.
    """
    of_tags = _special_tokens_of(tags, tokenizer)
    plain = [i for i, ids in enumerate(responses) if of_tags.keys().isdisjoint(ids)]
    texts = dict(zip(plain, _decoded([responses[i] for i in plain], tokenizer), strict=True))
    return [texts[i] if i in texts else _with_tags(ids, tokenizer, of_tags) for i, ids in enumerate(responses)]


def _with_tags(ids: Sequence[int], tokenizer: Any, of_tags: dict[int, str]) -> str:
    texts: list[str] = []
    run: list[int] = []
    for i in ids:
        if i in of_tags:
            texts += [*_decoded([run], tokenizer), of_tags[i]]
            run = []
        else:
            run.append(i)
    return "".join([*texts, *_decoded([run], tokenizer)])


def _decoded(sequences: Sequence[Sequence[int]], tokenizer: Any) -> list[str]:
    """Each as `tokenizer.decode` has it; in threads, where transformers adds nothing to what the Rust library does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    in_rust = getattr(type(tokenizer), "_decode", _decoded).__module__ == "transformers.tokenization_utils_tokenizers"
    if backend is None or not in_rust or (tokenizer.clean_up_tokenization_spaces and not _is_bpe(tokenizer)):
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences]
    return backend.decode_batch([list(ids) for ids in sequences], skip_special_tokens=True)


def _is_bpe(tokenizer: Any) -> bool:
    """Of which transformers does not clean up spaces, whatever the tokenizer's configuration is."""
    corrupts = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return type(tokenizer.backend_tokenizer.model).__name__ == "BPE" and not corrupts


@lru_cache(maxsize=4)
def _special_tokens_of(tags: Tags, tokenizer: Any) -> dict[int, str]:
    """By id, the special tokens that occur in a tag."""
    every_tag = [tag for pair in tags for tag in pair]
    return {
        i: token.content
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content.strip() and any(token.content in tag for tag in every_tag)
    }
