"""Who teaches whom: what the self-teacher reads in place of the student's prompt.

The template says who teaches. Its sections are `{solution}`, a success of the rollout's group; `{feedback}`, what the
environment said about the rollout; `{privileged_context}`, what the data set knows; `{attempt}`, the rollout's own
response, beside one of the others. A section that the template does not name is not used, so SDPO (arXiv 2601.20802)
and SDFT (arXiv 2601.19897) differ here in their templates only.

Prompts and templates are trusted. What fills a section is not: it was written by a model, an environment or an
unknown author, and must never be read as chat mark-up.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sdpo_plugin.config import RepromptConfig
from sdpo_plugin.distillation.consensus import CONSENSUS, agreeing, consensus_metrics, disagreeing
from sdpo_plugin.distillation.prompts import Messages, user_text
from sdpo_plugin.distillation.template import SECTIONS, fill
from sdpo_plugin.distillation.thinking import is_unclosed, tags_with, without_thoughts


class FeedbackError(TypeError):
    """A reward function or an agent returned feedback that is not text."""


@dataclass(frozen=True)
class Rollout:
    """One sampled response with its reward and feedback. Rollouts of one prompt share `group`.

    response: None where nothing was sampled; such a rollout neither teaches nor is taught.
    answer: the response's final answer, where `--reprompt.demonstration consensus` compares them; None: it has none.
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
    answer: str | None = None


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
        """The context that the teacher of a turn is conditioned on; None: the turn is not in the loss."""
        whole = self if self.active and (self.sections or not self.by_turn) else None
        return self.by_turn.get(turn, whole)


def build_teacher_contexts(rollouts: Sequence[Rollout], config: RepromptConfig) -> list[TeacherContext]:
    """One context per rollout, in order. The rollouts are one whole batch: a group's successes are looked up in it.

    Raises ValueError for a chat without a user turn at its end; TypeError for feedback or privileged context that is
    not text. Source: published SDPO code, `_maybe_build_self_distillation_batch` in verl's `ray_trainer.py`.
    """
    successes = _successes_by_group(rollouts, config)
    targets = disagreeing(rollouts, config) if config.demonstration == CONSENSUS else range(len(rollouts))
    contexts = []
    for i, rollout in enumerate(rollouts):
        user_text(rollout.messages)  # a prompt that cannot be rewritten is an error before its first success, too
        if rollout.response is None:
            contexts.append(TeacherContext(rollout.messages, False))
            continue
        teachers = [j for j in successes[rollout.group] if j != i or not config.exclude_self]
        found: dict[str, str | None] = {}
        if teachers and i in targets and "{solution}" in config.template:
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
    """The rollout's prompt with `sections` (untrusted text by section name) in the template; inactive without any.

    A template that names `{attempt}` shows the rollout's own response, too: beside other sections, since a teacher
    that is shown nothing but the attempt can only repeat it, unless the template names no other.
    """
    alone = not any("{" + name + "}" in config.template for name in SECTIONS if name != "attempt")
    attempt = _shown_response(rollout, config) if "{attempt}" in config.template and (sections or alone) else ""
    if attempt.strip():
        sections = {**sections, "attempt": attempt}
    if not sections:
        return TeacherContext(rollout.messages, False)
    return TeacherContext(fill(rollout.messages, sections, config), True, sections, rollout.messages)


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
    found = {f"self_distillation/{name}_fraction": value for name, value in metrics.items()}
    return found | consensus_metrics(rollouts, config) if config.demonstration == CONSENSUS else found


# ── successes, demonstrations, feedback ──


def _successes_by_group(rollouts: Sequence[Rollout], config: RepromptConfig) -> defaultdict[Hashable, list[int]]:
    """The indices of each group's successes. A missing reward (None or nan: the reward function failed) is none."""
    if config.demonstration == CONSENSUS:
        return agreeing(rollouts, config)
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
    return _shown_response(chosen, config)


def _shown_response(rollout: Rollout, config: RepromptConfig) -> str:
    """A rollout's response as a section of a teacher's prompt."""
    response = rollout.response or ""
    return without_thoughts(response, tags_with(config.thinking_tags)) if config.remove_thinking else response


def _feedback(rollout: Rollout, config: RepromptConfig) -> str | None:
    return _text(rollout.feedback, "feedback", rollout) if config.use_feedback else None


def _by_turn(rollout: Rollout, shown: Mapping[str, str], config: RepromptConfig) -> dict[int, TeacherContext]:
    """The context of each turn with its own feedback, in addition to `shown`; equal feedback gives one context."""
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
    """Feedback on several turns as one section."""
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
