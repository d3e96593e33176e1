"""On-policy self-distillation (SDPO, SDFT, OPSD and their variants) for OpenRLHF.

What plugin authors need is importable from here; each name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "algorithms.base": ["SelfDistillation"],
    "algorithms.teacher": ["Teacher"],
    "config": [
        "ConfigError", "DiagnosticsConfig", "DistillConfig", "OptionGroup", "RepromptConfig", "StopTraining",
        "TeacherConfig", "option",
    ],
    "distillation.context": ["Rollout", "TeacherContext", "build_teacher_contexts"],
    "distillation.fused": ["linear_distillation_loss"],
    "distillation.loss": ["TokenBatch", "distillation_loss", "token_divergence"],
    "hookspecs": ["hookimpl"],
    "interface.micro_batch": ["MicroBatch"],
    "interface.models": ["Fragment", "Worker"],
    "interface.rollout_batch": ["RolloutBatch"],
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = [*_MODULE_OF, "__version__"]

if TYPE_CHECKING:
    from sdpo_plugin.algorithms.base import SelfDistillation as SelfDistillation
    from sdpo_plugin.algorithms.teacher import Teacher as Teacher
    from sdpo_plugin.config import ConfigError as ConfigError
    from sdpo_plugin.config import DiagnosticsConfig as DiagnosticsConfig
    from sdpo_plugin.config import DistillConfig as DistillConfig
    from sdpo_plugin.config import OptionGroup as OptionGroup
    from sdpo_plugin.config import RepromptConfig as RepromptConfig
    from sdpo_plugin.config import StopTraining as StopTraining
    from sdpo_plugin.config import TeacherConfig as TeacherConfig
    from sdpo_plugin.config import option as option
    from sdpo_plugin.distillation.context import Rollout as Rollout
    from sdpo_plugin.distillation.context import TeacherContext as TeacherContext
    from sdpo_plugin.distillation.context import build_teacher_contexts as build_teacher_contexts
    from sdpo_plugin.distillation.fused import linear_distillation_loss as linear_distillation_loss
    from sdpo_plugin.distillation.loss import TokenBatch as TokenBatch
    from sdpo_plugin.distillation.loss import distillation_loss as distillation_loss
    from sdpo_plugin.distillation.loss import token_divergence as token_divergence
    from sdpo_plugin.hookspecs import hookimpl as hookimpl
    from sdpo_plugin.interface.micro_batch import MicroBatch as MicroBatch
    from sdpo_plugin.interface.models import Fragment as Fragment
    from sdpo_plugin.interface.models import Worker as Worker
    from sdpo_plugin.interface.rollout_batch import RolloutBatch as RolloutBatch


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
