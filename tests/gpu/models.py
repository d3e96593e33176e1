"""The head of real architectures replaced by the loss: log-probabilities, entropies and all parameters' gradients
against the model's own logits, and the time and memory of a micro-batch of a small model's real size.

Needs OpenRLHF and DeepSpeed to be installed, but no engine, Ray or vLLM.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from machine import CUDA, DEVICE, milliseconds, peak_mib, relative, row, tell
from stand_ins import stand_in

stand_in()
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from sdpo_plugin.openrlhf_adapter.worker.actor import PolicyActor  # noqa: E402

SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 1024,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
QWEN3_600M = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip
ARCHITECTURES = {
    "llama": {}, "qwen2": {}, "qwen3": {"tie_word_embeddings": True}, "gemma2": {}, "gemma3_text": {}, "granite": {},
    "cohere": {"logit_scale": 0.25},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}  # fmt: skip


class Engine(torch.nn.Module):
    """Of DeepSpeed's engine, what the policy model touches."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module, self.device = module, DEVICE

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def model_of(kind: str, dtype: torch.dtype, attention: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **options)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    model.config.use_cache = False
    return model.train()


def actor_of(model: Any, packed: bool) -> PolicyActor:
    actor = PolicyActor(Engine(model))
    actor.packing_samples = packed
    return actor


def batch(size: int, length: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences right-padded to `length`, their attention mask, and the action mask of their second halves."""
    g = torch.Generator().manual_seed(1)
    sequences = torch.randint(3, vocab, (size, length), generator=g).to(DEVICE)
    lengths = torch.randint(length // 2, length + 1, (size,), generator=g)
    lengths[0] = length
    attention = (torch.arange(length) < lengths[:, None]).to(DEVICE)
    action = attention[:, 1:] & (torch.arange(1, length, device=DEVICE) > length // 4)
    return sequences.masked_fill(~attention, 0), attention.long(), action


def passes(actor: PolicyActor, inputs: Any, function: Callable[[Any, Any], torch.Tensor]) -> list[torch.Tensor]:
    """Log-probabilities and entropies [B, A], and the gradients of a function of them, by parameter."""
    sequences, attention, action = inputs
    model = actor.model.module
    model.zero_grad()
    log_probs, output = actor(sequences, action, attention_mask=attention, return_output=True, return_entropy=True)
    entropy = output.entropy[:, -action.shape[1] :]
    loss = function(log_probs.float()[action], entropy.float()[action])
    loss.backward()
    gradients = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    return [log_probs.detach()[action], entropy.detach()[action], gradients]


def differentiated(log_probs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    return -(log_probs * torch.linspace(0.5, 1.5, len(log_probs), device=log_probs.device)).mean() - entropy.mean()


def compared(kind: str, dtype: torch.dtype, attention: str, checkpointing: bool, packed: bool, more: Any) -> None:
    """The tapped model against OpenRLHF's own `Actor`, which makes log-probabilities from whole logits."""
    known = {"dtype": str(dtype), "attention": attention, "checkpointing": checkpointing, "packed": packed}
    with row("head", architecture=kind, **known) as found:
        model = model_of(kind, dtype, attention, SMALL | more)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        actor = actor_of(model, packed)
        inputs = batch(4, 160, SMALL["vocab_size"])
        expected = passes(actor, inputs, differentiated)
        actor.tap_head()
        got = passes(actor, inputs, differentiated)
        names = ("log_probs", "entropy", "gradient")
        found |= {name: relative(a, b) for name, a, b in zip(names, got, expected, strict=True)}
        tolerance = 1e-4 if dtype == torch.float32 else 4e-2
        found["ok"] = max(found[name] for name in names) < tolerance


def micro_batch(size: int, length: int, options: dict[str, Any]) -> None:
    """A forward and backward pass over a micro-batch with gradient checkpointing, ours and OpenRLHF's own."""
    model = model_of("qwen3", torch.bfloat16, "sdpa", options)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    actor, inputs = actor_of(model, packed=False), batch(size, length, options["vocab_size"])
    for who in ("OpenRLHF", "ours"):
        with row("micro-batch", who=who, samples=size, length=length, tokens=int(inputs[2].sum())) as found:
            if who == "ours":
                actor.tap_head()
            model.zero_grad(set_to_none=True)
            passes(actor, inputs, differentiated)  # gradients exist from here on
            sequences, attention, action = inputs

            def run() -> None:
                log_probs = actor(sequences, action, attention_mask=attention)  # noqa: B023
                log_probs.float()[action].mean().backward()  # noqa: B023

            found["ms"], found["peak_mib"] = milliseconds(run), peak_mib(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    if PolicyActor.__mro__[1].__module__.split(".")[0] != "openrlhf":
        tell("left out", who="models", why="OpenRLHF cannot be imported here")
        return
    float32, bf16 = torch.float32, torch.bfloat16
    if tiny:
        compared("llama", float32, "sdpa", False, False, {})
        compared("gemma2", float32, "eager", True, False, {})
        compared("qwen3", float32, "sdpa", False, True, {})
        return
    for kind, more in ARCHITECTURES.items():
        compared(kind, float32, "sdpa", False, False, more)
        compared(kind, bf16, "sdpa", True, False, more)
    compared("qwen3", bf16, "sdpa", False, True, {})
    compared("gemma2", bf16, "eager", False, False, {})
    if CUDA:
        micro_batch(2, 4096, QWEN3_600M)


if __name__ == "__main__":
    main()
