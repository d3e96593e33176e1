"""What plugins and the OpenRLHF side hand each other: the batch, the micro-batch, models, and fragments of weights.

Shapes: B samples of a micro-batch, S tokens of a sequence, A = S - 1 positions that predict a token (OpenRLHF's action
positions, aligned from the right), N response tokens of the micro-batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from sdpo_plugin.config import ConfigError, chat_template_kwargs
from sdpo_plugin.distillation.fused import Head, Scores
from sdpo_plugin.distillation.prompts import FramedText, Messages, prompt_as_read, text_tokenizer

# Entries of OpenRLHF's `Experience.info`, the only field that carries new tensors to the policy workers.
ATTACHED = "plugin/"
SCALAR = "plugin scalar/"
ASKED = "asked/"  # of attached names
LOSS_MASK = "loss_mask"

# What a micro-batch can provide, with what it does if no plugin has a say (`openrlhf_needs`).
NEEDS = {"old_log_probs": True, "log_probs": True, "samples": True, "entropy": False}

# The largest tensor that is made, beside what stays, for what is done to all weights.
PIECE_BYTES = 256 * 2**20

HeadFunction = Callable[[torch.Tensor, Head, torch.Tensor], Scores]
Answers = dict[tuple[str, int, int], Any]  # by name, global step and number of the sample in its batch
Aggregate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (loss [B, A], mask [B, A]) -> scalar


# ── the controller: all samples of a step ──


class Turn(NamedTuple):
    """One action of a sample: its action positions `start : stop`, none where nothing was sampled, and what the
    environment said about this action alone (text or None).
    """

    start: int
    stop: int
    feedback: Any = None


class RolloutBatch:
    """All samples of one step, rewarded, in data order: `args.rollout.n_samples_per_prompt` per prompt.

    Attributes:
        samples: OpenRLHF's `Experience`, one row each, with `record` (the data-set row), `feedback` (text or None),
            `turns` (a `Turn` for each action, in order) and `skipped` (why it has no reward, or None).
        rewards: float per sample, before length penalties and baselines; None where the reward function failed and the
            sample is skipped (`--reward.on_error`).
        args: OpenRLHF's. tokenizer: the policy's, of a vision-language model without its processor.
        max_positions: the longest sequence that the policy model is made for, in tokens.
        step: OpenRLHF's global step that trains on the batch, from 1.
        metrics: scalars a plugin wants logged for this step.
        answers: once the step has trained (`openrlhf_trained`), what policy workers answered: of each name that was
            asked for, by number of the sample. One that no worker trained on is absent.
    """

    def __init__(
        self,
        samples: Sequence[Any],
        experiences: Sequence[Any],
        args: Any,
        tokenizer: Any,
        max_positions: float,
        step: int = 1,
    ) -> None:
        self.samples, self.args, self.tokenizer = samples, args, text_tokenizer(tokenizer)
        self.max_positions, self.step = max_positions, step
        self.metrics: dict[str, float] = {}
        self.answers: dict[str, dict[int, Any]] = {}
        self._experiences = experiences
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
        return prompt_as_read(own, self.prompt_ids(i), self.tokenizer, chat_template_kwargs(self.args), text)

    def prompt_ids(self, i: int) -> list[int]:
        """The tokens of `prompt`."""
        ids = self.samples[i].sequences[0].tolist()
        return ids[: len(ids) - len(self.response_ids(i))]

    def response_ids(self, i: int) -> list[int]:
        """Everything after sample i's prompt: its actions and, of an agent, the observations between them.

        Empty where an agent ended before its first action.
        """
        sample = self.samples[i]
        actions = sample.action_mask[0].nonzero()[:, 0].tolist()
        return sample.sequences[0, actions[0] + 1 :].tolist() if actions else []

    def response_mask(self, i: int) -> torch.Tensor:
        """Bool [A_i]: the action positions that predict a token of sample i's response."""
        return self.samples[i].action_mask[0].bool()

    def attach(self, name: str, values: Sequence[torch.Tensor]) -> None:
        """Send one tensor per sample (any shape) to the worker that trains on it: `micro_batch.data[name]`.

        The name `loss_mask` (bool [A_i] per sample, over its action positions) also defines what
        `micro_batch.loss_weights` are of.
        """
        for experience in self._experiences:
            experience.info[ATTACHED + name] = [values[i] for i in experience.index]

    def ask(self, name: str, samples: Iterable[int]) -> None:
        """Have the workers that train on these samples answer: `micro_batch.asked(name)`, and `answers[name]` later."""
        self.answers[name] = {}
        wanted = set(samples)
        self.attach(ASKED + name, [torch.tensor([self.step, i] if i in wanted else []) for i in range(len(self))])

    def take(self, answers: Answers) -> None:
        """Keep what a policy worker answered about this batch; of a step without training some may be of another."""
        for (name, step, number), value in answers.items():
            if step == self.step:
                self.answers[name][number] = value

    def attach_scalar(self, name: str, value: float) -> None:
        """Send a number along to all workers: `micro_batch.scalars[name]`."""
        for experience in self._experiences:
            experience.info[SCALAR + name] = [torch.tensor(value, dtype=torch.float64)] * len(experience.index)


def prompt_messages(record: dict[str, Any], args: Any) -> Messages:
    """The data-set row's chat, or its text in the frame of `--data.input_template`."""
    prompt = record[args.data.input_key]
    if args.data.apply_chat_template:
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
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


# ── every policy worker: a micro-batch on its way from data to loss ──


class MicroBatch:
    """Some samples of an optimizer step on one rank, through one forward and one backward pass.

    Attributes:
        worker: this rank's.
        experience: OpenRLHF's batch: `sequences`, `attention_mask` [B, S], `action_mask`, `advantages` [B, A], ...
        data: what plugins attached on the controller, a list of B tensors per name.
        scalars: the numbers that plugins attached there.
        needs: what the micro-batch provides, by the names of `NEEDS`.
        head: set it to a function `(hidden [N, H], Head, token_ids [N]) -> Scores` to run in place of the LM head.
        samples: set it to a bool [B] to have only those samples read; None: all. The head then gets their tokens, and
            the others keep the log-probabilities of the rollout.
        policy_weights: set it to [B] >= 0, the samples' weights in OpenRLHF's policy loss; None: 1 each.
        advantages: set it to [B, A] while the head runs, what OpenRLHF's policy loss takes for advantages; None: its
            own.
        scores: what `head` returned.
        loss: OpenRLHF's policy loss, a scalar, from there on.
        log_probs: [B, A], of the student; to differentiate them, need `log_probs`.
        entropy: [B, A], differentiable, if someone needs it.
        metrics: scalars to log, averaged over the response tokens of the whole rollout batch. Ranks add them up one by
            one, so every rank must have the same names, of `mean` too.
        rollout_correction: OpenRLHF's own, `(old_log_probs, rollout_log_probs, mask)`, `[B, A]` each -> `[B, A]`: the
            factor that its policy loss gives each token by `--algo.advantage.is_correction_*`; 0 outside the mask.
    """

    def __init__(
        self,
        worker: Worker,
        experience: Any,
        needs: Mapping[str, bool],
        token_mean: Aggregate,
        sample_mean: Aggregate,
        rollout_correction: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        answers: Answers | None = None,
    ) -> None:
        self.worker, self.experience, self.needs = worker, experience, needs
        info = experience.info  # OpenRLHF logs every entry that stays
        self.data = {k.removeprefix(ATTACHED): info.pop(k) for k in list(info) if k.startswith(ATTACHED)}
        scalars = [k for k in info if k.startswith(SCALAR)]
        self.scalars = {k.removeprefix(SCALAR): float(info.pop(k)[0]) for k in scalars}
        self._loss_mask = self.data.get(LOSS_MASK)
        self.head: HeadFunction | None = None
        self.samples: torch.Tensor | None = None
        self.policy_weights: torch.Tensor | None = None
        self.advantages: torch.Tensor | None = None
        self.scores: Scores | None = None
        self.loss: torch.Tensor | None = None
        self.log_probs: torch.Tensor | None = None
        self.entropy: torch.Tensor | None = None
        self.metrics: dict[str, float | torch.Tensor] = {}
        self.means: dict[str, tuple[float, float]] = {}
        self.rollout_correction = rollout_correction
        self._answers = {} if answers is None else answers  # of all micro-batches of the rollout batch on this rank
        self._token_mean, self._sample_mean = token_mean, sample_mean

    @property
    def loss_mask(self) -> torch.Tensor:
        """Bool [B, A]: the mask attached as `loss_mask`, or OpenRLHF's action mask."""
        return _padded(self.experience.action_mask, self._loss_mask)

    @property
    def response(self) -> torch.Tensor:
        """Bool [B, A]: the N response tokens that the student reads."""
        response = self.experience.action_mask.bool()
        return response if self.samples is None else response & self.samples[:, None]

    @property
    def loss_weights(self) -> torch.Tensor:
        """Float32 [B, A]: each token's share of the mean over `loss_mask` in the whole optimizer step.

        `(loss_weights * x).sum()` is the scalar to backpropagate: over all ranks and accumulated micro-batches it
        adds up to one mean, the way OpenRLHF's `aggregate_loss` does for its own loss (`--actor.loss_agg_mode`).
        """
        return self._weights(self._token_mean)

    @property
    def sample_weights(self) -> torch.Tensor:
        """Float32 [B, A]: likewise, of the mean over all samples of each one's mean over `loss_mask`.

        A sample without a token in it counts as zero, unless it has no response at all.
        """
        return self._weights(self._sample_mean)

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """[N], of the response tokens that the student reads: from [B, A], or from [B], a value per sample."""
        response = self.response
        values = values.to(response.device)
        return (values if values.ndim == 2 else values[:, None].expand(response.shape))[response]

    def policy_loss_inputs(
        self, log_probs: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What OpenRLHF's policy loss is given for its log-probabilities and advantages, [B, A] each."""
        if not self.needs["log_probs"]:
            log_probs = undifferentiable(log_probs, "log_probs")
        if self.advantages is not None:
            advantages = self.advantages
        if self.policy_weights is not None:
            # Every policy loss of OpenRLHF is proportional to a sample's advantages: this weighs the sample.
            advantages = advantages * self.policy_weights[:, None]
        return log_probs, advantages

    def mean(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float) -> None:
        """Log a mean as sum and number: those of all micro-batches and ranks are added. One of nothing is absent."""
        self.means[name] = (float(total), float(count))

    def asked(self, name: str) -> list[int]:
        """The rows of samples that the controller asks about (`RolloutBatch.ask`) and has no answer about yet.

        So a second pass over a sample is not asked.
        """
        samples = (tuple(sample.tolist()) for sample in self.data.get(ASKED + name, ()))
        return [row for row, sample in enumerate(samples) if sample and (name, *sample) not in self._answers]

    def answer(self, name: str, row: int, value: Any) -> None:
        """Tell the controller about a sample: anything that can be pickled, tensors in host memory."""
        step, number = self.data[ASKED + name][row].tolist()
        self._answers[name, step, number] = value

    def _weights(self, mean: Aggregate) -> torch.Tensor:
        unit = torch.zeros(self.loss_mask.shape, device=self.experience.sequences.device, requires_grad=True)
        return torch.autograd.grad(mean(unit, self.loss_mask.float()), unit)[0]


def attached_loss_mask(experience: Any) -> Any:
    """The masks that a plugin attached, one per sample of the batch (or the one of a single sample), or None."""
    return experience.info.get(ATTACHED + LOSS_MASK)


def loss_mask(experience: Any) -> torch.Tensor:
    """`MicroBatch.loss_mask` of a batch that has not become one yet."""
    return _padded(experience.action_mask, attached_loss_mask(experience))


def _padded(action_mask: torch.Tensor, attached: list[torch.Tensor] | None) -> torch.Tensor:
    if attached is None:
        return action_mask.bool()
    mask = torch.zeros_like(action_mask, dtype=torch.bool)
    for row, values in zip(mask, attached, strict=True):
        row[: len(values)] = values.bool()
    return mask


def response_rows(action_mask: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """Positions whose hidden state predicts a response token: bool [B, S] from the mask [B, A], aligned right."""
    left = sequences.shape[1] - 1 - action_mask.shape[1]
    return torch.nn.functional.pad(action_mask.bool(), (left, 1))


class Read(NamedTuple):
    """What a teacher reads of a sample of the micro-batch, and why.

    Attributes:
        sample: the number of its row.
        prompt: int64 [P], in place of the sample's own. at: bool [A], the action positions that it scores; some.
    """

    sample: int
    prompt: torch.Tensor
    at: torch.Tensor


def teacher_inputs(
    sequences: torch.Tensor, action_mask: torch.Tensor, reads: Sequence[Read]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """The teacher's reads, each as far as the last token that it scores.

    Everything behind the student's prompt is replayed as it is, so response tokens keep their order and number.
    Without any read, two tokens stand in: other ranks may wait for this one (ZeRO-3).

    Args:
        sequences: [B, S], right-padded. action_mask: [B, A].

    Returns:
        sequences, attention_mask [R, S'], rows bool [R, S'] of the N' positions that predict tokens to score, and
        which sample and action position each of these is of, int64 [N'] and [N'].
    """
    if not reads:
        stand_in, none = sequences[:1, :2], sequences.new_zeros(0)
        return stand_in, torch.ones_like(stand_in), torch.zeros_like(stand_in, dtype=torch.bool), (none, none)
    replayed, predicting, samples, positions = [], [], [], []
    for i, prompt, at in reads:
        first = int(action_mask[i].nonzero()[0]) + 1  # action position p predicts token p + 1
        scored = at.nonzero()[:, 0]
        replayed.append(torch.cat([prompt, sequences[i, first : int(scored[-1]) + 2]]))
        predicting.append(scored - first + len(prompt))
        samples.append(torch.full_like(scored, i))
        positions.append(scored)
    pad = torch.nn.utils.rnn.pad_sequence
    batch = pad(replayed, batch_first=True)
    mask = pad([torch.ones_like(r) for r in replayed], batch_first=True)
    rows = torch.zeros_like(batch, dtype=torch.bool)
    for row, at in zip(rows, predicting, strict=True):
        row[at] = True
    return batch, mask, rows, (torch.cat(samples), torch.cat(positions))


def combined_needs(said: Iterable[Mapping[str, bool] | None]) -> dict[str, bool]:
    """What a micro-batch provides: everything that anyone needs, and what nobody has let go of.

    Raises ConfigError for a name that is not in `NEEDS`.
    """
    answers = [answer for answer in said if answer is not None]
    if unknown := {name for answer in answers for name in answer}.difference(NEEDS):
        raise ConfigError(f"openrlhf_needs: a plugin names {min(unknown)}; choose from {', '.join(NEEDS)}")
    needs = {}
    for name, default in NEEDS.items():
        asked = [answer[name] for answer in answers if name in answer]
        needs[name] = any(asked) if asked else default
    return needs


class Undifferentiable(torch.autograd.Function):
    """Values whose gradient is an error rather than a silent zero: `apply(values, name)`."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, anchor: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        raise ConfigError(
            f"a plugin differentiates micro_batch.{ctx.name}, which has no gradient in this run because nobody said "
            f'that it is needed; let the plugin return {{"{ctx.name}": True}} from openrlhf_needs'
        )


def undifferentiable(values: torch.Tensor, name: str) -> torch.Tensor:
    return Undifferentiable.apply(values.detach(), torch.zeros((), requires_grad=True), name)


# ── models and their weights ──


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one parameter's fp32 master weight: elements `start : start + len(values)`, no copy."""

    start: int
    values: torch.Tensor


def pieces(numel: int, element_bytes: int = 8) -> Iterator[slice]:
    """`range(numel)` in slices whose elements (float64, if nothing else is said) fill at most `PIECE_BYTES`."""
    length = max(PIECE_BYTES // element_bytes, 1)
    return (slice(start, min(start + length, numel)) for start in range(0, numel, length))


class Model(Protocol):
    """A language model that can be read: the policy's own, or a teacher's."""

    def hidden_states(
        self, sequences: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor, max_tokens: int
    ) -> torch.Tensor:
        """[N, H] at the N positions of `rows` (bool [B, S]), in passes of at most `max_tokens`. Collective."""

    def whole_head(self) -> AbstractContextManager[Head]:
        """The LM head, whole on every rank while the context lasts. Collective."""


class TeacherModel(Model, Protocol):
    """A model for scoring only, whose weights can be set to follow the student's."""

    def images(self) -> dict[str, torch.Tensor]:
        """This rank's part of the weights, by the names of `Worker.masters` and laid out like them; views."""

    def publish(self) -> None:
        """Let all ranks know what was written to `images`. Collective."""

    def export(self, path: str) -> None:
        """Save the model in Hugging Face form. Collective."""

    def device_tensors(self) -> list[torch.Tensor]:
        """Weights of its own in device memory, all that are there between two passes. Collective."""


class Masters(Protocol):
    """The fp32 weights that the student's optimizer holds on this rank.

    Attributes:
        layout: of each rank, (name, start, number of elements) of its fragments, in order.
    """

    layout: Sequence[Sequence[tuple[str, int, int]]]

    def fragments(self) -> dict[str, Fragment]:
        """By parameter name; together the ranks hold every element. Valid until the optimizer moves or sleeps."""


class Worker(Protocol):
    """A policy worker: one rank of the student.

    Attributes:
        args: OpenRLHF's nested arguments.
        actor: the student, OpenRLHF's `Actor`; its model is `actor.model`, `actor.temperature` the rollout's.
        tokenizer, strategy, trainer: OpenRLHF's.
        masters: the optimizer's weights.
        rank, ranks: this policy worker's number, and how many there are.
    """

    args: Any
    actor: Any
    tokenizer: Any
    strategy: Any
    trainer: Any
    masters: Masters
    rank: int
    ranks: int

    def initial_model(self, offload: bool, follows: bool) -> TeacherModel:
        """The student as it was before training; with weights to write to, if it `follows` the student. Collective."""

    def model_at(self, path: str, offload: bool, zero_stage: int | None) -> TeacherModel:
        """The model at `path`, without adapters; zero_stage 0 or 3, or None for the student's. Collective."""
