"""The arguments of the chat template, from the flags of student and teacher."""

from __future__ import annotations

import json
from typing import Any

from sdpo_plugin.config import ConfigError


def chat_template_kwargs(args: Any) -> dict[str, Any]:
    """`--data.chat_template_kwargs` (`launcher/options.py`) of OpenRLHF's nested arguments, where it is JSON text.

    Raises `ConfigError` for anything but a JSON object, and where it would have no effect.
    """
    return _template_arguments("--data.chat_template_kwargs", args.data.chat_template_kwargs, args)


def teacher_chat_template_kwargs(args: Any) -> dict[str, Any]:
    """What the chat template is given for a teacher's prompts: the student's arguments, and the teacher's own.

    Raises `ConfigError` as `chat_template_kwargs` does.
    """
    own = args.reprompt.chat_template_kwargs
    found = _template_arguments("--reprompt.chat_template_kwargs", own, args) if own is not None else {}
    return {**chat_template_kwargs(args), **found}


def _template_arguments(flag: str, text: str, args: Any) -> dict[str, Any]:
    try:
        kwargs = json.loads(text)
    except json.JSONDecodeError:
        kwargs = None
    if not isinstance(kwargs, dict):
        raise ConfigError(
            f"{flag} {text}: not a JSON object; give one such as '{{\"enable_thinking\": false}}'"
        )
    if taken := [name for name in ("conversation", "tokenize", "add_generation_prompt") if name in kwargs]:
        raise ConfigError(f"{flag} {text}: OpenRLHF sets {taken[0]} itself; leave {taken[0]} out")
    if kwargs and not args.data.apply_chat_template:
        raise ConfigError(
            f"{flag} {text}: without a chat template this has no effect; "
            "give --data.apply_chat_template, or leave the flag out"
        )
    return kwargs
