"""On-policy self-distillation (SDPO, SDFT, OPSD and their variants) for OpenRLHF.

What plugin authors need is importable from here; each name is loaded when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "hookimpl": "hookspecs",
    "ConfigError": "config", "Group": "config", "StopTraining": "config", "option": "config",
    "Rollout": "context", "TeacherContext": "context", "build_teacher_contexts": "context",
    "Tokens": "loss", "token_divergence": "loss",
    "RolloutBatch": "interface", "MicroBatch": "interface", "Fragment": "interface", "Worker": "interface",
    "Teacher": "teacher",
    "SelfDistillation": "algorithm",
}  # fmt: skip
__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from sdpo_plugin.algorithm import SelfDistillation as SelfDistillation
    from sdpo_plugin.config import ConfigError as ConfigError
    from sdpo_plugin.config import Group as Group
    from sdpo_plugin.config import StopTraining as StopTraining
    from sdpo_plugin.config import option as option
    from sdpo_plugin.context import Rollout as Rollout
    from sdpo_plugin.context import TeacherContext as TeacherContext
    from sdpo_plugin.context import build_teacher_contexts as build_teacher_contexts
    from sdpo_plugin.hookspecs import hookimpl as hookimpl
    from sdpo_plugin.interface import Fragment as Fragment
    from sdpo_plugin.interface import MicroBatch as MicroBatch
    from sdpo_plugin.interface import RolloutBatch as RolloutBatch
    from sdpo_plugin.interface import Worker as Worker
    from sdpo_plugin.loss import Tokens as Tokens
    from sdpo_plugin.loss import token_divergence as token_divergence
    from sdpo_plugin.teacher import Teacher as Teacher


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
