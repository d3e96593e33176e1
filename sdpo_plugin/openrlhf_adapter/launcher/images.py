"""Checks of the images of a run's rows, before Ray starts (`--data.max_images_per_prompt`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from sdpo_plugin.config import ConfigError
from sdpo_plugin.distillation.chat_arguments import chat_template_kwargs
from sdpo_plugin.distillation.images import image_parts, references, require_placeholders
from sdpo_plugin.distillation.prompts import rendered
from sdpo_plugin.interface.rollout_batch import prompt_messages

RENDERED_ROWS = 1000  # whose placeholders are counted


def check(args: Any, processor: Any, flag: str, rows: Any, evaluation: bool) -> None:
    """Every row has as many image parts as images, all of them are there, and the chat template prints them.

    Args:
        processor: the policy's. flag: with its value, where the rows come from.

    Raises:
        ConfigError: names the row; also at ZeRO-3 if some rows have no image.
    """
    if not hasattr(processor, "image_processor"):
        raise ConfigError(
            f"--data.max_images_per_prompt {args.data.max_images_per_prompt}: {args.actor.model_name_or_path} is not a "
            "vision-language model (no vision_config); use one, or leave the flag out"
        )
    key, without = args.data.image_key, []
    if key not in rows.column_names:
        raise ConfigError(f"--data.image_key {key}: {flag} has no such column; it has {', '.join(rows.column_names)}")
    for row, (prompt, column) in enumerate(zip(rows[args.data.input_key], _plain(rows, key), strict=True)):
        where, given = f"{flag}, row {row}", references(column)
        chat = prompt_messages({args.data.input_key: prompt}, args)
        parts = image_parts(chat)
        if len(parts) != len(given):
            raise ConfigError(
                f"--data.image_key {key}: {where} has {len(given)} images and its prompt {len(parts)} image parts; "
                "give one {'type': 'image'} part, or one <image> in a text, for each"
            )
        if len(given) > args.data.max_images_per_prompt:
            raise ConfigError(
                f"--data.max_images_per_prompt {args.data.max_images_per_prompt}: {where} has {len(given)} images; "
                f"give {len(given)}"
            )
        if missing := [path for path in given if _is_path(path) and not os.path.isfile(path)]:
            raise ConfigError(f"--data.image_key {key}: {where}: {missing[0]!r:.200} is not a file; correct the path")
        if row < RENDERED_ROWS:
            text = rendered(chat, processor, chat_template_kwargs(args))
            token = processor.image_token
            require_placeholders(text.count(token), len(given), token, where)
        if not given:
            without.append(row)
    hints = args.reprompt.teacher_images
    if hints is not None and not evaluation and hints not in rows.column_names:
        raise ConfigError(
            f"--reprompt.teacher_images {hints}: {flag} has no such column; it has {', '.join(rows.column_names)}"
        )
    if args.ds.zero_stage == 3 and without and len(without) < len(rows):
        raise ConfigError(
            f"--ds.zero_stage 3: {flag}, row {without[0]} has no image and others have; ranks that need no visual "
            "encoder would wait for those that do; give every row an image, or --ds.zero_stage 2"
        )


def teacher(args: Any) -> None:
    """Raise ConfigError if another model teaches and cannot see images."""
    from transformers import AutoConfig

    if args.teacher.kind != "model":
        return
    path = args.teacher.model_name_or_path
    if not hasattr(AutoConfig.from_pretrained(path, trust_remote_code=True), "vision_config"):
        raise ConfigError(
            f"--teacher.model_name_or_path {path}: not a vision-language model (no vision_config), and the prompts "
            "have images; give one of the student's family"
        )


def _plain(rows: Any, key: str) -> Iterator[Any]:
    """The column without decoding its images."""
    from datasets import Image, List

    feature = rows.features[key]
    if isinstance(feature, Image):
        rows = rows.cast_column(key, Image(decode=False))
    elif isinstance(feature, List) and isinstance(feature.feature, Image):
        rows = rows.cast_column(key, List(Image(decode=False)))
    return iter(rows[key])


def _is_path(given: Any) -> bool:
    return isinstance(given, str) and len(given) < 4096 and not given.startswith(("http://", "https://", "data:"))
