"""Leaves out warnings that every run would print in every process and that no setting avoids.

torch imports the module `pynvml`, which warns that it is deprecated. OpenRLHF turns on zero-copy tensors in its Ray
workers: Ray warns when it sends one, and torch when it receives one.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from typing import Any

PYNVML = "The pynvml package is deprecated"
ZERO_COPY = "Zero-copy tensor serialization is enabled"
NOT_WRITABLE = "The given NumPy array is not writable"
RAY_TENSORS = "ray._private.tensor_serialization_utils"
VARIABLE = "PYTHONWARNINGS"
HOOKS = {  # by the hook that the run has without this module: none, or that of platform/cpu.py
    None: "sdpo_plugin.openrlhf_adapter.launcher.quiet.set_up_worker",
    "sdpo_plugin.openrlhf_adapter.platform.cpu.enable": "sdpo_plugin.openrlhf_adapter.launcher.quiet.set_up_cpu_worker",
}


def silence() -> None:
    """Leave out the pynvml warning in this process and in those that it starts."""
    warnings.filterwarnings("ignore", message=PYNVML, category=FutureWarning)
    os.environ[VARIABLE] = filters()


def filters() -> str:
    """`PYTHONWARNINGS` with the pynvml warning left out: for processes that import torch before this package."""
    given, own = os.environ.get(VARIABLE, ""), f"ignore:{PYNVML}:FutureWarning"
    return given if own in given else ",".join(filter(None, (given, own)))


def in_workers(init: Callable[..., Any]) -> Callable[..., Any]:
    """`ray.init` whose workers leave out all of them."""

    def call(*args: Any, **kwargs: Any) -> Any:
        environment = dict(kwargs.get("runtime_env") or {})
        hook = environment.get("worker_process_setup_hook")
        environment["worker_process_setup_hook"] = HOOKS.get(hook, hook)
        environment["env_vars"] = {VARIABLE: filters(), **environment.get("env_vars", {})}
        return init(*args, **{**kwargs, "runtime_env": environment})

    return call


def set_up_worker() -> None:
    """Run by Ray in each of its workers after Ray is imported, whose own filter would otherwise come first."""
    warnings.filterwarnings("ignore", message=ZERO_COPY)
    warnings.filterwarnings("ignore", message=NOT_WRITABLE, module=re.escape(RAY_TENSORS))


def set_up_cpu_worker() -> None:
    """The same in a run on the CPU."""
    from sdpo_plugin.openrlhf_adapter.platform import cpu

    set_up_worker()
    cpu.enable()
