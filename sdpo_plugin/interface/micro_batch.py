"""The policy worker's micro-batch, on its way from data to loss.

B samples, S tokens of a sequence, A = S - 1 action positions: those that predict a token, aligned from the right; N
response tokens of the micro-batch, H hidden size, V vocabulary. With ring attention (`--ds.ring_attn_size`) all ranks
of a ring have the same micro-batch, and N are the response tokens in this rank's slice of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from sdpo_plugin.config import ConfigError
from sdpo_plugin.distillation.fused import HeadOutput
from sdpo_plugin.distillation.head import Head
from sdpo_plugin.interface.models import Images, Worker
from sdpo_plugin.interface.ring import OneRank
from sdpo_plugin.interface.transport import ATTACHED, LOSS_MASK, REQUESTED, SCALAR, Reports, padded_mask, response_rows

# What a micro-batch can provide, with its default if no plugin requires it (`openrlhf_requirements`).
REQUIREMENTS = {"old_log_probs": True, "log_probs": True, "all_samples": True, "entropy": False}

HeadFunction = Callable[[torch.Tensor, Head, torch.Tensor], HeadOutput]
Aggregate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (loss [B, A], mask [B, A]) -> scalar


class MicroBatch:
    """Some samples of an optimizer step on one rank, through one forward and one backward pass.

    Attributes:
        worker: this rank's.
        experience: OpenRLHF's batch: `sequences`, `attention_mask` [B, S], `action_mask`, `advantages` [B, A], ...
        data: what plugins attached on the controller, a list of B tensors per name.
        scalars: the numbers that plugins attached there.
        required: what the micro-batch provides, by the names of `REQUIREMENTS`.
        head_fn: set it to a function `(hidden [N, H], Head, token_ids [N]) -> HeadOutput` to run in place of the LM
            head.
        sample_mask: set it to a bool [B] to have only those samples scored; None: all. The head then gets their tokens,
            and the others keep the log-probabilities of the rollout.
        policy_weights: set it to [B] >= 0, the samples' weights in OpenRLHF's policy loss; None: 1 each.
        advantages: set it to [B, A] while the head runs, what OpenRLHF's policy loss takes for advantages; None: its
            own.
        head_output: what `head_fn` returned, its loss summed over the ring.
        loss: OpenRLHF's policy loss, a scalar, from there on.
        log_probs: [B, A], of the student; to differentiate them, need `log_probs`.
        entropy: [B, A], differentiable, if someone required it.
        metrics: scalars to log, averaged over the response tokens of the whole rollout batch. Ranks add them up one by
            one, so every rank must have the same names, of `mean` too.
        rollout_correction: OpenRLHF's own, `(old_log_probs, rollout_log_probs, mask)`, `[B, A]` each -> `[B, A]`: the
            factor that its policy loss gives each token by `--algo.advantage.is_correction_*`; 0 outside the mask.
        ring: the ranks that share the micro-batch.
    """

    def __init__(
        self,
        worker: Worker,
        experience: Any,
        required: Mapping[str, bool],
        token_mean: Aggregate,
        sample_mean: Aggregate,
        rollout_correction: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        reports: Reports | None = None,
        ring: OneRank | None = None,
    ) -> None:
        self.worker, self.experience, self.required = worker, experience, required
        self.ring = ring or OneRank()
        info = experience.info  # OpenRLHF logs every entry that stays
        self.data = {k.removeprefix(ATTACHED): info.pop(k) for k in list(info) if k.startswith(ATTACHED)}
        scalars = [k for k in info if k.startswith(SCALAR)]
        self.scalars = {k.removeprefix(SCALAR): float(info.pop(k)[0]) for k in scalars}
        self._loss_mask = self.data.get(LOSS_MASK)
        self.head_fn: HeadFunction | None = None
        self.sample_mask: torch.Tensor | None = None
        self.policy_weights: torch.Tensor | None = None
        self.advantages: torch.Tensor | None = None
        self.head_output: HeadOutput | None = None
        self.loss: torch.Tensor | None = None
        self.log_probs: torch.Tensor | None = None
        self.entropy: torch.Tensor | None = None
        self.metrics: dict[str, float | torch.Tensor] = {}
        self.means: dict[str, tuple[float, float]] = {}
        self.rollout_correction = rollout_correction
        self._reports = {} if reports is None else reports  # of all micro-batches of the rollout batch on this rank
        self._token_mean, self._sample_mean = token_mean, sample_mean

    @property
    def images(self) -> Images | None:
        """Of each sample; None if none has any."""
        found = getattr(self.experience, "mm_train_inputs", None)
        return found if found and any(inputs is not None for inputs in found) else None

    @property
    def loss_mask(self) -> torch.Tensor:
        """Bool [B, A]: the mask attached as `loss_mask`, or OpenRLHF's action mask."""
        return padded_mask(self.experience.action_mask, self._loss_mask)

    @property
    def response(self) -> torch.Tensor:
        """Bool [B, A]: the N response tokens that the student scores."""
        response, attended = self.response_of_ring, self.experience.attention_mask.bool()
        if self.sample_mask is not None:
            attended = attended & self.sample_mask[:, None]
        return self.ring.local(response_rows(response, attended), attended)[:, -1 - response.shape[1] : -1]

    @property
    def response_of_ring(self) -> torch.Tensor:
        """Bool [B, A]: the response tokens that the student scores, on whichever rank of the ring."""
        response = self.experience.action_mask.bool()
        return response if self.sample_mask is None else response & self.sample_mask[:, None]

    @property
    def loss_weights(self) -> torch.Tensor:
        """Float32 [B, A]: each token's weight in the mean over all tokens of `loss_mask` in the whole optimizer step.

        `(loss_weights * x).sum()` is the scalar to backpropagate: over all ranks and accumulated micro-batches it
        adds up to one mean, as OpenRLHF's `aggregate_loss` makes it at `--actor.loss_agg_mode token-mean`.
        """
        return self._weights(self._token_mean)

    @property
    def sample_weights(self) -> torch.Tensor:
        """Float32 [B, A]: the same for the mean over all samples of each one's mean over `loss_mask`.

        A sample without a token in it counts as zero, unless it has no response at all.
        """
        return self._weights(self._sample_mean)

    def to_response_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """[N], of the response tokens that the student scores: from [B, A], or from [B], a value per sample."""
        response = self.response
        values = values.to(response.device)
        return (values if values.ndim == 2 else values[:, None].expand(response.shape))[response]

    def of_ring(self, values: torch.Tensor) -> torch.Tensor:
        """Values at all `response_of_ring`, in their order, from [N, ...] on each rank; no gradient. Collective."""
        return self.ring.gather(values, self.response[self.response_of_ring])

    def policy_loss_inputs(
        self, log_probs: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What OpenRLHF's policy loss is given for its log-probabilities and advantages, [B, A] each."""
        if not self.required["log_probs"]:
            log_probs = undifferentiable(log_probs, "log_probs")
        if self.advantages is not None:
            advantages = self.advantages
        if self.policy_weights is not None:
            # Every policy loss of OpenRLHF is proportional to a sample's advantages: this weighs the sample.
            advantages = advantages * self.policy_weights[:, None]
        return log_probs, advantages

    def log_mean(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float) -> None:
        """Log a mean as sum and number: those of all micro-batches and ranks are added. One of nothing is absent."""
        self.means[name] = (float(total), float(count))

    def requested_rows(self, name: str) -> list[int]:
        """The rows of samples for which the controller requested a report (`RolloutBatch.request`) and has none yet.

        So a second pass over a sample does not report again.
        """
        samples = (tuple(sample.tolist()) for sample in self.data.get(REQUESTED + name, ()))
        return [row for row, sample in enumerate(samples) if sample and (name, *sample) not in self._reports]

    def report(self, name: str, row: int, value: Any) -> None:
        """Send the controller a value for a sample: anything that can be pickled, tensors in CPU memory."""
        step, number = self.data[REQUESTED + name][row].tolist()
        self._reports[name, step, number] = value

    def release(self) -> None:
        """Drop what its pass has made, after the backward pass: a head function and its micro-batch hold each other."""
        self.head_fn = self.head_output = self.loss = self.log_probs = self.entropy = self.advantages = None

    def _weights(self, mean: Aggregate) -> torch.Tensor:
        unit = torch.zeros(self.loss_mask.shape, device=self.experience.sequences.device, requires_grad=True)
        return torch.autograd.grad(mean(unit, self.loss_mask.float()), unit)[0]


def combined_requirements(said: Iterable[Mapping[str, bool] | None]) -> dict[str, bool]:
    """What a micro-batch provides: all that any plugin requires, and by default what no plugin declares unneeded.

    Raises ConfigError for a name that is not in `REQUIREMENTS`.
    """
    answers = [answer for answer in said if answer is not None]
    if unknown := {name for answer in answers for name in answer}.difference(REQUIREMENTS):
        raise ConfigError(
            f"openrlhf_requirements: a plugin names {min(unknown)}; choose from {', '.join(REQUIREMENTS)}"
        )
    required = {}
    for name, default in REQUIREMENTS.items():
        asked = [answer[name] for answer in answers if name in answer]
        required[name] = any(asked) if asked else default
    return required


class Undifferentiable(torch.autograd.Function):
    """Values whose gradient is an error rather than a silent zero: `apply(values, name)`."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, anchor: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        raise ConfigError(
            f"a plugin differentiates micro_batch.{ctx.name}, which has no gradient in this run because no plugin set "
            f'that it is needed; let the plugin return {{"{ctx.name}": True}} from openrlhf_requirements'
        )


def undifferentiable(values: torch.Tensor, name: str) -> torch.Tensor:
    return Undifferentiable.apply(values.detach(), torch.zeros((), requires_grad=True), name)