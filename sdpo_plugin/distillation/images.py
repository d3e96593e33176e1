"""Images in a prompt: parts of chat messages, and the tokens that the model's processor puts in their place.

A chat template prints one placeholder for an image, and the processor replaces it with as many tokens as the image
has. The teacher's images are the student's, so the teacher's prompt gets the student's runs of tokens, as text: the
code that renders, tokenizes and truncates prompts does not depend on images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, groupby, zip_longest
from typing import TYPE_CHECKING, Any

from sdpo_plugin.config import ConfigError

if TYPE_CHECKING:
    import torch

TAG = "<image>"  # in the text of a dataset row, as in OpenRLHF's datasets/prompts_dataset.py


def is_image_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"


def image_parts(chat: Any) -> list[dict[str, Any]]:
    """The image parts of a chat, in order; none of a prompt that is not a chat."""
    messages = chat if isinstance(chat, list) else []
    contents = (message.get("content") for message in messages)
    return [part for content in contents if isinstance(content, list) for part in content if is_image_part(part)]


def with_tags_as_parts(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`chat` with `<image>` in a message's text as an image part, as OpenRLHF makes it (`_str_to_content_list`)."""

    def content(given: Any) -> Any:
        if not isinstance(given, str) or TAG not in given:
            return given
        texts = [{"type": "text", "text": text.strip()} if text.strip() else None for text in given.split(TAG)]
        images = [{"type": "image"} for _ in texts[1:]]
        return [part for pair in zip_longest(texts, images) for part in pair if part is not None]

    return [{**message, "content": content(message.get("content"))} for message in chat]


def references(column: Any) -> list[Any]:
    """A row's images, as paths, URLs or base64 strings, from what its column has."""
    given = column if isinstance(column, list) else [column]
    return [one for one in given if one is not None]


def media_tokens(processor: Any) -> set[int]:
    """The ids of a processor's image and video tokens; none of a tokenizer."""
    if not hasattr(processor, "image_processor"):
        return set()
    names = ("image_token_id", "video_token_id")
    found = (getattr(of, name, None) for of in (processor, processor.tokenizer) for name in names)
    return {token for token in found if token is not None}


def placeholders(processor: Any) -> list[str]:
    """The texts of `media_tokens`."""
    media = sorted(media_tokens(processor))
    return processor.tokenizer.convert_ids_to_tokens(media) if media else []


def with_runs(
    chat: list[dict[str, Any]], processor: Any, inputs: Mapping[str, Any], ids: Sequence[int]
) -> list[dict[str, Any]]:
    """`chat` whose image parts carry the text of their tokens: as long as those in `ids`, which the student read.

    Args:
        processor: the model's, of transformers.
        inputs: what it made of the images (`pixel_values`, `image_grid_thw`, ...).
        ids: the student's prompt.

    Raises ConfigError for a processor that has one token for all images.
    """
    if not hasattr(processor, "replace_image_token"):
        raise ConfigError(
            f"--data.max_images_per_prompt: {type(processor).__name__} does not say which tokens stand for an image "
            "(replace_image_token); use a model of another family"
        )
    lengths = [len(list(run)) for token, run in groupby(ids) if token == processor.image_token_id]
    # What processors know and do not return: Gemma 4's lengths; Gemma 3's crops, which are off by default.
    known = {"num_soft_tokens_per_image": lengths, "num_crops": [0] * len(image_parts(chat)), **inputs}
    numbers = iter(range(len(image_parts(chat))))

    def part(given: Any) -> Any:
        if not is_image_part(given):
            return given
        run = processor.replace_image_token(known, next(numbers))
        return {"type": "image", "placeholder": processor.image_token, "run": run}

    return [
        {**message, "content": [part(one) for one in content]} if isinstance(content, list) else message
        for message in chat for content in [message.get("content")]
    ]  # fmt: skip


def with_added_images(chat: list[dict[str, Any]], runs: Sequence[str], processor: Any) -> list[dict[str, Any]]:
    """`chat` with images at its end, given by the text of their tokens: after all others of the prompt."""
    content = chat[-1]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    added = [{"type": "image", "placeholder": processor.image_token, "run": run} for run in runs]
    return [*chat[:-1], {**chat[-1], "content": [*parts, *added]}]


def processed(references: Sequence[Any], processor: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What a processor makes of images (paths, URLs or base64 strings), and the text of each one's tokens."""
    from transformers.image_utils import load_image

    chat = [{"role": "user", "content": [{"type": "image"} for _ in references]}]
    pictures = [load_image(reference) for reference in references]
    text = processor.image_token * len(references)
    made = processor(text=[text], images=pictures, add_special_tokens=False, return_tensors="pt")
    skipped = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
    inputs = {name: value for name, value in made.items() if name not in skipped}
    parts = image_parts(with_runs(chat, processor, inputs, made["input_ids"][0].tolist()))
    return inputs, [part["run"] for part in parts]


def with_runs_printed(text: str, chat: Any) -> str:
    """A rendered prompt with the tokens of its images in the place of their placeholders, if the parts carry them.

    Raises ConfigError if it has another number of placeholders than images.
    """
    parts = [part for part in image_parts(chat) if "run" in part]
    if not parts:
        return text
    pieces = text.split(parts[0]["placeholder"])
    require_placeholders(len(pieces) - 1, len(parts), parts[0]["placeholder"])
    return "".join(chain.from_iterable(zip_longest(pieces, (part["run"] for part in parts), fillvalue="")))


def require_placeholders(found: int, images: int, placeholder: str, where: str = "a prompt") -> None:
    if found != images:
        raise ConfigError(
            f"{where} has {images} images, and rendered it has {found} times {placeholder}; give as many image parts "
            f"(or {TAG}) as images, no {placeholder} in a text, and a chat template that prints images"
        )
