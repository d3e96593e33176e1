"""The reward function of algorithms that need none: OpenRLHF loads this file by its path."""

from __future__ import annotations

import os
from typing import Any

import torch

PATH = os.path.abspath(__file__)


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, torch.Tensor]:
    zeros = torch.zeros(len(queries))
    return {"rewards": zeros, "scores": zeros}


def is_rewarded(args: Any) -> bool:
    """Whether rewards carry information about the samples; without a reward all samples count as failed."""
    return args.reward.remote_url != [PATH]
