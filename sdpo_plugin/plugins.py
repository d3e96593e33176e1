"""Which plugins take part: the installed ones, those of `--plugins`, and the chosen algorithm.

Every process of a run calls `activate` with the same arguments, so all hold the same plugins; state that a plugin keeps
is the process's own. `OPENRLHF_PLUGINS=name,other` narrows the installed plugins to those (an empty value to none).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pluggy

from sdpo_plugin import hookspecs
from sdpo_plugin.config import ConfigError
from sdpo_plugin.interface.micro_batch import combined_requirements

ENTRY_POINTS = "openrlhf.plugins"
ALLOWED = "OPENRLHF_PLUGINS"  # as in launcher/startup.py, which imports nothing
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """An installed plugin, or one named by `--plugins`.

    Attributes:
        name: of the entry point, or the module.
        source: distribution and version, or "--plugins".
        problem: why it is not active, or None.
    """

    name: str
    source: str
    problem: str | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.source})" + (f", not active: {self.problem}" if self.problem else "")


def load(modules: Sequence[str] = ()) -> tuple[pluggy.PluginManager, list[Found]]:
    """A manager with the installed plugins and `modules`, in this order, and what was found.

    An installed plugin that cannot be loaded is left out, with a warning.

    Raises:
        ConfigError: one of `modules` cannot be imported.
    """
    manager, found = pluggy.PluginManager(hookspecs.PROJECT), []
    manager.add_hookspecs(hookspecs)
    allowed = os.environ.get(ALLOWED)
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        problem = None
        if allowed is not None and entry.name not in allowed.split(","):
            problem = f"excluded by {ALLOWED}={allowed}"
        elif manager.get_plugin(entry.name) is None:  # else listed twice, as in an editable install's build folder
            try:
                _register(manager, entry.load(), entry.name)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                logger.warning(f"plugin {entry.name} ({entry.value}) is left out, it cannot be loaded: {problem}")
        found.append(Found(entry.name, f"{entry.dist.name} {entry.dist.version}" if entry.dist else "?", problem))
    if modules and "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does; console scripts and Ray workers do not
    for name in modules:
        try:
            module = importlib.import_module(name)
            if not manager.is_registered(module):  # else it is installed, too
                _register(manager, module, name)
        except (ImportError, ValueError, pluggy.PluginValidationError) as error:
            raise ConfigError(f"--plugins {name}: {error}; give an importable module that defines hooks") from error
        found.append(Found(name, "--plugins"))
    return manager, found


def _register(manager: pluggy.PluginManager, plugin: Any, name: str) -> None:
    manager.register(plugin, name)
    try:
        manager.check_pending()  # hooks that do not exist
    except pluggy.PluginValidationError:
        manager.unregister(plugin)
        raise


def algorithms(manager: pluggy.PluginManager) -> dict[str, type[Any]]:
    """What the plugins of `manager` offer to `--algo`, by name; of two with one name, the last one's."""
    offered: Sequence[Sequence[type[Any]]] = manager.hook.openrlhf_algorithms()
    return {algorithm.name: algorithm for some in reversed(offered) for algorithm in some}


def algorithm_class(manager: pluggy.PluginManager, name: str) -> type[Any]:
    """Raises ConfigError for a name that no plugin offers."""
    known = algorithms(manager)
    if name not in known:
        raise ConfigError(f"--algo {name}: unknown algorithm; choose one of {', '.join(known)}")
    return known[name]


_active: pluggy.PluginManager | None = None


def activate(args: Any, loaded: pluggy.PluginManager | None = None) -> pluggy.PluginManager:
    """Make this process's manager, with the algorithm of `args`; `active` returns it from then on.

    An algorithm that has nothing to do with these arguments (`is_enabled`) is not registered.
    """
    global _active
    manager = loaded or load(args.plugins)[0]
    if args.algo.name is not None:
        chosen = algorithm_class(manager, args.algo.name)
        if chosen.is_enabled(args):
            manager.register(chosen(args), f"algorithm {args.algo.name}")
            manager.check_pending()
    _active = manager
    return manager


def active() -> pluggy.PluginManager:
    """This process's manager. Raises RuntimeError before `activate`."""
    if _active is None:
        raise RuntimeError("no plugins were activated in this process")
    return _active


def algorithm() -> Any:
    """This process's algorithm, or None: for plugins that build on another."""
    return next((p for name, p in active().list_name_plugin() if name.startswith("algorithm ")), None)


def requirements(args: Any) -> dict[str, bool]:
    """What the run's plugins need of a micro-batch (`openrlhf_requirements`)."""
    return combined_requirements(active().hook.openrlhf_requirements(args=args))
