"""Imports what every launcher does. The test harness's fork server imports this once; each run starts behind it."""

from sdpo_plugin.host import cpu

cpu.enable()

import openrlhf.trainer.ppo_trainer_async  # noqa: E402, F401

from sdpo_plugin.host import controller, engine, worker  # noqa: E402, F401
