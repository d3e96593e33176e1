"""The vault's answer: right or wrong as the reward, the right code only as feedback on a wrong attempt."""

from __future__ import annotations

import torch

FEEDBACK = "expected {expected}, got {got}"
ASSISTANT, END = "<|assistant|>", "<|end|>"  # as in the chat template of vault.py


def response_text(query: str, prompt: str) -> str:
    """What the model wrote, from the decoded prompt and response with their special tokens."""
    response = query[len(prompt) :] if query.startswith(prompt) else query.rpartition(ASSISTANT)[2]
    return response.split(END)[0].strip()


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict:
    """OpenRLHF's signature; it calls with one sample at a time. `feedback` is the plugin's addition."""
    answers = [response_text(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
    codes = [str(label) for label in labels]
    rewards = torch.tensor([float(answer == code) for answer, code in zip(answers, codes, strict=True)])
    feedback = [
        None if answer == code else FEEDBACK.format(expected=code, got=answer)
        for answer, code in zip(answers, codes, strict=True)
    ]
    return {"rewards": rewards, "scores": rewards, "feedback": feedback}
