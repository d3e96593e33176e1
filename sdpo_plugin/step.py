"""One micro-batch on a policy worker, as plugins see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from sdpo_plugin.config import ConfigError
from sdpo_plugin.fused import Head, Scores

# Entries of the host's `Experience.info`, the only field that carries new tensors to the policy workers.
ATTACHED = "plugin/"
LOSS_MASK = "loss_mask"

# What a step can provide, with what it does if no plugin has a say (`openrlhf_needs`).
NEEDS = {"old_log_probs": True, "log_probs": True, "samples": True, "entropy": False}

HeadFunction = Callable[[torch.Tensor, Head, torch.Tensor], Scores]
Aggregate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (loss [B, A], mask [B, A]) -> scalar


def combined_needs(said: Iterable[Mapping[str, bool] | None]) -> dict[str, bool]:
    """What the step provides: everything that anyone needs, and what nobody has let go of.

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
            f"a plugin differentiates step.{ctx.name}, which has no gradient in this run because nobody said that it "
            f'is needed; let the plugin return {{"{ctx.name}": True}} from openrlhf_needs'
        )


def undifferentiable(values: torch.Tensor, name: str) -> torch.Tensor:
    return Undifferentiable.apply(values.detach(), torch.zeros((), requires_grad=True), name)


class PolicyStep:
    """One micro-batch on its way from data to loss.

    Attributes:
        worker: this rank's `host.worker.PolicyWorker`.
        experience: the host's batch: `sequences`, `attention_mask` [B, S], `action_mask`, `advantages` [B, A], ...
        data: what plugins attached on the controller, a list of B tensors per name.
        needs: what the step provides, by the names of `NEEDS`.
        head: set it to a function `(hidden [N, H], Head, token_ids [N]) -> Scores` to run in place of the LM head.
        samples: set it to a bool [B] to have only those samples read; None: all. The head then gets their tokens, and
            the others keep the log-probabilities of the rollout.
        scores: what that function returned.
        loss: the host's policy loss, a scalar, from there on.
        log_probs: [B, A], of the student; to differentiate them, need `log_probs`.
        entropy: [B, A], differentiable, if someone needs it.
        metrics: scalars to log, averaged over the step's response tokens.
        sums: the algorithm's, (sum, number) of tokens by name, from `head` to the loss.
        rollout_correction: the host's own, `(old_log_probs, rollout_log_probs, mask)`, `[B, A]` each -> `[B, A]`: the
            factor that its policy loss gives each token by `--algo.advantage.is_correction_*`; 0 outside the mask.
    """

    def __init__(
        self,
        worker: Any,
        experience: Any,
        needs: Mapping[str, bool],
        token_mean: Aggregate,
        sample_mean: Aggregate,
        rollout_correction: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        self.worker, self.experience, self.needs = worker, experience, needs
        info = experience.info  # the host logs every entry that stays
        self.data = {k.removeprefix(ATTACHED): info.pop(k) for k in list(info) if k.startswith(ATTACHED)}
        self.head: HeadFunction | None = None
        self.samples: torch.Tensor | None = None
        self.scores: Scores | None = None
        self.loss: torch.Tensor | None = None
        self.log_probs: torch.Tensor | None = None
        self.entropy: torch.Tensor | None = None
        self.metrics: dict[str, float | torch.Tensor] = {}
        self.sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.rollout_correction = rollout_correction
        self._token_mean, self._sample_mean = token_mean, sample_mean

    @property
    def loss_mask(self) -> torch.Tensor:
        """Bool [B, A]: the mask attached as `loss_mask`, or the host's action mask."""
        return loss_mask(self.experience, self.data.get(LOSS_MASK))

    @property
    def response(self) -> torch.Tensor:
        """Bool [B, A]: the N response tokens that the student reads."""
        response = self.experience.action_mask.bool()
        return response if self.samples is None else response & self.samples[:, None]

    @property
    def loss_weights(self) -> torch.Tensor:
        """Float32 [B, A]: each token's share of the mean over `loss_mask` in the whole optimizer step.

        `(loss_weights * x).sum()` is the scalar to backpropagate: over all ranks and accumulated micro-batches it
        adds up to one mean, the way the host's `aggregate_loss` does for its own loss (`--actor.loss_agg_mode`).
        """
        return self._weights(self._token_mean)

    @property
    def sample_weights(self) -> torch.Tensor:
        """Float32 [B, A]: likewise, of the mean over all samples of each one's mean over `loss_mask`.

        A sample without a token in it counts as zero, unless it has no response at all.
        """
        return self._weights(self._sample_mean)

    def _weights(self, mean: Aggregate) -> torch.Tensor:
        unit = torch.zeros(self.loss_mask.shape, device=self.experience.sequences.device, requires_grad=True)
        return torch.autograd.grad(mean(unit, self.loss_mask.float()), unit)[0]


def loss_mask(experience: Any, attached: list[torch.Tensor] | None) -> torch.Tensor:
    if attached is None:
        return experience.action_mask.bool()
    mask = torch.zeros_like(experience.action_mask, dtype=torch.bool)
    for row, values in zip(mask, attached, strict=True):
        row[: len(values)] = values.bool()
    return mask


def response_rows(action_mask: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """Positions whose hidden state predicts a response token: bool [B, S] from the mask [B, A], aligned right."""
    left = sequences.shape[1] - 1 - action_mask.shape[1]
    return torch.nn.functional.pad(action_mask.bool(), (left, 1))
