"""DeepSpeed's weights, wherever a ZeRO stage keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_local_fp32_param

from sdpo_plugin.config import ConfigError
from sdpo_plugin.teacher import Fragment


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def gathered(parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
    """The parameters whole, on every rank, while the context lasts."""
    # Those that a running forward pass has gathered are DeepSpeed's to release.
    away = [p for p in parameters if is_partitioned(p) and p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
    return deepspeed.zero.GatheredParameters(away, enabled=bool(away))


class MasterWeights:
    """The optimizer's fp32 weights on this rank, by parameter name; together the ranks hold every element.

    Works at ZeRO 0 to 3; nothing is gathered.

    Attributes:
        layout: of each rank, (name, start, number of elements) of its fragments, in order.
    """

    def __init__(self, engine: Any) -> None:
        """Raises ConfigError where DeepSpeed keeps a trained parameter's weights out of reach. Collective."""
        self.engine = engine
        self.layout: list[Any] = [None] * dist.get_world_size()
        mine = [(name, fragment.start, fragment.values.numel()) for name, fragment in self.fragments().items()]
        dist.all_gather_object(self.layout, mine)
        trained = {name for name, p in engine.module.named_parameters() if p.requires_grad}
        if missing := trained.difference(name for part in self.layout for name, _, _ in part):
            raise ConfigError(
                f"--ds.param_dtype, --ds.zero_stage: DeepSpeed has no fp32 weights of {len(missing)} parameters "
                f"({min(missing)}, ...) to follow; give --ds.param_dtype bf16, or --ds.zero_stage 2"
            )

    def fragments(self) -> dict[str, Fragment]:
        """Views, valid until the optimizer moves them; parameters without an fp32 weight here are absent."""
        found, whole = {}, self._whole()
        for name, parameter in self.engine.module.named_parameters():
            if is_partitioned(parameter):
                values = safe_get_local_fp32_param(parameter)
                if values is not None:
                    # The last rank's part is padded up to an equal size; its end lies past the parameter's.
                    found[name] = Fragment(dist.get_rank() * parameter.ds_tensor.ds_numel, values)
            elif (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
                found[name] = Fragment(mapping.lp_fragment_address.start, mapping.hp_fragment)
            elif parameter in whole:
                found[name] = Fragment(0, whole[parameter])
            elif parameter.requires_grad and parameter.dtype == torch.float32:
                found[name] = Fragment(0, parameter.data.view(-1))  # trained as it is
        return found

    def _whole(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """At ZeRO 0 every rank has all of them, end to end in one tensor per parameter group (`FP16_Optimizer`)."""
        optimizer, found = self.engine.optimizer, {}
        for i, flat in enumerate(getattr(optimizer, "fp32_groups_flat", ())):
            group = optimizer.fp16_groups[i]
            found.update(zip(group, flat.detach().split([p.numel() for p in group]), strict=True))
        return found


def images(fragments: Mapping[str, Fragment], module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parts of `module`'s own weights that correspond to `fragments`, matched by name; views to read and write."""
    parameters = dict(module.named_parameters())
    found = {}
    for name, fragment in fragments.items():
        parameter = parameters[name]
        if is_partitioned(parameter):
            found[name] = parameter.ds_tensor.data
        else:
            found[name] = parameter.data.view(-1)[fragment.start : fragment.start + fragment.values.numel()]
    return found


def publish(fragments: Mapping[str, Fragment], layout: Sequence[Any], module: torch.nn.Module) -> None:
    """Make what this rank wrote to its `images` known to all ranks, whose fragments are as in `layout`. Collective.

    ZeRO-3 modules are sharded alike, so nothing is communicated; others need one all-gather of low-precision values.
    """
    parameters = dict(module.named_parameters())
    if any(map(is_partitioned, parameters.values())):
        for name in fragments:
            if parameters[name].ds_persist:
                parameters[name].partition(has_been_updated=False)  # the next use gathers it anew
        return
    if all(part == layout[0] for part in layout):
        return  # ZeRO 0, or a single rank: everyone has written everything
    sizes = [sum(numel for _, _, numel in part) for part in layout]
    flat = torch.cat(list(images(fragments, module).values()))
    flat = torch.nn.functional.pad(flat, (0, max(sizes) - len(flat)))
    gathered_images = [torch.empty_like(flat) for _ in layout]
    dist.all_gather(gathered_images, flat)
    for part, values in zip(layout, gathered_images, strict=True):
        offset = 0
        for name, start, numel in part:
            parameters[name].data.view(-1)[start : start + numel] = values[offset : offset + numel]
            offset += numel
