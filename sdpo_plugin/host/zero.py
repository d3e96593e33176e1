"""DeepSpeed's weights, wherever a ZeRO stage keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_local_fp32_param

from sdpo_plugin.teacher import Fragment


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def gathered(parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
    """The parameters whole, on every rank, while the context lasts."""
    # Those that a running forward pass has gathered are DeepSpeed's to release.
    away = [p for p in parameters if is_partitioned(p) and p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
    return deepspeed.zero.GatheredParameters(away, enabled=bool(away))


class MasterWeights:
    """The optimizer's fp32 weights on this rank, by parameter name; together the ranks hold each element once.

    Works at ZeRO 0 to 3; nothing is gathered.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def fragments(self) -> dict[str, Fragment]:
        """Views, valid until the optimizer moves them; parameters without an fp32 weight here are absent."""
        found = {}
        for name, parameter in self.engine.module.named_parameters():
            if is_partitioned(parameter):
                values = safe_get_local_fp32_param(parameter)
                if values is not None:
                    # The last rank's part is padded up to an equal size; its end lies past the parameter's.
                    found[name] = Fragment(dist.get_rank() * parameter.ds_tensor.ds_numel, values)
            elif (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
                found[name] = Fragment(mapping.lp_fragment_address.start, mapping.hp_fragment)
        return found


def publish(fragments: Mapping[str, Fragment], module: torch.nn.Module) -> None:
    """Write fp32 fragments, sharded as `MasterWeights` shards them, into `module`'s weights, matched by name.

    ZeRO-3 modules are sharded alike, so nothing is communicated; others receive one all-gather of the low-precision
    image. Collective: every rank calls it.
    """
    parameters = dict(module.named_parameters())
    if any(map(is_partitioned, parameters.values())):
        for name, fragment in fragments.items():
            parameter = parameters[name]
            parameter.ds_tensor.data.copy_(fragment.values)
            if parameter.ds_persist:
                parameter.partition(has_been_updated=False)  # the next use gathers it anew
        return
    mine = [(name, f.start, f.values.numel()) for name, f in fragments.items()]
    layout: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(layout, mine)
    sizes = [sum(numel for _, _, numel in part) for part in layout]
    dtype = next(iter(parameters.values())).dtype
    device = next(iter(parameters.values())).device
    image = torch.zeros(max(sizes), dtype=dtype, device=device)
    offset = 0
    for fragment in fragments.values():
        image[offset : offset + fragment.values.numel()].copy_(fragment.values)
        offset += fragment.values.numel()
    images = [torch.empty_like(image) for _ in layout]
    dist.all_gather(images, image)
    for part, values in zip(layout, images, strict=True):
        offset = 0
        for name, start, numel in part:
            parameters[name].data.view(-1)[start : start + numel] = values[offset : offset + numel]
            offset += numel
