"""The test harness for plugin authors: OpenRLHF on CPU for end-to-end tests, a fake worker for units.

As a pytest plugin it offers the fixture `openrlhf`; as a plugin of OpenRLHF (`--plugins sdpo_plugin.testing`, which the
fixture adds by itself) it records rollouts and feeds recorded ones back, so that runs can be compared on the very same
data. pytest loads this module in every project of the environment, so importing it costs nothing. Production never
imports it.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import pytest

from sdpo_plugin.hookspecs import hookimpl
from sdpo_plugin.testing.harness import OpenRLHF, Run, RunFailed
from sdpo_plugin.testing.models import tiny_model, tiny_vision_model
from sdpo_plugin.testing.worker import fake_worker

__all__ = ["OpenRLHF", "Run", "RunFailed", "fake_worker", "tiny_model", "tiny_vision_model"]


@pytest.fixture(scope="session")
def openrlhf(tmp_path_factory: pytest.TempPathFactory) -> OpenRLHF:
    """OpenRLHF on CPU: `run = openrlhf(model, rows, "reward.py", "--algo", "sdpo")`."""
    return OpenRLHF(tmp_path_factory.mktemp("openrlhf"))


@hookimpl
def openrlhf_add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--testing")
    group.add_argument("--testing.record", metavar="DIR", help="write each step's rewarded samples to DIR")
    group.add_argument("--testing.replay", metavar="DIR", help="train on recorded samples instead of generating")


@hookimpl(tryfirst=True)
def openrlhf_dataset(dataset: Any, args: Any) -> None:
    if args.testing.replay:
        from sdpo_plugin.testing import replay

        replay.bind(args.testing.replay)


@hookimpl(tryfirst=True)
def openrlhf_rollout_batch(batch: Any) -> None:
    if batch.args.testing.record:
        import torch

        os.makedirs(batch.args.testing.record, exist_ok=True)
        step = len(os.listdir(batch.args.testing.record))
        torch.save(list(batch.samples), os.path.join(batch.args.testing.record, f"{step:05d}.pt"))
