"""The reward function of algorithms that need none: OpenRLHF loads this file by its path."""

from __future__ import annotations

import torch


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, torch.Tensor]:
    zeros = torch.zeros(len(queries))
    return {"rewards": zeros, "scores": zeros}
