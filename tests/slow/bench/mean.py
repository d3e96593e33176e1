"""What --distill.loss_agg_mode does where few samples have a context: gradient norms of the quickstart's first step.

    python tests/slow/bench/mean.py

The warm-started model answers its 24 vaults, four times each; the first k of the 96 samples get their feedback.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_plugin.config import DistillConfig, RepromptConfig
from sdpo_plugin.distillation.context import Rollout, build_teacher_contexts
from sdpo_plugin.distillation.loss import per_token_loss
from sdpo_plugin.distillation.teacher_prompt import teacher_prompt_ids

ROOT = Path(__file__).parents[3]
OUT = ROOT / "runs" / "quickstart"


def main() -> None:
    sys.path.insert(0, str(ROOT / "recipes" / "quickstart"))
    import reward
    import vault

    vault.build(OUT, vault.Settings())
    tokenizer = AutoTokenizer.from_pretrained(OUT / "model")
    model = AutoModelForCausalLM.from_pretrained(OUT / "model", dtype=torch.float32)
    rows = [json.loads(line) for line in (OUT / "data" / "train.jsonl").read_text().splitlines()]
    torch.manual_seed(0)
    samples = [losses(model, tokenizer, row, reward.FEEDBACK) for row in rows for _ in range(4)]
    samples = [samples[i] for i in torch.randperm(len(samples)).tolist()]
    print("| samples with a context | mean over samples | mean over tokens |\n| --- | --- | --- |")
    for active in (96, 48, 12, 3, 1):
        taught = samples[:active]
        means = sum(x.mean() for x in taught) / len(samples), torch.cat(taught).mean()
        norms = [norm(torch.autograd.grad(mean, list(model.parameters()), retain_graph=True)) for mean in means]
        print(f"| {active} of {len(samples)} | {norms[0]:.3f} | {norms[1]:.3f} |")


def losses(model, tokenizer, row: dict, feedback: str) -> torch.Tensor:
    """KL(teacher||student) of each token of a sampled response, its feedback shown to the same weights."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    sampled = model.generate(torch.tensor([prompt]), do_sample=True, max_new_tokens=8)[0, len(prompt) :]
    text = tokenizer.decode(sampled, skip_special_tokens=True)
    rollout = Rollout(0, row["prompt"], text, 0.0, feedback=feedback.format(expected=row["label"], got=text.strip()))
    (context,) = build_teacher_contexts([rollout], RepromptConfig())
    shown, _ = teacher_prompt_ids(context, tokenizer, RepromptConfig())
    student, teacher = (
        model(torch.cat([torch.tensor(ids), sampled])[None]).logits[0, len(ids) - 1 : -1] for ids in (prompt, shown)
    )
    return per_token_loss(student, teacher, sampled, DistillConfig(mode="full", alpha=0.0))


def norm(gradients: tuple[torch.Tensor, ...]) -> float:
    return float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())


if __name__ == "__main__":
    main()
