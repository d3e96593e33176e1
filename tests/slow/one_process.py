"""The quickstart's training in one process: the plugin's contexts, templates and loss in a loop of plain torch.

No Ray, engine or DeepSpeed, and float32 in place of bf16: a run takes seconds, so that a study of many fits into an
hour. What it is like beside OpenRLHF is in docs/learning.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from sdpo_plugin.config import DistillConfig, RepromptConfig
from sdpo_plugin.context import Rollout, build_teacher_contexts, teacher_prompt_ids
from sdpo_plugin.loss import per_token_loss

DISTILL = DistillConfig(mode="full", alpha=0.0)  # of sdpo.yaml
MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Setting:
    """weight: of the distillation beside GRPO's loss; 0 is GRPO alone, 1 is SDPO or, by the template, SDFT."""

    reward: Callable[..., dict[str, Any]]
    rows: Sequence[dict[str, Any]]
    weight: float
    reprompt: RepromptConfig
    samples_per_prompt: int
    lr: float
    samples: int  # a step
    steps: int
    eval_steps: int


def train(model: Path, setting: Setting, seed: int) -> list[list[float]]:
    """The mean reward of greedy answers to all rows, as `[[step, value], ...]`."""
    torch.manual_seed(seed)
    random.seed(seed)  # rewards draw from it
    tokenizer = AutoTokenizer.from_pretrained(model)
    student, teacher = (LlamaForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(student.parameters(), setting.lr, betas=(0.9, 0.95), weight_decay=0.0)
    rows, accuracy = drawn(setting.rows, random.Random(seed)), []
    for step in range(1, setting.steps + 1):
        prompts = [next(rows) for _ in range(setting.samples // setting.samples_per_prompt)]
        batch = [row for row in prompts for _ in range(setting.samples_per_prompt)]
        responses, rewards, feedback = attempt(student, tokenizer, batch, setting.reward)
        scored = logits(student, [prompt_ids(row, tokenizer) for row in batch], responses)
        loss = torch.zeros(())
        if setting.weight < 1.0:
            loss = loss + (1.0 - setting.weight) * policy_loss(scored, responses, rewards, setting.samples_per_prompt)
        if setting.weight > 0.0:
            rollouts = [
                Rollout(
                    i // setting.samples_per_prompt, row["prompt"], tokenizer.decode(ids, skip_special_tokens=True),
                    float(reward), said, row["privileged_context"],
                )
                for i, (row, ids, reward, said) in enumerate(zip(batch, responses, rewards, feedback, strict=True))
            ]  # fmt: skip
            distilled = distillation(scored, responses, rollouts, teacher, tokenizer, setting.reprompt)
            loss = loss + setting.weight * distilled
        if loss.requires_grad:  # else no sample had a context
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
        if step % setting.eval_steps == 0:
            _, rewards, _ = attempt(student, tokenizer, setting.rows, setting.reward, greedy=True)
            accuracy.append([step, float(rewards.mean())])
    return accuracy


def drawn(rows: Sequence[dict[str, Any]], order: random.Random) -> Iterator[dict[str, Any]]:
    """One pass over the rows after another, each in an order of its own."""
    while True:
        yield from order.sample(rows, len(rows))


def prompt_ids(row: dict[str, Any], tokenizer: Any) -> list[int]:
    text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def attempt(
    model: LlamaForCausalLM, tokenizer: Any, rows: Sequence[dict[str, Any]], reward: Any, greedy: bool = False
) -> tuple[list[list[int]], torch.Tensor, list[str | None]]:
    """An answer to each row, its reward and its feedback. The prompts are equally long: a name is one token."""
    prompts = [prompt_ids(row, tokenizer) for row in rows]
    ids, ended = torch.tensor(prompts), torch.zeros(len(rows), dtype=torch.bool)
    while ids.shape[1] < len(prompts[0]) + MAX_NEW_TOKENS and not ended.all():
        last = model(ids).logits[:, -1]
        token = last.argmax(-1) if greedy else torch.multinomial(last.softmax(-1), 1).squeeze(1)
        token = token.where(~ended, tokenizer.pad_token_id)
        ended = ended | (token == tokenizer.eos_token_id)
        ids = torch.cat([ids, token[:, None]], dim=1)
    responses = []
    for row in ids[:, len(prompts[0]) :].tolist():
        length = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        responses.append(row[:length])
    shown = [tokenizer.decode(prompt) for prompt in prompts]
    queries = [tokenizer.decode(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]
    judged = reward(queries, shown, [row["label"] for row in rows])
    return responses, judged["rewards"], judged["feedback"]


def logits(model: LlamaForCausalLM, prompts: list[list[int]], responses: list[list[int]]) -> list[torch.Tensor]:
    """Of each response, `[T_i, V]`: padded on the right, where a causal model does not look."""
    rows = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]
    scored = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits
    starts = [len(prompt) - 1 for prompt in prompts]
    return [scored[i, start : start + len(responses[i])] for i, start in enumerate(starts)]


def policy_loss(
    scored: list[torch.Tensor], responses: list[list[int]], rewards: torch.Tensor, group: int
) -> torch.Tensor:
    """OpenRLHF's with `group_norm` and one update per rollout: the mean over all tokens."""
    of_prompt = rewards.reshape(-1, group)
    deviation = of_prompt.std(dim=1, keepdim=True) if group > 1 else torch.ones_like(of_prompt)
    advantages = ((of_prompt - of_prompt.mean(dim=1, keepdim=True)) / (deviation + 1e-9)).flatten()
    lengths = torch.tensor([len(ids) for ids in responses])
    sampled = torch.tensor([i for ids in responses for i in ids])
    log_probs = torch.cat(scored).log_softmax(-1).gather(1, sampled[:, None]).squeeze(1)
    return -(advantages.repeat_interleave(lengths) * log_probs).mean()


def distillation(
    scored: list[torch.Tensor], responses: list[list[int]], rollouts: list[Rollout], teacher: LlamaForCausalLM,
    tokenizer: Any, config: RepromptConfig,
) -> torch.Tensor:  # fmt: skip
    """The mean over all samples, 0 for those without a context, of each one's mean over its tokens."""
    contexts = build_teacher_contexts(rollouts, config)
    taught = [i for i, context in enumerate(contexts) if context.active]
    if not taught:
        return torch.zeros(())
    prompts = [teacher_prompt_ids(contexts[i], tokenizer, config)[0] for i in taught]
    with torch.no_grad():
        read = logits(teacher, prompts, [responses[i] for i in taught])
    lengths = torch.tensor([len(responses[i]) for i in taught])
    ids = torch.tensor([token for i in taught for token in responses[i]])
    losses = per_token_loss(torch.cat([scored[i] for i in taught]), torch.cat(read), ids, DISTILL)
    return (losses / lengths.repeat_interleave(lengths)).sum() / len(rollouts)
