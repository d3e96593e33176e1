"""Every option of the plugin: its name, default, range and help, in one place.

Each dataclass is one flag group (`--distill.*`, `--teacher.*`, ...), one YAML section and one table of
docs/options.md. Values are checked on construction, so an instance is always usable.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from types import SimpleNamespace
from typing import Any


class ConfigError(ValueError):
    """A configuration that must not start: names the flag, the value and the fix."""


class StopTraining(RuntimeError):
    """Raised by a plugin in `openrlhf_metrics`: the run saves a checkpoint and ends with this message."""


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


class Group:
    """Shared by the option groups: `prefix` is the flag prefix (`distill` -> `--distill.alpha`)."""

    prefix: str
    __dataclass_fields__: typing.ClassVar[dict[str, Any]]  # every group is a dataclass

    def __post_init__(self) -> None:
        for f in fields(self):
            choices = f.metadata["choices"]
            if choices and getattr(self, f.name) not in (*choices, f.default):
                self.fail(f.name, f"choose one of {', '.join(choices)}")
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` for a value out of range or a combination without meaning."""

    def fail(self, name: str, fix: str) -> None:
        raise ConfigError(f"--{self.prefix}.{name} {getattr(self, name)}: {fix}")

    def in_unit_interval(self, name: str) -> None:
        value = getattr(self, name)
        if not (isinstance(value, (int, float)) and 0.0 <= value <= 1.0):
            self.fail(name, "give a number in [0, 1]")

    def positive(self, name: str, *, optional: bool = False, integer: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        number = isinstance(value, int) if integer else isinstance(value, (int, float)) and math.isfinite(value)
        if not number or value <= 0:
            self.fail(name, f"give a positive {'integer' if integer else 'number'}{' or none' if optional else ''}")


@dataclass(frozen=True)
class DistillConfig(Group):
    """What is distilled, and how much of it."""

    prefix = "distill"

    mode: str = option(
        "topk", "divergence over the whole vocabulary, over the top-k, or of the sampled token only",
        ("full", "topk", "sampled"),
    )
    alpha: float = option(0.5, "0: KL(teacher||student); 1: KL(student||teacher); between: generalised Jensen-Shannon")
    topk: int | None = option(100, "k of --distill.mode topk")
    support: str = option("student", "whose top-k tokens carry the divergence", ("student", "teacher", "union"))
    add_tail: bool = option(True, "collect the mass outside the top-k in one bucket instead of renormalising")
    is_clip: float | None = option(
        2.0, "upper bound of the ratio student/policy before the rollout's first update, both as the trainer sees "
        "them: 1 with one update per rollout; none: no ratio. The ratio to what the engine sampled from is "
        "--algo.advantage.is_correction_*, a factor of its own",
    )
    kl_clip: float | None = option(None, "upper bound of each vocabulary entry's share of a token's divergence (OPSD)")
    weight: float = option(1.0, "(1-w) x OpenRLHF's policy loss + w x distillation; 0 is OpenRLHF alone")
    mean: str = option(
        "samples", "samples: the mean over all samples of the optimizer step, 0 for those without a context, of each "
        "one's mean over its tokens in the loss; tokens: over the tokens in the loss, as --actor.loss_agg_mode has it",
        ("samples", "tokens"),
    )
    skip_tokens: int = option(0, "leading response tokens without a distillation loss")
    mask_truncated: bool = option(False, "leave responses that were cut at the length limit out of the distillation")
    generate_from_teacher: bool = option(False, "sample from the teacher's prompt, train on the student's")

    def check(self) -> None:
        self.in_unit_interval("alpha")
        self.in_unit_interval("weight")
        self.positive("is_clip", optional=True)
        self.positive("kl_clip", optional=True)
        if self.mode == "topk":
            if self.topk is None:
                self.fail("topk", "--distill.mode topk needs k; give --distill.topk 100, or --distill.mode full")
            self.positive("topk", integer=True)
        if self.mode == "sampled" and self.alpha != 1.0:
            self.fail("alpha", "--distill.mode sampled is the reverse KL only; give --distill.alpha 1")
        if not isinstance(self.skip_tokens, int) or self.skip_tokens < 0:
            self.fail("skip_tokens", "give an integer >= 0")


@dataclass(frozen=True)
class TeacherConfig(Group):
    """Which weights read the teacher's context."""

    prefix = "teacher"

    kind: str = option(
        "ema", "live: the student itself; base: the initial weights; ema: their moving average; "
        "trust_region: logits between base and student; model: another model, with the same tokenizer",
        ("live", "base", "ema", "trust_region", "model"),
    )
    update_rate: float = option(0.05, "ema: teacher = (1-rate) x teacher + rate x student; trust_region: the share "
                                "of the student's logits")
    sync_steps: int = option(1, "optimizer steps between updates of the ema teacher")
    model_name_or_path: str | None = option(None, "the model of --teacher.kind model")
    zero_stage: int | None = option(
        None, "of --teacher.kind model: 0, whole on every GPU, or 3, partitioned over them; none: as the student is"
    )
    offload: bool = option(False, "keep the teacher's weights in host memory between its forward passes")
    max_tokens_per_gpu: int = option(
        32768, "tokens of the teacher's forward pass, padding included; a micro-batch of the student with more is read "
        "in several passes (a longer sample alone)"
    )
    save: bool = option(False, "also export the teacher as a Hugging Face model")

    def check(self) -> None:
        if self.kind == "model" and self.model_name_or_path is None:
            self.fail("kind", "give --teacher.model_name_or_path, too")
        for name in ("model_name_or_path", "zero_stage"):
            if self.kind != "model" and getattr(self, name) is not None:
                self.fail(name, f"--teacher.kind {self.kind} does not read it; give --teacher.kind model")
        if self.zero_stage not in (None, 0, 3):
            self.fail("zero_stage", "a model that is only read is whole or partitioned; give 0 or 3")
        self.positive("sync_steps", integer=True)
        self.positive("max_tokens_per_gpu", integer=True)
        if self.kind in ("ema", "trust_region"):
            self.in_unit_interval("update_rate")
            if self.update_rate == 0.0:
                self.fail("update_rate", "this teacher would never move; give --teacher.kind base")
            if self.update_rate == 1.0 and (self.kind == "trust_region" or self.sync_steps == 1):
                copies = ", or --teacher.sync_steps above 1 for a copy every so many steps" * (self.kind == "ema")
                self.fail("update_rate", f"this teacher would be the student; give --teacher.kind live{copies}")


@dataclass(frozen=True)
class RepromptConfig(Group):
    """What the teacher is shown. A section the template does not name is not used."""

    prefix = "reprompt"

    success_threshold: float = option(0.5, "a rollout with reward >= this is a success, and may teach its group")
    exclude_self: bool = option(True, "a rollout's own success does not teach itself")
    demonstration: str = option(
        "first", "which of the successes is shown", ("first", "random", "best", "shortest")
    )
    remove_thinking: bool = option(
        True, "cut closed thoughts from demonstrations, those that the prompt opened included"
    )
    thinking_tags: str | None = option(
        None, "opening and closing tag of thoughts, as \"<reasoning> </reasoning>\", besides those of known models "
        "(<think>, [THINK], gpt-oss's channels, ...); more pairs may follow"
    )
    use_feedback: bool = option(True, "show the environment's feedback on the rollout")
    feedback_only_without_solution: bool = option(
        True, "show feedback on a response only where no demonstration exists; feedback on one turn is always shown"
    )
    template: str = option(
        "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.",
        "the teacher's user turn; names {prompt}, {solution}, {feedback}, {privileged_context}",
    )
    solution_template: str = option(
        "\nCorrect solution:\n\n{successful_previous_attempt}", "the {solution} section"
    )
    feedback_template: str = option(
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}",
        "the {feedback} section",
    )
    privileged_key: str = option("privileged_context", "data-set column of the {privileged_context} section")
    max_len: int = option(10240, "longest teacher prompt, in tokens")
    truncation: str = option(
        "right", "which side of the shown sections is cut when the prompt is too long; the question and the "
        "closing instruction never are; error: stop instead", ("right", "left", "middle", "error"),
    )
    seed: int = option(42, "of --reprompt.demonstration random")

    def check(self) -> None:
        self.positive("max_len", integer=True)
        for name, known in (("template", "prompt"), ("solution_template", "successful_previous_attempt"),
                            ("feedback_template", "feedback_raw")):
            if "{" + known + "}" not in getattr(self, name):
                self.fail(name, "the template must contain {" + known + "}")
        if self.thinking_tags is not None and (not self.thinking_tags.strip() or len(self.thinking_tags.split()) % 2):
            self.fail("thinking_tags", 'give opening and closing tags in turn, as "<reasoning> </reasoning>"')


@dataclass(frozen=True)
class DiagnosticsConfig(Group):
    """What is watched while training."""

    prefix = "diagnostics"

    guard: str = option(
        "warn", "what to do about a degenerate run: say so; save a checkpoint and stop when the teacher has collapsed; "
        "slow the ema teacher down while its context gain sinks", ("off", "warn", "stop", "slow"),
    )
    interval: int = option(1, "rollout batches between two looks")
    tolerance: int = option(5, "consecutive degenerate looks before the guard speaks or stops")
    samples: int = option(
        0, "samples of each rollout batch that are written to samples.jsonl, beside the event files of "
        "--logger.tensorboard_dir, token by token with what the teacher read and would have said; 12.5 kB for each 100 "
        "tokens, besides the texts"
    )

    def check(self) -> None:
        self.positive("interval", integer=True)
        self.positive("tolerance", integer=True)
        if not isinstance(self.samples, int) or self.samples < 0:
            self.fail("samples", "give an integer >= 0")


@dataclass(frozen=True)
class RewardConfig(Group):
    """What happens when a reward function or service fails. For every run, with an algorithm or without."""

    prefix = "reward"

    on_error: str = option(
        "stop", "after the last attempt, stop the run, or skip the sample: none of its tokens is in a loss, and its "
        "group's statistics are those of the others", ("stop", "skip"),
    )
    attempts: int = option(
        1, "calls until a sample counts as failed, with 1, 2, 4, ... s between them; of an agent: whole trajectories"
    )
    timeout: float = option(
        600.0, "seconds until a call counts as failed (of an agent: its reset or one step); the run goes on without it"
    )
    max_turns: int | None = option(
        None, "actions of an agent's trajectory, which ends there if its agent has not ended it; --data.max_len bounds "
        "its tokens"
    )
    max_skipped: float = option(0.1, "share of a rollout batch that may be skipped; above it the run stops")

    def check(self) -> None:
        self.positive("attempts", integer=True)
        self.positive("timeout")
        self.positive("max_turns", optional=True, integer=True)
        self.in_unit_interval("max_skipped")


GROUPS: tuple[type[Group], ...] = (DistillConfig, TeacherConfig, RepromptConfig, DiagnosticsConfig)


def from_namespace(group: type[Group], args: Any) -> Any:
    """The group's instance from OpenRLHF's nested arguments (`args.distill.alpha`)."""
    section = vars(attrgetter(group.prefix)(args))
    return group(**{f.name: section[f.name] for f in dataclasses.fields(group)})


def flat(nested: SimpleNamespace, prefix: str = "") -> dict[str, Any]:
    """OpenRLHF's nested arguments by dotted name."""
    found: dict[str, Any] = {}
    for key, value in vars(nested).items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, SimpleNamespace) else {f"{prefix}{key}": value}
    return found


def add_group(parser: argparse.ArgumentParser, group: type[Group]) -> None:
    """The flags of an option group: one per field, `--prefix.field`, with its type, choices, default and help."""
    section = parser.add_argument_group(f"--{group.prefix}", (group.__doc__ or "").strip())
    hints = typing.get_type_hints(group)
    for f in dataclasses.fields(group):
        kinds = [k for k in (typing.get_args(hints[f.name]) or (hints[f.name],)) if k is not type(None)]
        optional = type(None) in typing.get_args(hints[f.name])
        flag, help = f"--{group.prefix}.{f.name}", f.metadata["help"]
        if kinds == [bool]:
            section.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=help)
        else:
            section.add_argument(
                flag, type=_optional(kinds[0]) if optional else kinds[0], default=f.default,
                choices=f.metadata["choices"], help=f"{help} (default: {f.default!r})",
            )


def _optional(kind: type) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = f"{kind.__name__} or none"  # argparse: "invalid float or none value: 'x'"
    return convert


def chat_template_kwargs(args: Any) -> dict[str, Any]:
    """`--data.chat_template_kwargs` (`host/cli.py`) of OpenRLHF's nested arguments, which carry it as JSON text.

    Raises `ConfigError` for what is no JSON object, and where it would change nothing.
    """
    text = args.data.chat_template_kwargs
    try:
        kwargs = json.loads(text)
    except json.JSONDecodeError:
        kwargs = None
    if not isinstance(kwargs, dict):
        raise ConfigError(
            f"--data.chat_template_kwargs {text}: not a JSON object; give one, as '{{\"enable_thinking\": false}}'"
        )
    if taken := [name for name in ("conversation", "tokenize", "add_generation_prompt") if name in kwargs]:
        raise ConfigError(f"--data.chat_template_kwargs {text}: OpenRLHF sets {taken[0]} itself; leave it out")
    if kwargs and not args.data.apply_chat_template:
        raise ConfigError(
            f"--data.chat_template_kwargs {text}: no chat template renders these prompts; "
            "give --data.apply_chat_template, or leave it out"
        )
    return kwargs


def options_page(groups: Sequence[type[Group]]) -> str:
    """docs/options.md: every flag with its default."""
    lines = ["# Options", "", "Made by `openrlhf-sdpo options > docs/options.md`.", ""]
    for group in groups:
        lines += [f"## --{group.prefix}", "", group.__doc__ or "", "", "| flag | default | |", "| --- | --- | --- |"]
        for f in fields(group):
            choices = f"; one of {', '.join(f.metadata['choices'])}" if f.metadata["choices"] else ""
            default = str(f.default).replace("\n", "\\n")
            text = f"{f.metadata['help']}{choices}".replace("|", "\\|")
            lines.append(f"| `--{group.prefix}.{f.name}` | `{default}` | {text} |")
        lines.append("")
    return "\n".join(lines)
