"""What OpenRLHF imports from `ring_flash_attn` (0.1.8) and `flash_attn.utils.distributed`, for CPU mode.

The same attention by plain arithmetic, in the dtype of the model: keys and values of all ranks are gathered, and each
rank attends from its slice of the packed sequence. Imports torch when called: CPU mode changes torch before its use.
"""

from __future__ import annotations

from functools import cache
from typing import Any

_PACKED: dict[str, Any] = {}  # of the forward pass that is to come: where its sequences end, and the ring


def update_ring_flash_attn_params(cu_seqlens: Any, process_group: Any) -> None:
    """`cu_seqlens`: int [sequences + 1], where each sequence of the ring's packed tokens begins, and their number."""
    _PACKED.update(ends=cu_seqlens.tolist(), group=process_group)


def substitute_hf_flash_attn(process_group: Any, heads_k_stride: int) -> None:
    """Let transformers' models with `sdpa`, which CPU mode has in place of flash attention, attend over the ring."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention


# Long: arguments of transformers' attention functions, and one loop.
def attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None, **kwargs: Any,
) -> tuple[Any, None]:  # fmt: skip
    """Of query [1, heads, L, size] and key, value [1, kv_heads, L, size] on each rank: [1, L, heads, size].

    The mask is that of the packed sequences, whatever transformers made of this rank's slice (`attention_mask`).
    """
    import torch

    longest = max(end - first for first, end in zip(_PACKED["ends"], _PACKED["ends"][1:], strict=False))
    if softcap is not None or (sliding_window is not None and longest > sliding_window):
        raise NotImplementedError("ring attention on CPU has no soft-cap and no sliding window; use another model")
    group, length = _PACKED["group"], query.shape[2]
    begin = torch.distributed.get_rank(group) * length
    keys_values = torch.stack([key[0], value[0]]).permute(2, 0, 1, 3)  # tokens first
    every = all_gather(keys_values, group).permute(1, 2, 0, 3)
    results = []
    for first, end in zip(_PACKED["ends"], _PACKED["ends"][1:], strict=False):
        low, high = max(first, begin), min(end, begin + length)  # of this sequence on this rank
        if low >= high:
            continue
        mask = torch.ones(high - low, high - first, dtype=torch.bool).tril(low - first)
        k, v = every[:, :, first:high]
        results.append(torch.nn.functional.scaled_dot_product_attention(
            query[0, :, low - begin : high - begin], k, v, attn_mask=mask, dropout_p=dropout, scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        ))  # fmt: skip
    return torch.cat(results, dim=1).transpose(0, 1)[None], None


def all_gather(tensor: Any, group: Any) -> Any:
    """[n, ...] of each rank, one after the other; the gradient is the sum of the ranks'."""
    return _all_gather().apply(tensor, group)


@cache
def _all_gather() -> Any:
    import torch

    class AllGather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Any, group: Any) -> Any:
            ctx.group, ctx.length = group, len(tensor)
            parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size(group))]
            torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
            return torch.cat(parts)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            total = gradient.contiguous().clone()
            torch.distributed.all_reduce(total, group=ctx.group)
            return total.split(ctx.length)[torch.distributed.get_rank(ctx.group)], None

    return AllGather
