"""A prompt, and what a model reads of it: chat templates and tokenizers of other people's checkpoints.

Student, teacher and the checks before a run read a row through `rendered`, so that all of them read the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from typing import Any

from sdpo_plugin.config import ConfigError
from sdpo_plugin.distillation.images import is_image_part, with_runs_printed


@dataclass(frozen=True)
class FramedText:
    """A prompt that is text, of which only a part is the user's: `--data.input_template` puts a frame around it."""

    before: str
    user: str
    after: str


Chat = list[dict[str, Any]]
Messages = Chat | FramedText | str  # chat messages, or a prompt that was never a chat

# A template that prints the date prints this one for as long as the process lives: a prompt must stay what it was.
STARTED = datetime.now()
# Stands for a text: a template that prints a list as Python or JSON text, and not its parts, changes the quote.
MARK = '\ue000"\ue000'
# Text in which tokenizers differ: white space, digits, code, other scripts.
PROBE = "Let x = 12345.678;\n\n\tif (x >= 10) { return  naïve_Größe(x); }  # 你好, мир! 🙂"


# ── tokenizers and chat templates ──


def text_tokenizer(given: Any) -> Any:
    """The tokenizer in what OpenRLHF hands over, which for a checkpoint with a `vision_config` is a processor.

    A processor's first argument is images, and it has no vocabulary. Its chat template, the one that OpenRLHF renders
    with, becomes the tokenizer's.

    Raises ConfigError for mistral-common's tokenizer.
    """
    if type(given).__name__ == "MistralCommonBackend":
        raise ConfigError(
            "transformers loads the model's tokenizer as MistralCommonBackend, which reads the mark-up of a rendered "
            "chat, as [INST], as plain characters; give a local copy of the model without tekken.json, in which a "
            "tokenizer.json and a chat_template.jinja take its place"
        )
    if hasattr(given, "convert_ids_to_tokens") or not hasattr(given, "tokenizer"):
        return given
    if given.chat_template is not None:
        given.tokenizer.chat_template = given.chat_template
    return text_tokenizer(given.tokenizer)


def rendered(prompt: Messages, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> str:
    """The text of a prompt, a chat as the tokenizer's chat template renders it.

    tokenizer: a Hugging Face tokenizer or processor; any value for a prompt that is not a chat. Raises ConfigError if
    there is no chat template, or where it rejects the chat.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, FramedText):
        return prompt.before + prompt.user + prompt.after
    tokenizer = text_tokenizer(tokenizer)
    if tokenizer.chat_template is None:
        raise ConfigError(
            "the prompt is a chat, but the tokenizer has no chat template: give one to the tokenizer, or train on "
            "plain text prompts without --data.apply_chat_template"
        )
    kwargs = {**(chat_template_kwargs or {}), "tokenize": False, "add_generation_prompt": True}
    if "strftime_now" in str(tokenizer.chat_template):
        kwargs.setdefault("strftime_now", STARTED.strftime)

    def render(chat: Chat) -> str:
        return tokenizer.apply_chat_template(chat, **kwargs)

    try:
        text = render(_as_template_reads(prompt, tokenizer, render))
    except Exception as error:  # a template is other people's code
        roles = ", ".join(str(message.get("role")) for message in prompt)
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path} rejects a prompt with the roles {roles} "
            f"({type(error).__name__}: {reason}); change the prompts, or put another chat_template.jinja beside the "
            "model"
        ) from error
    return with_runs_printed(text, prompt)


def require_printed(prompt: Messages, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> None:
    """Raise ConfigError where the chat template rejects a prompt, or does not print the text of its last turn.

    The teacher's context goes into that text.
    """
    rendered(prompt, tokenizer, chat_template_kwargs)
    if isinstance(prompt, list):
        marked = _marked(prompt[-1])
        parts = _as_parts([marked])[0]["content"]
        printed = rendered([*prompt[:-1], marked], tokenizer, chat_template_kwargs).count(MARK)
        if printed < sum(map(is_text_part, parts)):
            raise not_printed("the text of the last turn", tokenizer)


def not_printed(what: str, tokenizer: Any) -> ConfigError:
    return ConfigError(
        f"the chat template of {text_tokenizer(tokenizer).name_or_path} does not print {what}, so no model would read "
        "it; give the turn's content as text, or put another chat_template.jinja beside the model"
    )


def _as_template_reads(chat: Chat, tokenizer: Any, render: Callable[[Chat], str]) -> Chat:
    """`chat` in the form of which the template prints most: as it is, or with all contents as text, or as parts.

    Most templates support one of the two only, and drop the other, print it as Python or JSON text, or reject it; they
    do the same with null, which a tool call has for content. As vLLM does, text parts are joined by line breaks. Texts
    do not matter, so student and teacher get the same form.
    """
    chat = _without_none(chat)
    all_text = all(isinstance(message.get("content"), str) for message in chat)
    if all_text and _prints_text(tokenizer, str(tokenizer.chat_template)):
        return chat
    marked = [_marked(message) for message in chat]

    def printed(form: Callable[[Chat], Chat]) -> tuple[int, int]:
        try:
            text = render(form(marked))
        except Exception:  # rejected in this form
            return -1, 0
        return text.count(MARK), -text.count("None")

    forms: tuple[Callable[[Chat], Chat], ...] = (list, _as_text, _as_parts)
    return max(forms, key=printed)(chat)


@lru_cache(maxsize=4)
def _prints_text(tokenizer: Any, template: str) -> bool:
    """Whether the chat template prints content that is text; `template` notices that it is another one."""
    try:
        chat = [{"role": "user", "content": MARK}]
        return MARK in tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception:  # it needs more than this chat
        return False


def _without_none(value: Any) -> Any:
    """`value` without the keys that Arrow adds, as None, where only other rows have them: templates look for keys."""
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: item if key == "arguments" else _without_none(item)
        for key, item in value.items() if item is not None or key == "content"
    }  # fmt: skip


def _as_text(chat: Chat) -> Chat:
    """`chat` with each list of nothing but text parts, and null, as text."""

    def text(content: Any) -> Any:
        parts = content or []
        joins = isinstance(parts, list) and all(map(is_text_part, parts))
        return "\n".join(part["text"] for part in parts) if joins else content

    return [{**message, "content": text(message.get("content"))} for message in chat]


def _as_parts(chat: Chat) -> Chat:
    """`chat` with each text as a list of one part, and null as an empty one."""

    def parts(content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content or []

    return [{**message, "content": parts(message.get("content"))} for message in chat]


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """`message` with `MARK` in the place of its text, or of each of its text parts."""
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": [{**part, "text": MARK} if is_text_part(part) else part for part in content]}
    return {**message, "content": MARK} if isinstance(content, str) else message


def is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


# ── the user's part ──


def user_text(prompt: Messages) -> str:
    """The text of the turn the teacher's replaces. Raises ValueError where there is none."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, FramedText):
        return prompt.user
    if not prompt or prompt[-1].get("role") != "user":
        role = f"its last turn is of role {prompt[-1].get('role')!r}" if prompt else "it has no turns"
        raise ValueError(f"prompt without a user turn at its end, where the teacher's context goes: {role}")
    content = prompt[-1].get("content")
    if isinstance(content, list):
        return content[_last_text(content)]["text"]
    if not isinstance(content, str):
        raise ValueError(f"prompt without a user turn of text: its last turn's content is {type(content).__name__}")
    return content


def require_user_text(where: str, prompt: Messages, images: bool = False) -> None:
    """Raise ConfigError where a chat does not end with a user's text, or has parts that are neither text nor, with
    `images`, an image.
    """
    if not isinstance(prompt, list):
        return
    if not prompt or prompt[-1].get("role") != "user":
        raise ConfigError(
            f"{where} has no user turn at its end, which is where the teacher's context goes; end every prompt with a "
            "user message"
        )
    for message in prompt:
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if others := [part for part in parts if not (is_text_part(part) or images and is_image_part(part))]:
            raise ConfigError(
                f"{where} has a part that is not text, {others[0]!r:.80}; give parts of the form {{'type': 'text', "
                "'text': ...}; for images {'type': 'image'}, with --data.image_key and --data.max_images_per_prompt"
            )
    try:
        user_text(prompt)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}; give it text") from error


def with_user_text(prompt: Messages, turn: str) -> Messages:
    """`prompt` with `turn` in the place of what `user_text` gives."""
    if isinstance(prompt, str):
        return turn
    if isinstance(prompt, FramedText):
        return replace(prompt, user=turn)
    content = prompt[-1]["content"]
    if isinstance(content, list):
        i = _last_text(content)
        content = [*content[:i], {**content[i], "text": turn}, *content[i + 1 :]]
    else:
        content = turn
    return [*prompt[:-1], {**prompt[-1], "content": content}]


def _last_text(parts: list[dict[str, Any]]) -> int:
    """The index of the last text part; what is not text (images) stays where it is."""
    for i in reversed(range(len(parts))):
        if is_text_part(parts[i]):
            return i
    raise ValueError("prompt without a user turn of text: its last turn has no part of type 'text'")


def prompt_as_scored(
    prompt: Messages,
    ids: list[int],
    tokenizer: Any,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    text: str | None = None,
) -> Messages:
    """What the student read: `prompt`, or the text that an agent's `reset` put in its place.

    Of such a text, the user's part is the one that takes the place of the user's in `prompt`: what stands in the frame
    that chat template or `--data.input_template` put around it. An end of the frame that is not there is nowhere.

    ids: the tokens before the first response token. All of the prompt's or, where OpenRLHF truncated it on the left to
    make room for the response, the last of them mean that the prompt was left alone.
    text: the prompt's as it was rendered for the student, if that is known: templates may print the date.
    """
    tokenizer = text_tokenizer(tokenizer)
    original = rendered(prompt, tokenizer, chat_template_kwargs) if text is None else with_runs_printed(text, prompt)
    if ids == tokenizer(original, add_special_tokens=False, verbose=False)["input_ids"][-len(ids) :]:
        return prompt
    read = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    sentinel = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in original)
    bare = rendered(with_user_text(prompt, sentinel), tokenizer, chat_template_kwargs)
    before, after = bare.split(sentinel)[0], bare.split(sentinel)[-1]
    ends, starts = read.endswith(after), read.removesuffix(after).startswith(before)
    if original in read and not (starts and ends):
        start, end = read.split(original, 1)
        before, after = start + before, after + end
    else:
        after = after if ends else ""
        before = before if starts else _opening(read.removesuffix(after), before, tokenizer)
    return FramedText(before, read[len(before) : len(read) - len(after)], after)


def _opening(read: str, before: str, tokenizer: Any) -> str:
    """The start of `read` up to the last place of as much of the end of `before` as it has, from a mark-up token on.

    That is where the user's turn begins in a chat that begins in another way: on another day, or an agent's own.
    """
    _, pattern = markup(tokenizer)
    for match in pattern.finditer(before):
        if (at := read.rfind(tail := before[match.start() :])) >= 0:
            return read[: at + len(tail)]
    return ""


# ── tokens ──


@lru_cache(maxsize=4)  # 6,000 reserved tokens, as Gemma has, take 40 ms
def markup(tokenizer: Any) -> tuple[set[int], re.Pattern[str]]:
    """The tokens that structure a chat: their ids, and where one starts in a text. Later ones are not noticed.

    Special tokens, and those in brackets that are not declared special: Qwen3's `<think>` and `<tool_call>` are not.
    Other added tokens are vocabulary (Gemma's runs of line breaks, a domain's words).
    """
    contents = {
        i: token.content
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or re.fullmatch(r"<\S+>|\[\S+\]", token.content)
    }
    # The set of first characters is for speed: Python tries the alternatives one by one.
    first = "".join({re.escape(content[0]) for content in contents.values()})
    pattern = f"(?=[{first}])(?={'|'.join(map(re.escape, contents.values()))})" if contents else "(?!)"
    return set(contents), re.compile(pattern)


def ids_without_markup(text: str, encode: Any, markup: set[int], markup_pattern: re.Pattern[str]) -> list[int]:
    """`text` as ordinary tokens.

    `split_special_tokens=True` is not enough: it leaves added tokens that are not declared special whole, and a
    Unigram model finds `</s>` in its own vocabulary. A text in which none is whole has nothing to find. What a
    normalizer still makes of look-alikes, and unknown characters where the unknown token is special, is left out.
    """
    cuts = [match.start() + 1 for match in markup_pattern.finditer(text)]
    parts = [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)])]
    return [i for part in encode(parts) for i in part if i not in markup]


def whole_characters(ids: list[int], tokenizer: Any, edge: int) -> list[int]:
    """`ids` without the part of a character that truncation left at `edge` (0 or -1), at most 3 bytes in UTF-8."""
    for _ in range(3):
        window = ids[:4] if edge == 0 else ids[-4:]
        if not window or tokenizer.decode(window)[edge:][:1] != "\ufffd":
            break
        ids = ids[1:] if edge == 0 else ids[:-1]
    return ids
