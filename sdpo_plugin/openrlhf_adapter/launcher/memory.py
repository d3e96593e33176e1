"""The memory of a policy worker, part by part, estimated before it is started: bytes of GPU and CPU memory.

Counted from the model's shape and the flags, as DeepSpeed 0.19.6 lays things out under OpenRLHF 0.11.2 (docs/gpu.md has
the measured peaks beside it). Not in it: the CUDA context, NCCL's buffers, and what the allocator cannot reuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MIB = 2**20
# DeepSpeed's defaults, which OpenRLHF leaves as they are: `reduce_bucket_size`, `stage3_max_live_parameters`; elements.
BUCKET, LIVE = 500_000_000, 1_000_000_000
TEACHER_PASS = "the teacher's forward pass"
CPU_PROCESS = 75 * MIB  # measured growth of a worker with a model that no other part has


@dataclass(frozen=True)
class Shape:
    """A causal language model: numbers of parameters, all together and by what the estimate needs."""

    parameters: int
    adapters: int
    hidden: int
    layers: int
    intermediate: int
    vocab: int


def shape_of(config: Any, lora_rank: int = 0, lora_targets: Any = "all-linear") -> Shape:
    """Of a model's Hugging Face configuration. No weight is read or made."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=True)
    adapters, head = 0, model.get_output_embeddings()
    names = [lora_targets] if isinstance(lora_targets, str) else list(lora_targets or ["all-linear"])
    for name, module in model.named_modules():
        wanted = names == ["all-linear"] or name.rsplit(".", 1)[-1] in names
        if lora_rank and isinstance(module, torch.nn.Linear) and module is not head and wanted:
            adapters += lora_rank * (module.in_features + module.out_features)
    text = config.get_text_config()
    return Shape(
        sum(p.numel() for p in model.parameters()), adapters, text.hidden_size, text.num_hidden_layers,
        getattr(text, "intermediate_size", 4 * text.hidden_size), text.vocab_size,
    )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Bytes per policy rank; those that `sleeps` are in CPU memory while the engines generate (`--ds.enable_sleep`)."""

    name: str
    gpu: float
    cpu: float = 0.0
    sleeps: bool = False


def policy_worker(
    args: Any, shape: Shape, teacher: Shape | None = None, cpu: bool = False, device_bytes: int = 80 * 2**30
) -> list[Part]:
    """The parts of one rank's memory: at the optimizer's step, in the loss and in the teacher's forward pass.

    For samples of `--data.max_len` tokens and teacher prompts of `--reprompt.max_len`.


    Args:
        args: OpenRLHF's nested arguments. teacher: of `--teacher.kind model`, else the student's.
        cpu: as CPU mode has it, where a page counts when it is written to. device_bytes: the memory of a GPU.
    """
    ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
    stage, offload = args.ds.zero_stage, args.ds.adam_offload
    low = 4 if args.ds.param_dtype == "fp32" else 2  # bytes of a weight
    trained = shape.adapters or shape.parameters
    whole, mine = shape.parameters + shape.adapters, trained / (ranks if stage else 1)
    if shape.adapters and args.algo.name is not None and args.teacher.kind == "ema":
        whole += shape.adapters
    accumulated = 4 if args.ds.grad_accum_dtype == "fp32" else low
    bucket = (min(BUCKET, trained) if cpu else BUCKET) if stage else 0
    parts = [
        Part("student's weights", low * (whole / ranks if stage == 3 else whole)),
        Part("gradients", (accumulated * mine if stage >= 2 else accumulated * trained) + low * bucket),
        _on(offload, "fp32 weights and moments", 12 * mine, sleeps=True),
        _on(offload, "gradients in fp32, at the step", 4 * mine),
    ]
    if args.algo.name is not None:
        parts += _teacher(args, shape, teacher or shape, ranks, low, mine)
        if args.teacher.scored_by == "worker":
            parts.append(Part(TEACHER_PASS, _teacher_pass(args, teacher or shape, low)))
    tokens = -(-args.train.micro_batch_size * args.data.max_len // args.ds.ring_attn_size)
    if args.train.dynamic_batch_enable:
        tokens = args.train.max_tokens_per_gpu
    parts.append(Part("activations", _activations(shape, tokens, args.actor.gradient_checkpointing_enable, low)))
    parts.append(Part("the loss", _loss(args, shape, teacher or shape, tokens, low, cpu, device_bytes)))
    if stage == 3:
        parts.append(Part("gathered weights", low * min(LIVE, whole)))
    if cpu:
        parts.append(Part("the process", CPU_PROCESS))
    return parts


def _teacher(args: Any, shape: Shape, teacher: Shape, ranks: int, low: int, mine: float) -> list[Part]:
    kind, stage = args.teacher.kind, args.ds.zero_stage
    if kind == "model" and args.teacher.zero_stage is not None:
        stage = args.teacher.zero_stage
    parts = []
    own = kind in ("ema", "base", "trust_region") and not shape.adapters
    if args.teacher.scored_by == "engine":
        own = own and kind == "ema"
    if own or (kind == "model" and args.teacher.scored_by == "worker"):
        weights = low * (teacher.parameters / ranks if stage == 3 else teacher.parameters)
        parts.append(_on(args.teacher.offload, "teacher's weights", weights, sleeps=True))
        if args.teacher.offload and stage < 3:
            parts.append(Part("teacher's weights during its pass", weights))
    if kind == "ema":
        parts.append(_on(args.teacher.offload, "EMA teacher's fp32 residual", 4 * mine, sleeps=True))
    return parts


def _teacher_pass(args: Any, teacher: Shape, low: int) -> float:
    """One layer's tensors of a forward pass without a graph, over at most `--teacher.max_tokens_per_gpu` tokens."""
    longest = args.data.max_len + args.reprompt.max_len
    tokens = max(longest, min(args.teacher.max_tokens_per_gpu, args.train.micro_batch_size * longest))
    return tokens * (2 * teacher.hidden + 3 * teacher.intermediate) * low


def _on(cpu: bool, name: str, size: float, sleeps: bool = False) -> Part:
    return Part(name, 0.0, size) if cpu else Part(name, size, 0.0, sleeps)


def _activations(shape: Shape, tokens: int, checkpointing: bool, low: int) -> float:
    """Of the student's forward pass, kept for the backward: with checkpointing a layer's input each and one layer."""
    layer = tokens * (10 * shape.hidden + 4 * shape.intermediate) * low
    return tokens * shape.hidden * low * shape.layers + layer if checkpointing else layer * shape.layers


def _loss(args: Any, shape: Shape, teacher: Shape, tokens: int, low: int, cpu: bool, device_bytes: int) -> float:
    """Hidden states of student and teacher at response positions, and logits of a chunk of them (`fused.py`)."""
    from sdpo_plugin.distillation.products import gpu_rows

    responses = min(args.train.micro_batch_size * (args.rollout.max_new_tokens or args.data.max_len), tokens)
    by_engine = args.algo.name is not None and args.teacher.scored_by == "engine"
    taught = 8 * args.distill.topk if by_engine and args.distill.mode == "topk" else teacher.hidden * low
    states = responses * (shape.hidden * low + taught)
    head = 0 if shape.adapters else 4 * shape.vocab * shape.hidden  # its gradient, summed in fp32
    if args.ds.zero_stage == 3 and args.algo.name is not None and args.teacher.kind != "live" and not by_engine:
        states += low * teacher.vocab * teacher.hidden  # the teacher's head, gathered
    if not cpu:
        chunk = 4 * shape.vocab * min(responses, gpu_rows(device_bytes, 4 * shape.vocab))
        return states + head + max(2.5 * chunk, low / 4 * head)  # the gradient is then rounded to the head's dtype
    chunk = 4 * shape.vocab * min(responses, max(16, min(256, 320 * MIB // (4 * shape.vocab))))
    return states + 2 * chunk + 15 * min(8 * MIB, chunk) + head


def total(parts: list[Part], asleep: bool = False) -> tuple[float, float]:
    """Bytes of GPU and of CPU memory per rank, together; `asleep`: while the engines generate (--ds.enable_sleep)."""
    phases = {"gradients in fp32, at the step"}, {"activations", "the loss"}, {TEACHER_PASS}
    transient = set().union(*phases, {"gathered weights"})
    gpu = sum(p.gpu for p in parts if not (asleep and (p.sleeps or p.name in transient)))
    cpu = sum(p.cpu + (p.gpu if asleep and p.sleeps else 0.0) for p in parts)
    if not asleep:  # only the largest of the phases counts: they follow one another
        sizes = [sum(p.gpu for p in parts if p.name in names) for names in phases]
        gpu -= sum(sizes) - max(sizes)
    return gpu, cpu
