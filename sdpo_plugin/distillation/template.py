"""The template of a teacher's prompt: its sections, and how they are filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sdpo_plugin.config import RepromptConfig
from sdpo_plugin.distillation.prompts import Messages, user_text, with_user_text

SECTIONS = ("solution", "feedback", "privileged_context", "attempt")


def fill(prompt: Messages, sections: Mapping[str, str], config: RepromptConfig) -> Messages:
    """`prompt` with its last turn rewritten by `config.template`; a section that is not given is empty."""
    text = user_text(prompt)
    values = dict.fromkeys(SECTIONS, "") | dict(sections, prompt=text)
    if "solution" in sections:
        values["solution"] = substitute(
            config.solution_template, {"successful_previous_attempt": sections["solution"]}
        )
    if "feedback" in sections:
        values["feedback"] = substitute(config.feedback_template, {"feedback_raw": sections["feedback"]})
    return with_user_text(prompt, substitute(config.template, values))


def substitute(template: str, values: Mapping[str, str]) -> str:
    """One pass: braces that name no value stay, and a value is never looked at again."""
    return re.sub("{(" + "|".join(values) + ")}", lambda match: values[match[1]], template)
