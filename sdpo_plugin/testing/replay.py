"""Recorded rollouts in the place of generated ones (`harness.py`). Importable, because Ray carries classes by name."""

from __future__ import annotations

import glob
import os
import runpy
import sys
from typing import Any

import torch

from sdpo_plugin.openrlhf_adapter import patch_points
from sdpo_plugin.openrlhf_adapter.controller.controller import ppo_trainer
from sdpo_plugin.openrlhf_adapter.launcher import launch
from sdpo_plugin.openrlhf_adapter.launcher.install import ray
from sdpo_plugin.openrlhf_adapter.platform import cpu

DIRECTORY = "SDPO_PLUGIN_REPLAY"  # where `PlainController` finds the samples


def bind(directory: str) -> None:
    """Let OpenRLHF's controller in this process read one recorded step after the other from `directory`."""

    class Recorded(ppo_trainer.SamplesGenerator):
        files = sorted(glob.glob(os.path.join(directory, "*.pt")))

        def generate_samples(self, **kwargs: Any) -> tuple[list[Any], None, int, bool]:
            samples = torch.load(self.files.pop(0), weights_only=False)
            return samples, None, len(samples) // self.args.rollout.n_samples_per_prompt, not self.files

    ppo_trainer.SamplesGenerator = Recorded


_PPOTrainer: Any = patch_points.plain_class(ppo_trainer.PPOTrainer)


class PlainController(_PPOTrainer):
    """OpenRLHF's controller without hooks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bind(os.environ[DIRECTORY])
        super().__init__(*args, **kwargs)


def train_plain(samples: str, arguments: list[str]) -> None:
    """OpenRLHF's launcher with its own policy worker; only the controller reads recorded samples."""
    os.environ[DIRECTORY] = samples
    ray.init = cpu.with_resources(ray.init)
    ppo_trainer.PPOTrainer = ray.remote(PlainController)
    sys.argv = [launch.LAUNCHER, *arguments]
    runpy.run_module(launch.LAUNCHER, run_name="__main__", alter_sys=True)
