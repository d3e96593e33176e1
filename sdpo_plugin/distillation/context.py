"""Who teaches whom: what the self-teacher reads in place of the student's prompt.

The template says who teaches. Its sections are `{solution}`, a success of the rollout's group; `{feedback}`, what the
environment said about the rollout; `{privileged_context}`, what the data set knows. A section that the template does
not name is not used, so SDPO (arXiv 2601.20802) and SDFT (arXiv 2601.19897) differ here in their templates only.

Prompts and templates are trusted. What fills a section is not: it was written by a model, an environment or an
unknown author, and must never be read as chat mark-up.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sdpo_plugin.config import ConfigError, RepromptConfig
from sdpo_plugin.distillation.prompts import FramedText as FramedText
from sdpo_plugin.distillation.prompts import (
    Messages,
    ids_without_markup,
    markup,
    not_printed,
    rendered,
    text_tokenizer,
    user_text,
    whole_characters,
    with_user_text,
)
from sdpo_plugin.distillation.prompts import prompt_as_read as prompt_as_read
from sdpo_plugin.distillation.thinking import is_unclosed, tags_with, without_thoughts

# Only so much of the sections is tokenized at all: a megabyte of log output must not stall the controller. Text has
# about 4 characters a token, indented code and tables up to 10; beyond 16 the limit may cut earlier than needed.
MAX_CHARS_PER_TOKEN = 16
SECTIONS = ("solution", "feedback", "privileged_context")
# What was cut from a teacher's prompt: by section, the positions in its token ids before which a part of the section is
# missing. There is none where nothing is left of it.
Cuts = dict[str, list[int]]


class FeedbackError(TypeError):
    """A reward function or an agent returned feedback that is not text."""


@dataclass(frozen=True)
class Rollout:
    """One sampled response, and all that is known about it. Rollouts of one prompt share `group`.

    response: None where nothing was sampled; such a rollout neither teaches nor is taught.
    turn_feedback: of an agent's trajectory, what concerns one turn only; an entry for each turn, None where there is
        nothing.
    """

    group: Hashable
    messages: Messages
    response: str | None
    reward: float | None
    feedback: Any = None
    privileged_context: str | None = None
    turn_feedback: Sequence[Any] = ()


@dataclass(frozen=True)
class TeacherContext:
    """What the teacher reads.

    messages: as the rollout's, the last turn rewritten; the rollout's own where nothing is shown.
    active: whether anything is shown, for the whole rollout or for one of its turns; only then is the sample distilled.
    sections: the untrusted text that is shown, by section name.
    prompt: the rollout's messages where something is shown; without it, `messages` are rendered as they are, trusted.
    by_turn: what takes this context's place for turns with feedback of their own, by number from 0.
    """

    messages: Messages
    active: bool
    sections: Mapping[str, str] = field(default_factory=dict)
    prompt: Messages | None = None
    by_turn: Mapping[int, TeacherContext] = field(default_factory=dict)

    def of_turn(self, turn: int) -> TeacherContext | None:
        """The context that a turn is scored behind; None: it is not in the loss."""
        whole = self if self.active and (self.sections or not self.by_turn) else None
        return self.by_turn.get(turn, whole)


def build_teacher_contexts(rollouts: Sequence[Rollout], config: RepromptConfig) -> list[TeacherContext]:
    """One context per rollout, in order. The rollouts are one whole batch: a group's successes are looked up in it.

    Raises ValueError for a chat without a user turn at its end; TypeError for feedback or privileged context that is
    not text. Source: published SDPO code, `_maybe_build_self_distillation_batch` in verl's `ray_trainer.py`.
    """
    successes = _successes_by_group(rollouts, config)
    contexts = []
    for i, rollout in enumerate(rollouts):
        user_text(rollout.messages)  # a prompt that cannot be rewritten is an error before its first success, too
        if rollout.response is None:
            contexts.append(TeacherContext(rollout.messages, False))
            continue
        teachers = [j for j in successes[rollout.group] if j != i or not config.exclude_self]
        found: dict[str, str | None] = {}
        if teachers and "{solution}" in config.template:
            found["solution"] = _demonstration([rollouts[j] for j in teachers], i, config)
        if not (found and config.feedback_only_without_solution):
            found["feedback"] = _feedback(rollout, config)
        found["privileged_context"] = _text(rollout.privileged_context, "privileged_context", rollout)
        shown = {name: text for name, text in found.items() if text is not None and "{" + name + "}" in config.template}
        by_turn = _by_turn(rollout, shown, config)
        context = context_showing(rollout, shown, config)
        contexts.append(replace(context, active=context.active or bool(by_turn), by_turn=by_turn))
    return contexts


def context_showing(rollout: Rollout, sections: Mapping[str, str], config: RepromptConfig) -> TeacherContext:
    """The rollout's prompt with `sections` (untrusted text by section name) in the template; inactive without any."""
    if not sections:
        return TeacherContext(rollout.messages, False)
    return TeacherContext(_fill(rollout.messages, sections, config), True, sections, rollout.messages)


def context_metrics(
    rollouts: Sequence[Rollout], contexts: Sequence[TeacherContext], config: RepromptConfig
) -> dict[str, float]:
    """Fractions of the batch, under the published names; those named after groups count groups, all others samples.

    Ours are `unclosed_thought`, demonstrations that never get past their thoughts and show no answer to the student,
    and `single_success_group`, groups whose one success has no other to learn from.
    """
    groups = {rollout.group for rollout in rollouts}
    successes = _successes_by_group(rollouts, config)
    taught = [context.sections["solution"] for context in contexts if "solution" in context.sections]
    counts = {
        "success_sample": len(taught),
        "feedback_available": sum(config.use_feedback and has_feedback(rollout) for rollout in rollouts),
        "feedback_used": sum("feedback" in context.sections or bool(context.by_turn) for context in contexts),
        "reprompt_sample": sum(context.active for context in contexts),
        "unclosed_thought": sum(is_unclosed(text, tags_with(config.thinking_tags)) for text in taught),
    }
    of_groups = {
        "success_group": len(successes), "single_success_group": sum(len(won) == 1 for won in successes.values())
    }
    metrics = {name: count / max(len(groups), 1) for name, count in of_groups.items()}
    metrics |= {name: count / max(len(contexts), 1) for name, count in counts.items()}
    return {f"self_distillation/{name}_fraction": value for name, value in metrics.items()}


def teacher_prompt_ids(
    context: TeacherContext,
    tokenizer: Any,
    config: RepromptConfig,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], Cuts]:
    """The teacher's prompt as token ids, ready for the response behind it, and what was cut from it.

    Send these ids to an engine, not their text: as text, a section could become mark-up again.

    tokenizer: a Hugging Face tokenizer or processor. chat_template_kwargs: what the student's prompt is rendered with
    (`tools`, `enable_thinking`, ...). An inactive context gives the student's ids. An active one gives the ids of the
    plain rendering, unless a section would change the mark-up or something is cut to fit `config.max_len`. Then
    sections are tokenized on their own: tokens do not merge across their borders (SentencePiece may see a space
    there). They are cut, taken together, at `config.truncation`; one of which nothing is left goes with its frame.
    Everything else is kept, even if it alone is longer than `max_len`. Where a chat template strips the user turn, a
    section at its very border keeps its white space.

    Raises ConfigError for chat messages and a tokenizer without a chat template, or with one that refuses them or does
    not print the sections; and where something would have to be cut and `config.truncation` is `error`.
    """
    tokenizer = text_tokenizer(tokenizer)

    def render(messages: Messages) -> str:
        return rendered(messages, tokenizer, chat_template_kwargs)

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    if context.prompt is None:
        return encode([render(context.messages)])[0], {}

    # Sentinels stand for the sections while the chat template runs, so that it can neither read nor change them.
    bare = render(_fill(context.prompt, {}, config))
    names = dict(zip((c for c in map(chr, range(0xE000, 0xF900)) if c not in bare), SECTIONS, strict=False))
    sentinels = {name: sentinel for sentinel, name in names.items() if name in context.sections}
    filled = _fill(context.prompt, sentinels, config)
    pieces = re.split(f"([{''.join(names)}])", render(filled))
    order = [names[sentinel] for sentinel in pieces[1::2]]
    for name, sentinel in sentinels.items():
        if sentinel in user_text(filled) and name not in order:
            raise not_printed(f"the {name} section in the last turn", tokenizer)

    # Environments hand over what they read: half of a surrogate pair has no UTF-8 form, and tokenizers raise on it.
    texts = [context.sections[name].encode("utf-8", "replace").decode() for name in order]
    bounded = [(text, "") for text in texts]
    if config.truncation != "error":
        bounded = _cut(texts, config.max_len * MAX_CHARS_PER_TOKEN, config.truncation)
    special, special_pattern = markup(tokenizer, len(tokenizer))
    trusted = encode(pieces[0::2])
    ends = [[ids_without_markup(end, encode, special, special_pattern) for end in both] for both in bounded]
    shown = [before + after for before, after in ends]
    ids = _interleave(trusted, shown)
    whole = [before + after == text for (before, after), text in zip(bounded, texts, strict=True)]
    gaps = [[] if its else [len(before)] for its, (before, _) in zip(whole, ends, strict=True)]

    if all(whole):
        plain = encode(["".join(_interleave(pieces[0::2], texts))])[0]
        if len(plain) <= config.max_len and [i for i in plain if i in special] == [i for i in ids if i in special]:
            return plain, {}
    if len(ids) <= config.max_len:
        return ids, _places(order, gaps, trusted, shown)
    if config.truncation == "error":
        parts = ", ".join(f"{name} {len(part)}" for name, part in zip(order, shown, strict=True))
        raise ConfigError(
            f"--reprompt.truncation error: a teacher's prompt of {len(ids)} tokens ({parts}) is longer than the "
            f"{config.max_len} of --reprompt.max_len, or that its response leaves of the model's positions; give a "
            f"--reprompt.max_len of at least {len(ids)}, shorter responses, or --reprompt.truncation right"
        )
    budget = max(config.max_len - sum(map(len, trusted)), 0)
    kept = []
    for i, (before, after) in enumerate(_cut(shown, budget, config.truncation)):
        if len(before) + len(after) < len(shown[i]):
            before, after = whole_characters(before, tokenizer, -1), whole_characters(after, tokenizer, 0)
            removed = len(shown[i]) - len(before) - len(after)
            earlier = [gap if gap < len(before) else max(gap - removed, len(before)) for gap in gaps[i]]
            gaps[i] = sorted({*earlier, len(before)})
        kept.append(before + after)
    left = {name: context.sections[name] for name, part in zip(order, kept, strict=True) if part}
    if len(left) < len(context.sections):
        fewer = replace(context, sections=left)
        ids, cuts = teacher_prompt_ids(fewer, tokenizer, config, chat_template_kwargs)
        return ids, {name: cuts.get(name, []) for name in order if name in cuts or name not in left}
    return _interleave(trusted, kept), _places(order, gaps, trusted, kept)


def _places(
    order: Sequence[str], gaps: Sequence[Sequence[int]], trusted: Sequence[list[int]], shown: Sequence[list[int]]
) -> Cuts:
    """`gaps` inside of each shown section as positions in the prompt, by the section's name."""
    cuts: Cuts = {}
    at = 0
    for name, its, frame, section in zip(order, gaps, trusted, shown, strict=False):  # a frame more than sections
        at += len(frame)
        if its:
            cuts.setdefault(name, []).extend(at + gap for gap in its)
        at += len(section)
    return cuts


# ── successes, demonstrations, feedback ──


def _successes_by_group(rollouts: Sequence[Rollout], config: RepromptConfig) -> defaultdict[Hashable, list[int]]:
    """The indices of each group's successes. A missing reward (None or nan: the reward function failed) is none."""
    successes: defaultdict[Hashable, list[int]] = defaultdict(list)
    for i, rollout in enumerate(rollouts):
        rewarded = rollout.reward is not None and rollout.reward >= config.success_threshold
        if rewarded and rollout.response is not None:
            successes[rollout.group].append(i)
    return successes


def _demonstration(successes: list[Rollout], index: int, config: RepromptConfig) -> str:
    if config.demonstration == "best":
        chosen = max(successes, key=lambda rollout: rollout.reward or 0.0)
    elif config.demonstration == "shortest":
        chosen = min(successes, key=lambda rollout: len(rollout.response or ""))
    elif config.demonstration == "random":
        # The responses are part of the seed: with the index alone, every step would choose alike.
        seed = repr((config.seed, index, [rollout.response for rollout in successes]))
        chosen = random.Random(seed).choice(successes)
    else:
        chosen = successes[0]
    response = chosen.response or ""
    return without_thoughts(response, tags_with(config.thinking_tags)) if config.remove_thinking else response


def _feedback(rollout: Rollout, config: RepromptConfig) -> str | None:
    return _text(rollout.feedback, "feedback", rollout) if config.use_feedback else None


def _by_turn(rollout: Rollout, shown: Mapping[str, str], config: RepromptConfig) -> dict[int, TeacherContext]:
    """What each turn with feedback of its own is shown, beside `shown`; turns told the same share a context."""
    if not config.use_feedback:
        return {}
    texts = [_text(said, f"feedback on turn {turn}", rollout) for turn, said in enumerate(rollout.turn_feedback)]
    if "{feedback}" not in config.template:
        return {}
    of_text = {
        text: context_showing(rollout, {**shown, "feedback": joined([shown.get("feedback"), text])}, config)
        for text in set(texts) - {None}
    }
    return {turn: of_text[text] for turn, text in enumerate(texts) if text is not None}


def joined(texts: Iterable[str | None]) -> str:
    """What was said at several times, as one section."""
    return "\n\n".join(text for text in texts if text is not None and text.strip())


def has_feedback(rollout: Rollout) -> bool:
    """On the whole or on a turn."""
    return any(isinstance(text, str) and bool(text.strip()) for text in (rollout.feedback, *rollout.turn_feedback))


def _text(value: Any, name: str, rollout: Rollout) -> str | None:
    """`value`, or None where there is nothing to read in it."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise (FeedbackError if "feedback" in name else TypeError)(
            f"{name} of a rollout of group {rollout.group!r} is {type(value).__name__}, not text: the teacher reads "
            "text; pass a str (json.dumps(...) for a structure), or None where there is none"
        )
    return value if value.strip() else None


# ── templates ──


def _fill(prompt: Messages, sections: Mapping[str, str], config: RepromptConfig) -> Messages:
    """`prompt` with its last turn rewritten by `config.template`; a section that is not given is empty."""
    text = user_text(prompt)
    values = dict.fromkeys(SECTIONS, "") | dict(sections, prompt=text)
    if "solution" in sections:
        values["solution"] = _substitute(
            config.solution_template, {"successful_previous_attempt": sections["solution"]}
        )
    if "feedback" in sections:
        values["feedback"] = _substitute(config.feedback_template, {"feedback_raw": sections["feedback"]})
    return with_user_text(prompt, _substitute(config.template, values))


def _substitute(template: str, values: Mapping[str, str]) -> str:
    """One pass: braces that name no value stay, and a value is never looked at again."""
    return re.sub("{(" + "|".join(values) + ")}", lambda match: values[match[1]], template)


# ── tokens ──


def _cut(sections: Sequence[Any], budget: int, side: str) -> list[tuple[Any, Any]]:
    """What is left of each section (str or list) before and after the cut, if all together may be `budget` long."""
    total = sum(map(len, sections))
    start = {"right": budget, "left": 0, "middle": (budget + 1) // 2}[side]
    stop = start + max(total - budget, 0)
    left = []
    for section in sections:
        left.append((section[: max(start, 0)], section[max(stop, 0) :]))
        start, stop = start - len(section), stop - len(section)
    return left


def _interleave(trusted: Sequence[Any], shown: Sequence[Any]) -> list[Any]:
    """The items (token ids, characters) of trusted[0], shown[0], trusted[1], ... in one list."""
    return [item for pair in zip(trusted, [*shown, ()], strict=True) for part in pair for item in part]
