"""Recipes: nested YAML whose keys are the dotted flag names. A recipe is a command line that comes before yours."""

from __future__ import annotations

import argparse
import difflib
from typing import Any

import yaml

from sdpo_plugin.config import ConfigError


def load(path: str) -> dict[str, Any]:
    """The recipe with dotted keys: `{"actor": {"adam": {"lr": 1e-5}}}` -> `{"actor.adam.lr": 1e-5}`.

    Raises:
        ConfigError: the file cannot be read or is not YAML with nested keys.
    """
    try:
        with open(path) as file:
            recipe = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(recipe, dict):
        raise ConfigError(f"--config {path}: expected nested keys, found {type(recipe).__name__}")
    return _flatten(recipe)


def command_line(recipe: dict[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """The recipe as flags of `parser`.

    Raises:
        ConfigError: a key is no flag (the message names the nearest one), or a switch is neither true nor false.
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
    flag = actions[0].option_strings[0]
    if actions[0].nargs == 0:  # a switch, possibly with a second flag that turns it off
        if not isinstance(value, bool):
            raise ConfigError(f"recipe: {key}: {value!r} is not true or false")
        if isinstance(actions[0], argparse.BooleanOptionalAction):
            return [actions[0].option_strings[0 if value else 1]]
        return [a.option_strings[0] for a in actions if a.const == value]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={'none' if value is None else value}"]
