"""How tensors get from the controller to the policy workers: entries of OpenRLHF's `Experience.info`.

B samples, S tokens of a sequence, A = S - 1 action positions: those that predict a token, aligned from the right.
"""

from __future__ import annotations

from typing import Any

import torch

# Entries of OpenRLHF's `Experience.info`, the only field that carries new tensors to the policy workers.
ATTACHED = "plugin/"
SCALAR = "plugin scalar/"
REQUESTED = "requested/"  # of attached names
LOSS_MASK = "loss_mask"

Reports = dict[tuple[str, int, int], Any]  # by name, global step and number of the sample in its batch


def attached_loss_mask(experience: Any) -> Any:
    """The masks that a plugin attached, one per sample of the batch (or the one of a single sample), or None."""
    return experience.info.get(ATTACHED + LOSS_MASK)


def loss_mask(experience: Any) -> torch.Tensor:
    """`MicroBatch.loss_mask` of a batch that has not become one yet."""
    return padded_mask(experience.action_mask, attached_loss_mask(experience))


def padded_mask(action_mask: torch.Tensor, attached: list[torch.Tensor] | None) -> torch.Tensor:
    """Bool [B, A]: the masks attached for each sample (bool [A_i]), or `action_mask` without any."""
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