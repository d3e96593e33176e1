"""What `launcher/memory.py` says a policy worker takes, beside what one takes: three sizes, on CPU.

    python tests/slow/memory.py [--sizes 512x8 1024x8 1024x16]

Trains two recorded steps through the real OpenRLHF. Measured is a process's memory beyond what it had before it built a
model, looked at every 5 ms, with an allocator that gives every tensor back when it dies, as CUDA's does for others to
use. Prints the table of docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

from transformers import AutoConfig

from sdpo_plugin.openrlhf_adapter.launcher import memory
from sdpo_plugin.testing import OpenRLHF, tiny_model

ROWS = [{"prompt": f"say {i}", "label": str(i)} for i in range(8)]
REWARD = """
import torch
def reward_func(queries, prompts, labels):
    return {"rewards": torch.zeros(1), "scores": torch.zeros(1), "feedback": [f"expected {label}" for label in labels]}
"""
MAX_LEN = 40
CASES = {  # ranks, ZeRO stage, teacher, LoRA rank, offload
    "ZeRO-2, 1 rank, ema": (1, 2, "ema", 0, False), "ZeRO-2, 1 rank, base": (1, 2, "base", 0, False),
    "ZeRO-2, 1 rank, live": (1, 2, "live", 0, False), "ZeRO-2, 2 ranks, ema": (2, 2, "ema", 0, False),
    "ZeRO-3, 2 ranks, ema": (2, 3, "ema", 0, False), "ZeRO-2, 1 rank, ema, LoRA 64": (1, 2, "ema", 64, False),
}  # fmt: skip
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def arguments(ranks: int, stage: int, teacher: str, rank: int, offload: bool) -> SimpleNamespace:
    return SimpleNamespace(
        algo=SimpleNamespace(name="sdpo"), data=SimpleNamespace(max_len=MAX_LEN),
        actor=SimpleNamespace(num_nodes=1, num_gpus_per_node=ranks, gradient_checkpointing_enable=False),
        ds=SimpleNamespace(
            zero_stage=stage, adam_offload=offload, param_dtype="bf16", grad_accum_dtype=None, ring_attn_size=1
        ),
        teacher=SimpleNamespace(
            kind=teacher, offload=offload, zero_stage=None, max_tokens_per_gpu=16384, scored_by="worker"
        ),
        reprompt=SimpleNamespace(max_len=MAX_LEN),
        train=SimpleNamespace(micro_batch_size=8, dynamic_batch_enable=False),
        rollout=SimpleNamespace(max_new_tokens=8),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["512x8", "1024x8", "1024x16"])
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1] / "plugins")
    directory = Path(tempfile.mkdtemp())
    host, reward = OpenRLHF(directory), directory / "reward.py"
    reward.write_text(REWARD)
    sdpo = ("--algo", "sdpo", "--distill.topk", "20", "--data.max_len", str(MAX_LEN))
    recorded = host(tiny_model(directory / "small"), ROWS, reward, *sdpo, "--train.num_episodes", "2")
    print("| parameters | | estimated, MiB | measured, MiB | |\n| --- | --- | --- | --- | --- |", flush=True)
    for size in parser.parse_args().sizes:
        hidden, layers = map(int, size.split("x"))
        model = tiny_model(directory / size, hidden=hidden, layers=layers)
        for name, case in CASES.items():
            ranks, stage, teacher, rank, _ = case
            lora = ("--ds.lora.rank", str(rank), "--ds.lora.target_modules", *TARGETS) if rank else ()
            out = directory / f"{size}-{len(host.directory.name)}-{host.runs}"
            host(
                model, ROWS, reward, *sdpo, *lora, "--teacher.kind", teacher, "--ds.zero_stage", str(stage),
                "--actor.num_gpus_per_node", str(ranks), "--peak.out", str(out),
                "--plugins", "sdpo_plugin.testing", "peak", replay=recorded, timeout=600,
            )  # fmt: skip
            measured = max(json.loads(Path(f"{out}.{r}").read_text())["peak"] for r in range(ranks))
            shape = memory.shape_of(AutoConfig.from_pretrained(model), rank, TARGETS)
            estimated = memory.total(memory.policy_worker(arguments(*case), shape, cpu=True))[0]
            cells = (estimated / 2**20, measured / 2**20)
            ratio = f"{estimated / measured:.2f}"
            print(f"| {shape.parameters / 1e6:.0f}M | {name} | {cells[0]:.0f} | {cells[1]:.0f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
