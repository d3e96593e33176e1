"""Ring attention (`--ds.ring_attn_size`): each rank of a ring has a slice of the packed micro-batch.

B samples, S tokens of a sequence; T tokens of all samples, one after the other, filled up to a multiple of the ring's
size; rank r has the r-th of that many equal slices. N rows of a forward pass (tokens that something is computed of), n
of them on this rank, H hidden size.

A loss over the N rows is the sum of the ranks' own. Its gradient is multiplied by the ring's size on the way to each
rank's part, as it is by `gather_and_pad_tensor`: DeepSpeed averages gradients over all ranks, those of a ring included.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from sdpo_plugin.interface.models import chunks
from sdpo_plugin.interface.ring import OneRank
from sdpo_plugin.openrlhf_adapter.patch_points import patch_point

_UTILS = "openrlhf.models.ring_attn_utils"
get_ring_attn_group = patch_point(f"{_UTILS}:get_ring_attn_group")
unpad_and_slice_tensor = patch_point(
    f"{_UTILS}:unpad_and_slice_tensor", "sequences", "attention_mask", "ring_attn_group"
)
slice_of_rank = patch_point(f"{_UTILS}:get_tensor_in_current_ring_attn_rank", "tensors", "ring_attn_group", "pad_id")
gather_and_pad_tensor = patch_point(
    f"{_UTILS}:gather_and_pad_tensor", "tensor", "ring_attn_group", "ring_attn_pad_len", "indices", "batch", "seqlen"
)


def current_ring() -> NoRing:
    """The ring of this process, which OpenRLHF's strategy sets up."""
    group = get_ring_attn_group()
    return NoRing() if group is None else Ring(group)


class NoRing(OneRank):
    """Without ring attention: nothing is sliced and nothing is gathered.

    Attributes:
        group: OpenRLHF's process group of the ring.
    """

    group: Any = None

    def slice(self, packed: torch.Tensor) -> torch.Tensor:
        """This rank's part of a packed [1, T]."""
        return packed

    def gather_rows(self, values: torch.Tensor, rows: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """[N] from each rank's [n] at the N positions of `rows` (bool [B, S]). Differentiable. Collective."""
        return values

    def sum_of_losses(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of all N rows from that of each rank's n. Differentiable. Collective."""
        return loss

    def route(
        self, hidden: torch.Tensor, attended: torch.Tensor, rows: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states where they are needed: those of this rank's n of the N `rows` go in, the `wanted` come out.

        Without a gradient. Collective.

        Args:
            hidden: [n, H]. attended, rows: bool [B, S]. wanted: bool [N], those that this rank needs.
        """
        return hidden if wanted.all() else hidden[wanted]


class Ring(NoRing):
    """This rank's position in the ring of a packed micro-batch.

    Attributes:
        rank: this rank's number in the group.
    """

    def __init__(self, group: Any) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def owner(self, attended: torch.Tensor) -> torch.Tensor:
        """The rank in the ring that has each token: int64 [B, S]; -1 where there is none (`attended`, bool [B, S])."""
        position = attended.reshape(-1).cumsum(0).view_as(attended) - 1
        length = max(-(-int(attended.sum()) // self.size), 1)
        return (position // length).masked_fill(~attended, -1)

    def local(self, rows: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return rows & (self.owner(attended) == self.rank)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        total = values.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def gather(self, values: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        kind = torch.int32 if values.dtype == torch.bool else values.dtype
        every = torch.zeros(len(local), *values.shape[1:], dtype=kind, device=values.device)
        every[local] = values.detach().to(kind)
        return self.sum(every).to(values.dtype)

    def slice(self, packed: torch.Tensor) -> torch.Tensor:
        return slice_of_rank(packed, self.group, 0)[0]

    def gather_rows(self, values: torch.Tensor, rows: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        indices = attended.reshape(-1).nonzero()[:, 0]
        here = self.slice(rows.reshape(1, -1)[:, indices])
        line = values.new_zeros(here.shape).masked_scatter(here, values)
        padding = -len(indices) % self.size
        return gather_and_pad_tensor(line, self.group, padding, indices, *rows.shape)[rows]

    def sum_of_losses(self, loss: torch.Tensor) -> torch.Tensor:
        return _SumOfLosses.apply(loss, self)

    def route(
        self, hidden: torch.Tensor, attended: torch.Tensor, rows: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        """Each rank sends its rows to all others, at most `MAX_CHUNK_BYTES` at a time."""
        owner, place = self.owner(attended)[rows], wanted.cumsum(0) - 1
        found = hidden.new_empty(int(wanted.sum()), hidden.shape[1])
        for source in range(self.size):
            sent = (owner == source).nonzero()[:, 0]
            for chunk in chunks(len(sent), hidden.shape[1] * hidden.element_size()):
                own = sent[chunk]
                states = hidden[chunk] if source == self.rank else hidden.new_empty(len(own), hidden.shape[1])
                dist.broadcast(states, dist.get_global_rank(self.group, source), group=self.group)
                needed = wanted[own]
                found[place[own[needed]]] = states[needed]
        return found


class _SumOfLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, ring: Ring) -> torch.Tensor:
        ctx.ring = ring
        return ring.sum(loss)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient * ctx.ring.size, None  # every rank of the ring differentiates the same sum
