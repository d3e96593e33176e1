"""OpenRLHF's policy worker in one process: what it imports and does not call there is stood in for.

Ray and vLLM start and serve processes; here one process is the worker. flash_attn's padding helpers have the same
meaning in transformers. Whatever is installed is used as it is, but for Ray: a class that Ray has wrapped cannot be
called in this process.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any


class Anything:
    """For a class or a function that is imported only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class StandIn(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        found = name.split(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if found else None

    def create_module(self, spec: Any) -> StandIn:
        return StandIn(spec.name)

    def exec_module(self, module: Any) -> None:
        if module.__name__ == "ray":
            # `@ray.remote` and `@ray.remote(num_gpus=1)`: the class as it is.
            module.remote = lambda *args, **kwargs: args[0] if args else lambda cls: cls
        if module.__name__ == "vllm":
            module.__version__ = "0"


FLASH_ATTENTION = importlib.util.find_spec("flash_attn") is not None


def stand_in() -> None:
    """Call before anything of OpenRLHF is imported."""
    names = {"ray"} | {name for name in ("vllm",) if importlib.util.find_spec(name) is None}
    sys.meta_path.insert(0, Finder(names))
    import torch

    from sdpo_plugin.openrlhf_adapter.platform import cpu

    if not torch.cuda.is_available():
        cpu.enable()
    elif not FLASH_ATTENTION:
        cpu._stand_in_for_flash_attn()
