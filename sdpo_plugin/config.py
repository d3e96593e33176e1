"""Every option of the plugin: its name, default, range and help, in one place.

Each dataclass is one flag group (`--distill.*`, `--teacher.*`, ...), one YAML section and one table of
docs/options.md. Values are checked on construction, so an instance is always usable.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field, fields
from operator import attrgetter
from types import SimpleNamespace
from typing import Any


def is_server(source: str) -> bool:
    """Whether a teacher's source is the address of servers, not a model."""
    return source.startswith(("http://", "https://"))


class ConfigError(ValueError):
    """A configuration with which no run can start; the message names the flag, the value and the fix."""


class StopTraining(RuntimeError):
    """Raised by a plugin in `openrlhf_metrics` to save a checkpoint and end the run with this message."""


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


class OptionGroup:
    """Base of the option groups: `prefix` is the flag prefix (`distill` -> `--distill.alpha`)."""

    prefix: str
    __dataclass_fields__: typing.ClassVar[dict[str, Any]]  # every group is a dataclass

    def __post_init__(self) -> None:
        for f in fields(self):
            choices = f.metadata["choices"]
            if choices and getattr(self, f.name) not in (*choices, f.default):
                self.fail(f.name, f"choose one of {', '.join(choices)}")
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` for a value out of range or an invalid combination."""

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
class DistillConfig(OptionGroup):
    """The distillation loss."""

    prefix = "distill"

    mode: str = option(
        "topk", "tokens of the vocabulary that the divergence is computed over: full: all; topk: the k most likely "
        "ones and a tail; sampled: only the sampled token", ("full", "topk", "sampled"),
    )
    alpha: float = option(
        0.5, "divergence: 0: forward KL(teacher||student); 1: reverse KL(student||teacher); in between: generalized "
        "Jensen-Shannon divergence"
    )
    topk: int | None = option(100, "number of tokens k with --distill.mode topk")
    support: str = option(
        "student", "model whose top-k tokens the divergence is computed over", ("student", "teacher", "union"),
    )
    add_tail: bool = option(
        True, "treat the probability outside the top-k as one more token (the tail); without it, the top-k is "
        "renormalized"
    )
    is_clip: float | None = option(
        2.0, "upper bound of the importance ratio between the student and the policy before the rollout's first "
        "update; none: no ratio. With one update per rollout the ratio is 1. The ratio between the policy and the vLLM "
        "engine is a factor of its own, set by --algo.advantage.is_correction_*",
    )
    kl_clip: float | None = option(
        None, "upper bound of the divergence that each vocabulary entry adds to a token (OPSD); none: no bound"
    )
    weight: float = option(
        1.0, "weight w of the distillation loss: the loss is (1-w) x OpenRLHF's policy loss + w x distillation loss; "
        "at 0 the run is OpenRLHF's own"
    )
    loss_agg_mode: str = option(
        "seq-mean-token-mean", "loss aggregation: seq-mean-token-mean: mean over each response's distilled tokens (0 "
        "without a teacher context), then over all responses of the optimizer step; token-mean: mean over all "
        "distilled tokens", ("seq-mean-token-mean", "token-mean"),
    )
    skip_tokens: int = option(
        0, "number of tokens at the start of each response that are left out of the distillation loss"
    )
    mask_truncated: bool = option(
        False, "leave truncated responses (those that reached the length limit) out of the distillation loss"
    )
    generate_from_teacher: bool = option(
        False, "generate responses from the teacher's prompt, and train the student on its own prompt"
    )

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
class TeacherConfig(OptionGroup):
    """The teacher: which model scores the responses, and where its weights are kept."""

    prefix = "teacher"

    kind: str = option(
        "ema", "teacher's weights: live: the student's current ones; base: the initial ones; ema: an exponential "
        "moving average (EMA) of the student; trust_region: logits between those of base and student; model: another "
        "model with the same tokenizer", ("live", "base", "ema", "trust_region", "model"),
    )
    update_rate: float = option(
        0.05, "EMA rate r of the teacher: teacher = (1-r) x teacher + r x student; with --teacher.kind trust_region, "
        "the weight of the student's logits",
    )
    sync_steps: int = option(1, "optimizer steps between two updates of the EMA teacher")
    model_name_or_path: str | None = option(
        None, "teacher with --teacher.kind model: a Hugging Face model name or directory"
    )
    zero_stage: int | None = option(
        None, "ZeRO stage of the teacher with --teacher.kind model: 0: all weights on every GPU; 3: partitioned; "
        "none: the student's stage"
    )
    offload: bool = option(False, "keep the teacher's weights in CPU memory between its forward passes")
    max_tokens_per_gpu: int = option(
        32768, "most tokens of one teacher forward pass, padding included; a larger micro-batch is scored in several "
        "passes, a longer sample in a pass of its own"
    )
    save: bool = option(False, "also save the EMA teacher as a Hugging Face model")
    scored_by: str = option(
        "worker", "what runs the teacher: worker: every policy worker; engine: vLLM engines, which return its top-k "
        "tokens: the rollout's own with --teacher.kind live, otherwise engines of the teacher's own",
        ("worker", "engine"),
    )
    num_engines: int = option(1, "number of the teacher's own vLLM engines, with --teacher.scored_by engine")
    tensor_parallel_size: int = option(1, "GPUs of each of the teacher's own vLLM engines")
    gpu_memory_utilization: float = option(
        0.9, "fraction of each GPU's memory that the teacher's own vLLM engines may use"
    )
    url: str | None = option(
        None, "running vLLM servers that score for --teacher.kind model, such as http://host:8000; several are "
        "separated by commas and take turns"
    )
    route_key: str | None = option(
        None, "dataset column that says which of several teachers scores a row, by --teacher.routes"
    )
    routes: str | None = option(
        None, "the teachers of --teacher.route_key, models or servers, as a JSON object from the column's values: "
        "'{\"math\": \"org/model\", \"code\": \"http://host:8000\"}'"
    )

    def check(self) -> None:
        if self.kind == "model" and not (self.model_name_or_path or self.url or self.routes):
            self.fail("kind", "this teacher needs a model; give --teacher.model_name_or_path, or --teacher.url")
        self._check_engines()
        for name in ("model_name_or_path", "zero_stage"):
            if self.kind != "model" and getattr(self, name) is not None:
                self.fail(name, f"not used by --teacher.kind {self.kind}; give --teacher.kind model, or leave it out")
        if self.zero_stage not in (None, 0, 3):
            self.fail("zero_stage", "the teacher is either whole on every GPU (0) or partitioned (3); give 0 or 3")
        self.positive("sync_steps", integer=True)
        self.positive("max_tokens_per_gpu", integer=True)
        if self.kind in ("ema", "trust_region"):
            self.in_unit_interval("update_rate")
            if self.update_rate == 0.0:
                self.fail("update_rate", "the teacher would never change; give --teacher.kind base")
            if self.update_rate == 1.0 and (self.kind == "trust_region" or self.sync_steps == 1):
                copies = ", or --teacher.sync_steps N to copy the student every N steps" * (self.kind == "ema")
                self.fail("update_rate", f"the teacher would be equal to the student; give --teacher.kind live{copies}")

    def _check_engines(self) -> None:
        self.positive("num_engines", integer=True)
        self.positive("tensor_parallel_size", integer=True)
        self.in_unit_interval("gpu_memory_utilization")
        if self.scored_by == "engine" and self.kind == "trust_region":
            self.fail("scored_by", "an engine cannot mix the logits of two models; give --teacher.kind ema or base")
        if self.scored_by == "engine" and self.zero_stage is not None:
            self.fail("zero_stage", "the teacher's engines have the weights; leave it out")
        if (self.routes is None) != (self.route_key is None):
            self.fail("route_key", "--teacher.route_key and --teacher.routes need each other; give both, or none")
        for name in ("url", "routes"):
            if getattr(self, name) is not None and (self.kind != "model" or self.scored_by != "engine"):
                self.fail(name, "give --teacher.kind model and --teacher.scored_by engine with it")
        given = [name for name in ("model_name_or_path", "url", "routes") if getattr(self, name) is not None]
        if len(given) > 1:
            self.fail(given[-1], f"it says where the teacher is; leave --teacher.{given[0]} out")
        self.sources("")

    def sources(self, student: str) -> dict[str | None, str]:
        """Where the teacher's engines have their weights from: models, or servers' addresses, by route; None: all rows.

        Args:
            student: the model of `base` and `ema`.
        """
        if self.routes is None:
            return {None: self.url or self.model_name_or_path or student}
        try:
            found = json.loads(self.routes)
        except json.JSONDecodeError:
            found = None
        if not isinstance(found, dict) or not found or not all(isinstance(at, str) and at for at in found.values()):
            self.fail("routes", 'give a JSON object such as \'{"math": "org/model", "code": "http://host:8000"}\'')
        return found


@dataclass(frozen=True)
class RepromptConfig(OptionGroup):
    """The teacher's prompt. Only the sections that `--reprompt.template` names are used."""

    prefix = "reprompt"

    success_threshold: float = option(
        0.5, "a response with at least this reward is a success and may be shown to the teacher of its group"
    )
    exclude_self: bool = option(True, "never show a successful response to the teacher that scores it")
    demonstration: str = option(
        "first", "which successful response of the group is shown to the teacher; consensus: the shortest response "
        "with the group's most frequent answer, whatever its reward, for the responses with another answer (arXiv "
        "2608.06296)",
        ("first", "random", "best", "shortest", "consensus"),
    )
    consensus_threshold: float = option(
        0.5, "with --reprompt.demonstration consensus, the least fraction of a group's responses with the same answer"
    )
    consensus_targets: int | None = option(
        1, "with --reprompt.demonstration consensus, how many of a group's responses with another answer are "
        "distilled, longest first; none: all"
    )
    remove_thinking: bool = option(
        True, "remove complete thinking sections from demonstrations and attempts, also one that the prompt opens"
    )
    thinking_tags: str | None = option(
        None, "opening and closing tags of thinking sections, such as \"<reasoning> </reasoning>\", in addition to "
        "those of known models (<think>, [THINK], gpt-oss's channels, ...); several pairs may be given"
    )
    use_feedback: bool = option(True, "show the environment's feedback on the response to the teacher")
    feedback_only_without_solution: bool = option(
        True, "show feedback on a response only if there is no demonstration; feedback on a single turn is always shown"
    )
    template: str = option(
        "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.",
        "text of the teacher's user turn, with the fields {prompt}, {solution}, {feedback}, {privileged_context} and "
        "{attempt}, the response that is scored, which is shown only beside another section",
    )
    solution_template: str = option(
        "\nCorrect solution:\n\n{successful_previous_attempt}", "text of the {solution} section, with the field "
        "{successful_previous_attempt}"
    )
    feedback_template: str = option(
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}",
        "text of the {feedback} section, with the field {feedback_raw}",
    )
    chat_template_kwargs: str | None = option(
        None, "additional chat-template arguments for the teacher's prompts, as a JSON object such as "
        "'{\"enable_thinking\": true}'; they override those of --data.chat_template_kwargs; none: the student's",
    )
    privileged_key: str = option("privileged_context", "dataset column that is shown as {privileged_context}")
    teacher_images: str | None = option(
        None, "dataset column of images that only the teacher sees, after the student's, such as a crop or an "
        "annotated copy; with --data.max_images_per_prompt"
    )
    max_len: int = option(10240, "longest teacher prompt in tokens; a longer one is truncated")
    truncation: str = option(
        "right", "side on which the sections of a teacher prompt are truncated if it is too long (never the question "
        "and the closing instruction); error: stop the run instead", ("right", "left", "middle", "error"),
    )
    seed: int = option(42, "random seed of --reprompt.demonstration random")

    def check(self) -> None:
        self.positive("max_len", integer=True)
        self.in_unit_interval("consensus_threshold")
        self.positive("consensus_targets", optional=True, integer=True)
        if self.demonstration == "consensus" and "{solution}" not in self.template:
            self.fail("demonstration", "--reprompt.template has no {solution}, where it would be shown; name it there")
        for name, known in (("template", "prompt"), ("solution_template", "successful_previous_attempt"),
                            ("feedback_template", "feedback_raw")):
            if "{" + known + "}" not in getattr(self, name):
                self.fail(name, "the template must contain {" + known + "}")
        if self.thinking_tags is not None and (not self.thinking_tags.strip() or len(self.thinking_tags.split()) % 2):
            self.fail("thinking_tags", 'give pairs of an opening and a closing tag, such as "<reasoning> </reasoning>"')


@dataclass(frozen=True)
class DiagnosticsConfig(OptionGroup):
    """The collapse monitor, and recorded samples."""

    prefix = "diagnostics"

    on_collapse: str = option(
        "warn", "action if the run degenerates: off: none; warn: log a warning; stop: save a checkpoint and stop once "
        "the teacher has collapsed; slow: lower the EMA rate while the context KL falls",
        ("off", "warn", "stop", "slow"),
    )
    interval: int = option(1, "rollout batches between two checks of the collapse monitor")
    patience: int = option(
        5, "consecutive checks that must find a degenerate state before the collapse monitor warns or stops the run"
    )
    log_samples: int = option(
        0, "samples of each rollout batch to record in samples.jsonl, next to the event files of "
        "--logger.tensorboard_dir: token by token, with the teacher's prompt and its most likely tokens; 12.5 kB per "
        "100 tokens, plus the texts"
    )

    def check(self) -> None:
        self.positive("interval", integer=True)
        self.positive("patience", integer=True)
        if not isinstance(self.log_samples, int) or self.log_samples < 0:
            self.fail("log_samples", "give an integer >= 0")


@dataclass(frozen=True)
class RewardConfig(OptionGroup):
    """Failures of the reward function, reward server or agent; for every run, with or without `--algo`."""

    prefix = "reward"

    on_error: str = option(
        "stop", "action after the last attempt has failed: stop: stop the run; skip: leave the sample out of the loss "
        "and of its group's statistics", ("stop", "skip"),
    )
    max_attempts: int = option(
        1, "attempts to get a sample's reward (of an agent: whole trajectories), with pauses of 1, 2, 4, ... s"
    )
    timeout: float = option(
        600.0, "seconds after which a reward call (of an agent: its reset or one step) counts as failed"
    )
    max_turns: int | None = option(
        None, "most turns of an agent's trajectory; none: no limit but --data.max_len, which limits its tokens"
    )
    max_skipped_fraction: float = option(
        0.1, "most of a rollout batch that may be skipped, as a fraction; the run stops above it"
    )

    def check(self) -> None:
        self.positive("max_attempts", integer=True)
        self.positive("timeout")
        self.positive("max_turns", optional=True, integer=True)
        self.in_unit_interval("max_skipped_fraction")


GROUPS: tuple[type[OptionGroup], ...] = (DistillConfig, TeacherConfig, RepromptConfig, DiagnosticsConfig)


def from_namespace(group: type[OptionGroup], args: Any) -> Any:
    """The group's instance, made from OpenRLHF's nested arguments (`args.distill.alpha`)."""
    section = vars(attrgetter(group.prefix)(args))
    return group(**{f.name: section[f.name] for f in dataclasses.fields(group)})


def flat(nested: SimpleNamespace, prefix: str = "") -> dict[str, Any]:
    """OpenRLHF's nested arguments by dotted name."""
    found: dict[str, Any] = {}
    for key, value in vars(nested).items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, SimpleNamespace) else {f"{prefix}{key}": value}
    return found
