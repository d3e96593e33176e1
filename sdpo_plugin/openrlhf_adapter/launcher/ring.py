"""What ring attention (`--ds.ring_attn_size`) needs, and which models it would get wrong without an error."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from sdpo_plugin.config import ConfigError

SLICED = {"full_attention", "sliding_attention"}  # layers whose only exchange between tokens `ring_flash_attn` makes


def check(args: Any, cpu: bool) -> None:
    """Raises ConfigError where the flags do not go together, or this machine lacks the package."""
    size = args.ds.ring_attn_size
    groups = {"actor": True, "ref": args.algo.kl.init_coef > 0, "critic": bool(args.critic.model_name_or_path)}
    for name in (name for name, used in groups.items() if used):
        group = getattr(args, name)
        if group.num_nodes * group.num_gpus_per_node % size:
            raise ConfigError(
                f"--ds.ring_attn_size {size}: the {name} has {group.num_nodes} x {group.num_gpus_per_node} GPUs, which "
                f"do not make whole rings; give --{name}.num_gpus_per_node a multiple of {size}"
            )
    if args.data.max_images_per_prompt > 0:
        raise ConfigError(
            f"--ds.ring_attn_size {size} with --data.max_images_per_prompt {args.data.max_images_per_prompt}: images "
            "cannot be sliced; give --ds.ring_attn_size 1"
        )
    attention = args.ds.attn_implementation
    if "flash" in attention and attention != "flash_attention_2":
        raise ConfigError(
            f"--ds.attn_implementation {attention}: ring_flash_attn replaces flash_attention_2 only; with "
            f"--ds.ring_attn_size {size} give flash_attention_2"
        )
    if not cpu and importlib.util.find_spec("ring_flash_attn") is None:
        raise ConfigError(
            f"--ds.ring_attn_size {size}: ring_flash_attn is not installed; pip install 'openrlhf[ring]', or give "
            "--ds.ring_attn_size 1"
        )


def models(args: Any, found: Iterable[tuple[str, str, Any]]) -> None:
    """Raises ConfigError for a model that `ring_flash_attn` cannot slice.

    Args:
        found: flag, path and configuration of each.
    """
    size, stride = args.ds.ring_attn_size, args.ds.ring_attn_head_stride
    for flag, path, config in found:
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", stride)
        if other := sorted(set(getattr(text, "layer_types", None) or ()) - SLICED):
            raise ConfigError(
                f"{flag} {path}: it has layers of the kind {other[0]}, whose state does not pass from one rank of a "
                f"ring to the next; give --ds.ring_attn_size 1 instead of {size}"
            )
        if getattr(text, "attn_logit_softcapping", None) is not None:
            raise ConfigError(
                f"{flag} {path}: ring_flash_attn has no soft-cap on attention scores, which this model uses; give "
                f"--ds.ring_attn_size 1 instead of {size}"
            )
        if heads % stride:
            raise ConfigError(
                f"--ds.ring_attn_head_stride {stride}: {path} has {heads} key-value heads, which it does not divide; "
                "give 1"
            )
