"""What the policy model is given: the tokens of a micro-batch, or of those of its samples that are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sdpo_plugin.openrlhf_adapter.patch_points import patch_point
from sdpo_plugin.openrlhf_adapter.worker.ring import unpad_and_slice_tensor

merge_mm_train_inputs = patch_point(
    "openrlhf.trainer.ray.ppo_actor:merge_mm_train_inputs", "mm_train_inputs_list", "device"
)


def model_inputs(
    actor: Any,
    sequences: torch.Tensor,
    attention_mask: torch.Tensor,
    rows: torch.Tensor,
    images: Mapping[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, dict[str, Any], torch.Tensor]:
    """The model's tokens and its other inputs as OpenRLHF makes them (models/actor.py: `forward`), and `rows` in the
    shape of the tokens.

    Args:
        actor: OpenRLHF's. sequences, attention_mask: int64 [B, S]. rows: bool [B, S].
        images: what the processor made of all samples' images, if they have any.
    """
    if actor.packing_samples:
        tokens, position_ids, _, _, kept = unpad_and_slice_tensor(sequences, attention_mask, actor.ring.group)
        rows = actor.ring.slice(rows.reshape(1, -1)[:, kept])
        return tokens, {"attention_mask": None, "position_ids": position_ids}, rows
    if getattr(actor, "is_vlm", False):
        typed = {**images, **token_types(actor._vlm_config, sequences, images)} if images else {}
        return sequences, {"attention_mask": attention_mask, "position_ids": None, **typed}, rows
    position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
    return sequences, {"attention_mask": attention_mask, "position_ids": position_ids}, rows


def token_types(
    config: Any, sequences: torch.Tensor, images: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """By which models place and mask images: int32 [B, S], 1 at an image's tokens, 2 at a video's, else 0."""
    types = (sequences == config.image_token_id).to(torch.int32)
    if getattr(config, "video_token_id", None) is not None:
        types[sequences == config.video_token_id] = 2
    return {"mm_token_type_ids" if "image_grid_thw" in images else "token_type_ids": types}


def only(
    samples: torch.Tensor,
    sequences: torch.Tensor,
    attention_mask: torch.Tensor,
    action_mask: torch.Tensor,
    whole: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of `samples` (bool [B]) without padding that none of them needs.

    With no sample at all, two tokens of the first without a response, or with `whole`, for samples with images, all of
    it: other ranks may wait for this one (ZeRO-3).
    """
    if not samples.any():
        width = int(attention_mask[0].sum()) if whole else 2
        nothing = torch.zeros_like(action_mask[:1, : width - 1])
        return sequences[:1, :width], torch.ones_like(attention_mask[:1, :width]), nothing
    width = int(attention_mask[samples].any(dim=0).nonzero()[-1]) + 1
    return sequences[samples, :width], attention_mask[samples, :width], action_mask[samples, : width - 1]


def batches_within(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of sequences, the longest first, in batches of at most `max_tokens` with their padding, or of one."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
