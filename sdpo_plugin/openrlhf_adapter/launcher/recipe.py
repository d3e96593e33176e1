"""Recipes: nested YAML whose keys are the dotted flag names. A recipe is a command line that comes before yours.

So a value is the text in the file, which the flag's own type converts: `off`, `0100` and `12:30:45` stay as they are.
Only null has a meaning of its own and, for a boolean flag, true and false.
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import YAMLError

from sdpo_plugin.config import ConfigError

# The words of YAML 1.2 and, for a switch, also those of YAML 1.1.
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class _Texts(SafeConstructor):
    """Leaves what YAML has other types for as the text that was written."""


for _kind in ("bool", "int", "float", "timestamp"):
    _Texts.add_constructor(f"tag:yaml.org,2002:{_kind}", SafeConstructor.construct_yaml_str)


def load(path: str) -> dict[str, Any]:
    """The recipe with dotted keys: `{"actor": {"adam": {"lr": 1e-5}}}` -> `{"actor.adam.lr": "1e-5"}`.

    A value is a text, None, or a list of these.

    Raises:
        ConfigError: the file cannot be read, is not YAML (1.2) with nested keys, or has a key twice.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Texts
    try:
        recipe = yaml.load(Path(path)) or {}
        if not isinstance(recipe, dict):
            raise ConfigError(
                f"--config {path}: expected nested keys, found {type(recipe).__name__}; recipes/ has examples"
            )
        return _flatten(recipe)
    except DuplicateKeyError as error:  # whose whole message shows both values
        problem = error.problem.partition(" with value ")[0]
        raise ConfigError(f"--config {path}: {problem} in line {error.problem_mark.line + 1}; keep one") from error
    except (OSError, YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    except RecursionError as error:
        raise ConfigError(
            f"--config {path}: the keys are nested too deeply, or contain themselves; write them out"
        ) from error


def command_line(recipe: dict[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """The recipe as flags of `parser`.

    Raises:
        ConfigError: a key is no flag (the message names the nearest one), a switch is neither true nor false, or null
            stands where the flag has no such value.
    """
    actions: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, []).append(action)
    flags = []
    for key, value in recipe.items():
        if key not in actions or key == "config":
            near = difflib.get_close_matches(key, actions, n=1)
            raise ConfigError(f"recipe: unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""))
        flags += _flags(key, actions[key], value)
    return flags


def _flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _flags(key: str, actions: list[argparse.Action], value: Any) -> list[str]:
    action = actions[0]
    flag = action.option_strings[0]
    if action.nargs == 0:  # a switch, possibly with a second flag that turns it off
        on = SWITCH.get(str(value).lower())
        if on is None:
            raise ConfigError(f"recipe: {key}: {_shown(value)} is neither true nor false; give one of them")
        if isinstance(action, argparse.BooleanOptionalAction):
            return [action.option_strings[0 if on else 1]]
        return [a.option_strings[0] for a in actions if a.const == on]
    if isinstance(value, list):
        return [flag, *map(_shown, value)]
    if value is not None or _takes_none(action):
        return [f"{flag}={'none' if value is None else value}"]
    if action.default is not None:
        raise ConfigError(f"recipe: {key}: null is not a valid value; give a value, or leave the key out")
    return []  # which is what OpenRLHF's flags without a default stand for


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _takes_none(action: argparse.Action) -> bool:
    """Whether `none` is a value of the flag that means None (`flags._optional`)."""
    try:
        return callable(action.type) and action.choices is None and action.type("none") is None
    except (TypeError, ValueError):
        return False
