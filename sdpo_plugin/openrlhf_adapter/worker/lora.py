"""LoRA: one model under several adapters, and its merged weights for the rollout engines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file

from sdpo_plugin.openrlhf_adapter.worker.zero import gathered

STUDENT, TEACHER = "default", "teacher"  # "default" is PEFT's, and so OpenRLHF's
GROUP_BYTES = 2**30


def add_teacher(model: PeftModel) -> None:
    """A frozen second adapter of the student's shape. Call before DeepSpeed takes the model."""
    model.add_adapter(TEACHER, model.peft_config[STUDENT])
    for name, parameter in model.named_parameters():
        if f".{TEACHER}." in name:
            parameter.requires_grad_(False)


@contextmanager
def under(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """The model with another adapter, or with none.

    PEFT's own switches turn `requires_grad` on and off, which DeepSpeed must not see.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [adapter or STUDENT], adapter is None
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


@contextmanager
def student_alone(model: torch.nn.Module) -> Iterator[None]:
    """Around OpenRLHF's saving of the model: PEFT would write the teacher's adapter, too."""
    if TEACHER not in getattr(model, "peft_config", {}):
        yield
        return
    model.__dict__["save_pretrained"] = partial(PeftModel.save_pretrained, model, selected_adapters=[STUDENT])
    try:
        yield
    finally:
        del model.__dict__["save_pretrained"]


@torch.no_grad()
def merged_modules(model: PeftModel, adapter: str) -> Iterator[Any]:
    """Weight + adapter of every adapted layer, under the base model's names: modules of up to a GiB of weights.

    All others are what the engine has loaded. New tensors: the training weights stay as they are. Collective.
    """
    group: dict[str, torch.Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        with gathered(list(layer.parameters())):
            weight = dequantize_module_weight(layer.get_base_layer())
            merged = (weight.float() + layer.get_delta_weight(adapter).float()).to(weight.dtype)
        merged.ds_shape = merged.shape  # where OpenRLHF looks under ZeRO-3
        group[name.removeprefix("base_model.model.") + ".weight"] = merged
        if sum(w.nbytes for w in group.values()) >= GROUP_BYTES:
            yield SimpleNamespace(named_parameters=group.items)
            group = {}
    if group:
        yield SimpleNamespace(named_parameters=group.items)


def save_teacher(model: PeftModel, directory: str, write: bool) -> None:
    """The teacher's adapter in PEFT's format. Collective; the rank with `write` writes."""
    with gathered([p for name, p in model.named_parameters() if f".{TEACHER}." in name]):
        if write:
            state = {k: v.contiguous() for k, v in get_peft_model_state_dict(model, adapter_name=TEACHER).items()}
            os.makedirs(directory, exist_ok=True)
            save_file(state, os.path.join(directory, "adapter_model.safetensors"))
            model.peft_config[TEACHER].save_pretrained(directory)
