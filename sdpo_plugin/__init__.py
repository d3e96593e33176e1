"""On-policy self-distillation (SDPO, SDFT, OPSD and their variants) for OpenRLHF.

What plugin authors need is importable from here; each name is loaded when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "hookimpl": "hookspecs",
    "ConfigError": "config", "Group": "config", "StopTraining": "config", "option": "config",
    "Rollout": "distillation.context", "TeacherContext": "distillation.context",
    "build_teacher_contexts": "distillation.context",
    "Tokens": "distillation.loss", "token_divergence": "distillation.loss",
    "RolloutBatch": "interface.micro_batch", "MicroBatch": "interface.micro_batch",
    "Fragment": "interface.micro_batch", "Worker": "interface.micro_batch",
    "Teacher": "algorithms.teacher",
    "SelfDistillation": "algorithms.controller_side",
}  # fmt: skip
__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from sdpo_plugin.algorithms.controller_side import SelfDistillation as SelfDistillation
    from sdpo_plugin.algorithms.teacher import Teacher as Teacher
    from sdpo_plugin.config import ConfigError as ConfigError
    from sdpo_plugin.config import Group as Group
    from sdpo_plugin.config import StopTraining as StopTraining
    from sdpo_plugin.config import option as option
    from sdpo_plugin.distillation.context import Rollout as Rollout
    from sdpo_plugin.distillation.context import TeacherContext as TeacherContext
    from sdpo_plugin.distillation.context import build_teacher_contexts as build_teacher_contexts
    from sdpo_plugin.distillation.loss import Tokens as Tokens
    from sdpo_plugin.distillation.loss import token_divergence as token_divergence
    from sdpo_plugin.hookspecs import hookimpl as hookimpl
    from sdpo_plugin.interface.micro_batch import Fragment as Fragment
    from sdpo_plugin.interface.micro_batch import MicroBatch as MicroBatch
    from sdpo_plugin.interface.micro_batch import RolloutBatch as RolloutBatch
    from sdpo_plugin.interface.micro_batch import Worker as Worker


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
