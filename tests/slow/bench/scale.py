"""What larger models and clusters would take, from `launcher/memory.py` and the bytes that ZeRO-3 moves.

    python tests/slow/bench/scale.py

Nothing here was run. A step is 256 samples of 4,096 tokens, the teacher reads 6,144 of each. Assumed of a GPU: 80 GB,
400 TFLOP/s of bf16 in practice, 50 GB/s to and from the network. Prints the tables of docs/gpu.md.
"""

from __future__ import annotations

from types import SimpleNamespace

from transformers import Qwen3Config, Qwen3MoeConfig

from sdpo_plugin.openrlhf_adapter.launcher import memory

GB, TERA = 1e9, 1e12
SAMPLES, TOKENS, TEACHER_TOKENS = 256, 4096, 6144
FLOPS, WIRE = 400 * TERA, 50 * GB


def dense(hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, tied: bool = False) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=intermediate,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128, tie_word_embeddings=tied,
    )  # fmt: skip


# name: (configuration, fraction of the parameters that a token uses)
MODELS = {
    "4B": (dense(2560, 36, 9728, 32, 8, tied=True), 1.0),
    "8B": (dense(4096, 36, 12288, 32, 8), 1.0),
    "32B": (dense(5120, 64, 25600, 64, 8), 1.0),
    "70B": (dense(8192, 80, 28672, 64, 8), 1.0),
    "235B, 22B active": (
        Qwen3MoeConfig(
            vocab_size=151_936, hidden_size=4096, num_hidden_layers=94, moe_intermediate_size=1536, num_experts=128,
            num_experts_per_tok=8, num_attention_heads=64, num_key_value_heads=4, head_dim=128, intermediate_size=12288,
        ),
        22 / 235,
    ),
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def arguments(gpus: int, stage: int, teacher: str, offload: bool) -> SimpleNamespace:
    return SimpleNamespace(
        algo=SimpleNamespace(name="sdpo"), data=SimpleNamespace(max_len=TOKENS),
        actor=SimpleNamespace(num_nodes=1, num_gpus_per_node=gpus, gradient_checkpointing_enable=True),
        ds=SimpleNamespace(zero_stage=stage, adam_offload=offload, param_dtype="bf16", grad_accum_dtype=None),
        teacher=SimpleNamespace(kind=teacher, offload=offload, zero_stage=None, scored_by="worker"),
        train=SimpleNamespace(micro_batch_size=1, dynamic_batch_enable=False),
        rollout=SimpleNamespace(max_new_tokens=2048),
    )  # fmt: skip


def layouts() -> None:
    print("| model | GPUs | | training, GB per GPU | while engines generate, with sleep |")
    print("| --- | --- | --- | --- | --- |")
    for name, gpus, stage, rank, teacher, offload in (
        ("4B", 1, 2, 64, "ema", False), ("8B", 4, 3, 0, "ema", False), ("8B", 4, 2, 0, "ema", False),
        ("8B", 4, 3, 0, "base", False), ("8B", 4, 3, 0, "live", False), ("32B", 16, 3, 0, "ema", False),
        ("70B", 64, 3, 0, "live", False), ("70B", 64, 3, 0, "base", False), ("70B", 64, 3, 0, "ema", False),
        ("70B", 64, 3, 0, "ema", True), ("70B", 64, 2, 0, "ema", False),
        ("235B, 22B active", 512, 3, 0, "live", False), ("235B, 22B active", 512, 3, 0, "ema", False),
    ):  # fmt: skip
        shape = memory.shape_of(MODELS[name][0], rank, TARGETS)
        parts = memory.policy_worker(arguments(gpus, stage, teacher, offload), shape)
        kind = f"{teacher}, ZeRO-{stage}{', LoRA 64' * bool(rank)}{', all in CPU memory' * offload}"
        awake, asleep = memory.total(parts)[0] / GB, memory.total(parts, asleep=True)[0] / GB
        print(f"| {name} | {gpus} | {kind} | {awake:.0f} | {asleep:.0f} |")


def steps() -> None:
    print("\n| model | GPUs | arithmetic | teacher's | ZeRO-3's gathers | teacher's | weights to engines |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, gpus in (("8B", 8), ("70B", 64), ("235B, 22B active", 512)):
        config, active = MODELS[name]
        weights = 2 * memory.shape_of(config).parameters
        passes = max(1, SAMPLES // gpus)
        student = 8 * active * weights / 2 * SAMPLES * TOKENS / gpus / FLOPS  # forward, again, backward
        teacher = 2 * active * weights / 2 * SAMPLES * TEACHER_TOKENS / gpus / FLOPS
        gather = weights / WIRE
        cells = (student, teacher, 4 * gather * passes, gather * passes, 2 * gather)
        print(f"| {name} | {gpus} | " + " | ".join(f"{seconds:.0f} s" for seconds in cells) + " |")


if __name__ == "__main__":
    layouts()
    steps()
