"""The controller's batch: all samples of a step, before they are divided among the policy workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from sdpo_plugin.config import ConfigError
from sdpo_plugin.distillation.chat_arguments import chat_template_kwargs
from sdpo_plugin.distillation.images import media_tokens, with_runs, with_tags_as_parts
from sdpo_plugin.distillation.prompts import FramedText, Messages, prompt_as_scored, text_tokenizer
from sdpo_plugin.interface.transport import ATTACHED, REQUESTED, SCALAR, Reports


class Turn(NamedTuple):
    """One action of a sample: its action positions `start : stop`, none where nothing was sampled, and what the
    environment said about this action alone (text or None).
    """

    start: int
    stop: int
    feedback: Any = None


class SentRow(dict[str, Any]):
    """The columns of a dataset row that were sent to the controller; access to another is an error."""

    def __init__(self, row: Mapping[str, Any], columns: Iterable[str]) -> None:
        super().__init__({name: row[name] for name in row if name in set(columns)})
        self.others = frozenset(row) - self.keys()

    def __missing__(self, name: str) -> Any:
        if name in self.others:
            raise KeyError(
                f"{name}: asynchronous runs send only the columns that plugins name in openrlhf_record_columns"
            )
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self or name in self.others else default


class ToScore(NamedTuple):
    """A request to the teacher's engines: the log-probabilities of `ids` from position `start` on, at least 1.

    `route`: which of several teachers is asked (`--teacher.route_key`).
    """

    ids: Sequence[int]
    start: int
    route: str | None = None


class Scores(NamedTuple):
    """An engine's answer, for n = len(ids) - start tokens.

    Attributes:
        sampled: float32 [n], of the tokens themselves.
        ids: int32 [n, K], the likeliest tokens, in order. log_probs: float32 [n, K], theirs.
    """

    sampled: torch.Tensor
    ids: torch.Tensor
    log_probs: torch.Tensor


class TeacherEngines(Protocol):
    """The vLLM engines that score for the teacher (`--teacher.scored_by engine`)."""

    max_tokens: int  # of a request

    def begin(self, requests: Sequence[ToScore], topk: int) -> None:
        """Send requests ahead, whose answers the next `score` will ask for; those that it does not are dropped."""

    def score(self, requests: Sequence[ToScore], topk: int) -> list[Scores]:
        """The scores of each request. Raises TeacherError where an engine fails."""


class RolloutBatch:
    """All samples of one step, rewarded, in data order: `args.rollout.n_samples_per_prompt` per prompt.

    Attributes:
        samples: OpenRLHF's `Experience`, one row each, with `record` (the dataset row; in an asynchronous run a
            `SentRow`), `feedback` (text or None),
            `turns` (a `Turn` for each action, in order) and `skipped` (why it has no reward, or None).
        rewards: float per sample, before length penalties and baselines; None where the reward function failed and the
            sample is skipped (`--reward.on_error`).
        args: OpenRLHF's. tokenizer: the policy's; of a vision-language model `processor` is what it comes in.
        max_seq_len: the longest sequence that the policy model is made for, in tokens.
        step: OpenRLHF's global step that trains on the batch, from 1.
        teacher_engines: what scores for the teacher, or None: the policy workers do.
        engine_scores: with them, of each sample its response tokens' scores with the first teacher context.
        metrics: scalars to log for this step.
        reports: once the step has trained (`openrlhf_after_training_step`), what the policy workers reported: for each
            requested name, by number of the sample. A sample that no worker trained on is absent.
    """

    def __init__(
        self,
        samples: Sequence[Any],
        experiences: Sequence[Any],
        args: Any,
        tokenizer: Any,
        max_seq_len: float,
        step: int = 1,
        teacher_engines: TeacherEngines | None = None,
    ) -> None:
        self.teacher_engines = teacher_engines
        self.engine_scores: Sequence[Scores] | None = None
        self.samples, self.args, self.tokenizer, self.processor = samples, args, text_tokenizer(tokenizer), tokenizer
        self.max_seq_len, self.step = max_seq_len, step
        self.metrics: dict[str, float] = {}
        self.reports: dict[str, dict[int, Any]] = {}
        self._experiences = experiences
        self._prompts: dict[str, Messages] = {}
        self.rewards: list[float | None] = [0.0] * len(samples)
        for experience in experiences:
            for index, reward in zip(experience.index, experience.rewards.tolist(), strict=True):
                self.rewards[index] = None if getattr(samples[index], "skipped", None) else reward

    def __len__(self) -> int:
        return len(self.samples)

    def group(self, i: int) -> int:
        """The number of sample i's prompt in this batch."""
        return i // self.args.rollout.n_samples_per_prompt

    def prompt(self, i: int) -> Messages:
        """What sample i's student read before its first action: the row's prompt, or what an agent made of it."""
        own = prompt_messages(self.samples[i].record, self.args)
        (text,) = getattr(self.samples[i], "prompts", [None])
        ids = self.prompt_ids(i)
        if isinstance(own, list) and (inputs := self.images(i)) is not None:
            own = with_runs(own, self.processor, inputs, ids)
        key = repr((own, ids, text))  # siblings share a prompt
        if key not in self._prompts:
            self._prompts[key] = prompt_as_scored(own, ids, self.tokenizer, chat_template_kwargs(self.args), text)
        return self._prompts[key]

    def images(self, i: int) -> Mapping[str, torch.Tensor] | None:
        """What the processor made of sample i's images, in their order; None if it has none."""
        (inputs,) = getattr(self.samples[i], "mm_train_inputs", None) or [None]
        return inputs

    def image_tokens(self, ids: Sequence[int]) -> int:
        """How many tokens of images `ids` have."""
        media = media_tokens(self.processor)
        return sum(token in media for token in ids) if media else 0

    def prompt_ids(self, i: int) -> list[int]:
        """The tokens of `prompt`."""
        return self.samples[i].sequences[0, : self._first_token(i)].tolist()

    def response_ids(self, i: int) -> list[int]:
        """Everything after sample i's prompt: its actions and, of an agent, the observations between them.

        Empty where an agent ended before its first action.
        """
        return self.samples[i].sequences[0, self._first_token(i) :].tolist()

    def _first_token(self, i: int) -> int:
        """The position of sample i's first sampled token; the number of tokens, where there is none."""
        actions = self.samples[i].action_mask[0].bool()
        return int(actions.int().argmax()) + 1 if bool(actions.any()) else self.samples[i].sequences.shape[1]

    def response_mask(self, i: int) -> torch.Tensor:
        """Bool [A_i]: the action positions that predict a token of sample i's response."""
        return self.samples[i].action_mask[0].bool()

    def route(self, i: int) -> str | None:
        """Which of several teachers scores sample i; None: there is one."""
        key = self.args.teacher.route_key
        return None if key is None else str(self.samples[i].record[key])

    def attach(self, name: str, values: Sequence[torch.Tensor]) -> None:
        """Send one tensor per sample (any shape) to the worker that trains on it: `micro_batch.data[name]`.

        The name `loss_mask` (bool [A_i] per sample, over its action positions) also defines what
        `micro_batch.loss_weights` are of.
        """
        for experience in self._experiences:
            experience.info[ATTACHED + name] = [values[i] for i in experience.index]

    def request(self, name: str, samples: Iterable[int]) -> None:
        """Have the workers that train on these samples report (`micro_batch.requested_rows`), into `reports[name]`."""
        self.reports[name] = {}
        wanted = set(samples)
        self.attach(REQUESTED + name, [torch.tensor([self.step, i] if i in wanted else []) for i in range(len(self))])

    def collect_reports(self, reports: Reports) -> None:
        """Keep what a policy worker reported on this batch; after a step without training some may be of another."""
        for (name, step, number), value in reports.items():
            if step == self.step:
                self.reports[name][number] = value

    def attach_scalar(self, name: str, value: float) -> None:
        """Send a number along to all workers: `micro_batch.scalars[name]`."""
        for experience in self._experiences:
            experience.info[SCALAR + name] = [torch.tensor(value, dtype=torch.float64)] * len(experience.index)


def has_images(args: Any) -> bool:
    """Whether rows may have images (`--data.max_images_per_prompt`)."""
    return getattr(args.data, "max_images_per_prompt", 0) > 0


def prompt_messages(record: dict[str, Any], args: Any) -> Messages:
    """The dataset row's chat, or its text in the frame of `--data.input_template`."""
    prompt = record[args.data.input_key]
    if args.data.apply_chat_template:
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return with_tags_as_parts(chat) if has_images(args) else chat
    if not args.data.input_template:
        return prompt
    before, after = input_frame(args.data.input_template)
    return FramedText(before, prompt, after)


def input_frame(template: str) -> tuple[str, str]:
    """What `--data.input_template` puts before and after a prompt. Raises ConfigError unless it has one `{}`."""
    try:
        before, after = template.format("\0").split("\0")
    except (ValueError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"--data.input_template {template!r}: it has not exactly one {{}}, where the prompt goes "
            f"({type(error).__name__}: {error}); write braces of its own twice, as in {{{{\"answer\": 1}}}}"
        ) from error
    return before, after