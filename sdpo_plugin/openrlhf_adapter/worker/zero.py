"""DeepSpeed's weights, wherever a ZeRO stage keeps them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from sdpo_plugin.config import ConfigError
from sdpo_plugin.interface.models import Fragment, chunks


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def gathered(parameters: list[Any]) -> AbstractContextManager[Any]:
    """The parameters whole, on every rank, while the context lasts."""
    # Those that a running forward pass has gathered are DeepSpeed's to release.
    away = [p for p in parameters if is_partitioned(p) and p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
    return deepspeed.zero.GatheredParameters(away, enabled=bool(away))


@contextmanager
def trace_for_scoring(engine: Any) -> Iterator[None]:
    """Around passes without a gradient of a model that is trained: at ZeRO-3 they have a trace of their own.

    DeepSpeed gathers weights ahead of their use in the order that it traced in the pass before, and discards the trace
    where the order differs. A teacher's pass between two of the student's would do so in every micro-batch.
    """
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    if offload is None:
        yield
        return
    trained = offload.param_coordinator
    if not hasattr(offload, "scoring_coordinator"):
        offload.scoring_coordinator = PartitionedParameterCoordinator(
            prefetch_bucket_sz=offload._prefetch_bucket_sz,
            max_reuse_distance_in_numel=offload._max_reuse_distance_in_numel,
            max_available_parameters_in_numel=offload._max_available_parameters_in_numel,
            allgather_stream=offload._DeepSpeedZeRoOffload__allgather_stream,
            inflight_param_registry=offload.module.ds_inflight_param_registry,
            timers=offload.timers,
            zero_quantized_weights=offload.zero_quantized_weights,
            zero_quantized_nontrainable_weights=offload.zero_quantized_nontrainable_weights,
        )
        offload.scoring_external = -1
    scoring, external = offload.scoring_coordinator, _external_parameters(offload.module)
    if offload.scoring_external != external and scoring.is_complete_trace():
        scoring._invalidate_trace()
    offload.param_coordinator = scoring
    try:
        yield
    finally:
        offload.param_coordinator = trained
        offload.scoring_external = _external_parameters(offload.module)
        if offload.scoring_external != external and trained.is_complete_trace():
            trained._invalidate_trace()


def _external_parameters(model: torch.nn.Module) -> int:
    """How many parameters DeepSpeed has seen modules use that belong to others, such as LoRA's; a trace has them."""
    return sum(len(getattr(module, "_external_params", ())) for module in model.modules())


def exact_frequencies(model: Any) -> None:
    """Make the frequencies of rotary position encodings float32 again, where they were rounded.

    Where DeepSpeed partitions weights as they are made (ZeRO-3), it casts whatever a model's code makes meanwhile to
    the weights' dtype. Frequencies in bf16 are off by up to a radian a thousand positions, and an engine's are not.
    """
    for module in model.modules():
        rounded = {
            name: buffer for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq") and buffer.dtype in (torch.bfloat16, torch.float16)
        }  # fmt: skip
        for name, buffer in rounded.items():
            setattr(module, name, buffer.float())
        if rounded:
            model._init_weights(module)  # transformers computes them once more


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
        mine = [(name, fragment.start, len(fragment.values)) for name, fragment in self.fragments().items()]
        dist.all_gather_object(self.layout, mine)
        trained = {name for name, p in engine.module.named_parameters() if p.requires_grad}
        if missing := trained.difference(name for part in self.layout for name, _, _ in part):
            raise ConfigError(
                f"--ds.param_dtype, --ds.zero_stage: DeepSpeed has no fp32 weights of {len(missing)} parameters "
                f"({min(missing)}, ...) to follow; give --ds.param_dtype bf16, or --ds.zero_stage 2"
            )

    def fragments(self) -> dict[str, Fragment]:
        """Views, valid until the optimizer moves them; parameters without an fp32 weight here are absent."""
        found: dict[str, Fragment] = {}
        whole = self._whole()
        for name, parameter in self.engine.module.named_parameters():
            if is_partitioned(parameter):
                if parameter.requires_grad:
                    # The public `safe_get_local_fp32_param` copies it to the device.
                    values, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(parameter, True)
                    start = dist.get_rank() * parameter.ds_tensor.ds_numel
                    if start < parameter.ds_numel:  # parts are padded to an equal size
                        found[name] = Fragment(start, values.detach()[: parameter.ds_numel - start])
            elif (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
                found[name] = Fragment(mapping.lp_fragment_address.start, mapping.hp_fragment.detach())
            elif parameter in whole:
                found[name] = Fragment(0, whole[parameter])
            elif parameter.requires_grad and parameter.dtype == torch.float32:
                found[name] = Fragment(0, parameter.data.view(-1))  # trained as it is
        return found

    def _whole(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """At ZeRO 0 every rank has all of them, end to end in one tensor per parameter group (`FP16_Optimizer`)."""
        optimizer = self.engine.optimizer
        found: dict[torch.nn.Parameter, torch.Tensor] = {}
        for i, flat in enumerate(getattr(optimizer, "fp32_groups_flat", ())):
            group = optimizer.fp16_groups[i]
            found.update(zip(group, flat.detach().split([p.numel() for p in group]), strict=True))
        return found


def weight_shards(part: Sequence[tuple[str, int, int]], module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`module`'s own weights at the places of `part` (a rank's in `MasterWeights.layout`); views to read and write."""
    parameters: dict[str, Any] = dict(module.named_parameters())
    found = {}
    for name, start, numel in part:
        parameter = parameters[name]
        if is_partitioned(parameter):
            found[name] = parameter.ds_tensor.data[:numel]
        else:
            found[name] = parameter.data.view(-1)[start : start + numel]
    return found


def device_tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """What holds the weights on this device: parameters, or this rank's parts of them. Collective."""
    found: list[torch.Tensor] = []
    parameter: Any  # DeepSpeed's have more than torch's
    for parameter in module.parameters():
        if is_partitioned(parameter):
            if parameter.ds_status is not ZeroParamStatus.NOT_AVAILABLE:
                parameter.partition()  # DeepSpeed keeps small ones whole
            found.append(parameter.ds_tensor)
        else:
            found.append(parameter)
    return found


def sync(layout: Sequence[Any], module: torch.nn.Module) -> None:
    """Make what this rank wrote to its `weight_shards` known to all ranks (`layout`: their fragments). Collective.

    ZeRO-3 modules are sharded alike, so nothing is communicated; others need all-gathers of low-precision values, each
    of at most `MAX_CHUNK_BYTES` over all ranks.
    """
    parameters: dict[str, Any] = dict(module.named_parameters())
    if any(map(is_partitioned, parameters.values())):
        for name in dict.fromkeys(name for part in layout for name, _, _ in part):
            if parameters[name].ds_persist:
                parameters[name].partition(has_been_updated=False)  # the next use gathers it anew
        return
    if all(part == layout[0] for part in layout):
        return  # ZeRO 0, or a single rank: everyone has written everything
    dtype = functools.reduce(torch.promote_types, (p.dtype for p in parameters.values()))
    longest = max(sum(numel for _, _, numel in part) for part in layout)
    for chunk in chunks(longest, len(layout) * dtype.itemsize):
        everyone = torch.empty(len(layout), chunk.stop - chunk.start, dtype=dtype, device=torch.cuda.current_device())
        mine = torch.empty_like(everyone[0])
        for values, at in _end_to_end(layout[dist.get_rank()], parameters, chunk):
            mine[at].copy_(values)
        dist.all_gather_into_tensor(everyone.view(-1), mine)
        for part, gathered_images in zip(layout, everyone, strict=True):
            for values, at in _end_to_end(part, parameters, chunk):
                values.copy_(gathered_images[at])


def _end_to_end(
    part: Sequence[tuple[str, int, int]], parameters: Mapping[str, torch.nn.Parameter], chunk: slice
) -> Iterator[tuple[torch.Tensor, slice]]:
    """Of a rank's fragments, laid end to end, those in `chunk`: views of the parameters, and where in the chunk."""
    position = 0
    for name, start, numel in part:
        begin, end = max(position, chunk.start), min(position + numel, chunk.stop)
        if begin < end:
            values = parameters[name].data.view(-1)[start + begin - position : start + end - position]
            yield values, slice(begin - chunk.start, end - chunk.start)
        position += numel
