"""The command-line flags of an option group."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

from sdpo_plugin.config import OptionGroup


def add_group(parser: argparse.ArgumentParser, group: type[OptionGroup]) -> None:
    """The flags of an option group: one per field, `--prefix.field`, with its type, choices, default and help."""
    section = parser.add_argument_group(f"--{group.prefix}", (group.__doc__ or "").strip())
    hints = typing.get_type_hints(group)
    for f in dataclasses.fields(group):
        kinds = [k for k in (typing.get_args(hints[f.name]) or (hints[f.name],)) if k is not type(None)]
        optional = type(None) in typing.get_args(hints[f.name])
        flag, help = f"--{group.prefix}.{f.name}", f.metadata["help"].replace("%", "%%")
        if kinds == [bool]:
            section.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=help)
        else:
            section.add_argument(
                flag, type=_optional(kinds[0]) if optional else kinds[0], default=f.default,
                choices=f.metadata["choices"], help=help,
            )  # fmt: skip


def _optional(kind: type) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = f"{kind.__name__} or none"  # argparse: "invalid float or none value: 'x'"
    return convert
