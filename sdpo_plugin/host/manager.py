"""Which plugins take part in a run: the installed ones, those named by `--plugins`, and the chosen algorithm."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import pluggy

from sdpo_plugin.config import ConfigError
from sdpo_plugin.host import hookspecs
from sdpo_plugin.step import combined_needs

ENTRY_POINTS = "openrlhf.plugins"
logger = logging.getLogger(__name__)


@cache
def plugin_manager(modules: tuple[str, ...] = (), algorithm: str | None = None) -> pluggy.PluginManager:
    """The manager of this process: entry points, then `modules` in order, then the algorithm of that name.

    Every process of a run calls this with the same arguments, so all hold the same plugins; state that a plugin
    keeps is the process's own.

    Raises:
        ConfigError: a module cannot be imported, or no plugin offers the algorithm.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.load_setuptools_entrypoints(ENTRY_POINTS)
    if modules and "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does; console scripts and Ray workers do not
    for name in modules:
        try:
            manager.register(importlib.import_module(name), name)
        except ImportError as error:
            raise ConfigError(f"--plugins {name}: {error}; give an importable module") from error
    if algorithm is not None:
        manager.register(_algorithm(manager, algorithm)(), f"algorithm {algorithm}")
    manager.check_pending()
    return manager


def of(args: Any) -> pluggy.PluginManager:
    """The manager for the host's nested arguments."""
    return plugin_manager(tuple(args.plugins), args.algo.name)


def needs(args: Any) -> dict[str, bool]:
    """What the run's plugins need of a step (`openrlhf_needs`)."""
    return combined_needs(of(args).hook.openrlhf_needs(args=args))


def algorithms(manager: pluggy.PluginManager) -> dict[str, type]:
    offered: Sequence[Sequence[type]] = manager.hook.openrlhf_algorithms()
    return {algorithm.name: algorithm for some in reversed(offered) for algorithm in some}


def _algorithm(manager: pluggy.PluginManager, name: str) -> type:
    known = algorithms(manager)
    if name not in known:
        raise ConfigError(f"--algo {name}: unknown algorithm; choose one of {', '.join(known)}")
    return known[name]
