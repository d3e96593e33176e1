"""`openrlhf-sdpo train ...`: the host's own launcher with plugins, recipes, and a CPU where there is no GPU."""

from __future__ import annotations

import argparse
import dataclasses
import runpy
import sys
import typing
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from sdpo_plugin.config import ConfigError, Group, StopTraining, chat_template_kwargs
from sdpo_plugin.host import manager, recipe

LAUNCHER = "openrlhf.cli.train_ppo_ray"
USAGE = "usage: openrlhf-sdpo train [--config RECIPE.yaml] [--algo NAME] [any flag of openrlhf.cli.train_ppo_ray]"


def main(command: Sequence[str] | None = None) -> None:
    command = sys.argv[1:] if command is None else list(command)
    if not command or command[0] != "train":
        sys.exit(USAGE if command[:1] in ([], ["-h"], ["--help"]) else f"unknown command {command[0]}\n{USAGE}")
    try:
        train(command[1:])
    except ConfigError as error:
        sys.exit(f"openrlhf-sdpo: error: {getattr(error, 'cause', error)}")  # Ray's error is of its cause's type, too
    except StopTraining as reason:
        sys.exit(f"openrlhf-sdpo: stopped: {getattr(reason, 'cause', reason)}")


def train(arguments: list[str]) -> None:
    """Run the host's launcher in this process on `arguments`.

    Raises:
        ConfigError: before Ray starts or a model loads.
        SeamError: the installed host cannot be extended.
    """
    import torch

    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        from sdpo_plugin.host import cpu

        print("openrlhf-sdpo: no CUDA here, running the host on CPU (for trying and testing; see docs/cpu.md)")
        cpu.enable()
    from sdpo_plugin.host import seams

    seams.check()
    seams.install()
    _extend_parser(on_cpu)
    sys.argv = [LAUNCHER, *arguments]
    runpy.run_module(LAUNCHER, run_name="__main__", alter_sys=True)


def _extend_parser(on_cpu: bool) -> None:
    """Let the host's parser, and no other, take plugins into account.

    The host builds its parser under `if __name__ == "__main__"`, out of reach, and calls `parse_args()` on it.
    """
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        if not any(action.dest == "actor.model_name_or_path" for action in parser._actions):
            return original(parser, args, namespace)
        argparse.ArgumentParser.parse_args = original
        return parse(parser, sys.argv[1:] if args is None else list(args), on_cpu)

    argparse.ArgumentParser.parse_args = parse_args


def parse(parser: argparse.ArgumentParser, arguments: list[str], on_cpu: bool) -> argparse.Namespace:
    """Parse `arguments` with the host's `parser` extended by recipe and plugins; every plugin has agreed.

    Order, later wins: the host's defaults, the algorithm's defaults, the recipe, the command line.
    """
    group = parser.add_argument_group("plugins")
    algo = group.add_argument("--algo", dest="algo.name", metavar="NAME", help="self-distillation algorithm")
    group.add_argument("--config", metavar="RECIPE.yaml", help="flags as nested YAML; the command line wins")
    group.add_argument("--plugins", nargs="*", default=[], metavar="MODULE", help="plugin modules besides installed")

    group.add_argument(
        "--rollout.deterministic", action="store_true",
        help="the same samples in every run, whatever was resumed and however many engines there are: each request "
        "has a seed of its own, from --train.seed, step, prompt and sample, and the engine to itself (slow)",
    )
    group.add_argument(
        "--data.chat_template_kwargs", default="{}", metavar="JSON",
        help="what the chat template is given besides the messages, for student and teacher, in training and "
        "evaluation, as a JSON object: '{\"enable_thinking\": false}'",
    )

    # Plugins add flags and algorithms set defaults, so these must be known before the rest can be parsed.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--algo", "--config"):
        early.add_argument(name)
    early.add_argument("--plugins", nargs="*")
    known, _ = early.parse_known_args(arguments)
    from_recipe = recipe.load(known.config) if known.config else {}
    algorithm = known.algo or from_recipe.get("algo.name")
    plugins = manager.plugin_manager(tuple(known.plugins or from_recipe.get("plugins") or ()), algorithm)

    algo.help += ": " + ", ".join(manager.algorithms(plugins))
    plugins.hook.openrlhf_add_arguments(parser=parser)
    if on_cpu:
        from sdpo_plugin.host import cpu

        parser.set_defaults(**cpu.DEFAULTS)
    arguments = recipe.command_line(from_recipe, parser) + arguments
    from openrlhf.utils.config import hierarchize

    if algorithm:
        chosen = manager.algorithms(plugins)[algorithm]
        parser.set_defaults(**getattr(chosen, "defaults", {}))
        if hasattr(chosen, "defaults_for"):
            parser.set_defaults(**chosen.defaults_for(hierarchize(parser.parse_args(arguments))))
    nested = hierarchize(parser.parse_args(arguments))
    plugins.hook.openrlhf_configure(args=nested)
    chat_template_kwargs(nested)
    if nested.rollout.deterministic and nested.train.async_enable:
        raise ConfigError(
            "--rollout.deterministic True: --train.async_enable samples while the weights change, which no seed "
            "repeats; leave one of them out"
        )
    if on_cpu and (problem := cpu.refuse(nested)):
        raise ConfigError(problem)
    return argparse.Namespace(**_flat(nested))


def _flat(nested: SimpleNamespace, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in vars(nested).items():
        if isinstance(value, SimpleNamespace):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def add_group(parser: argparse.ArgumentParser, group: type[Group]) -> None:
    """The flags of an option group: one per field, `--prefix.field`, with its type, choices, default and help."""
    section = parser.add_argument_group(f"--{group.prefix}", (group.__doc__ or "").strip())
    hints = typing.get_type_hints(group)
    for f in dataclasses.fields(group):
        kinds = [k for k in (typing.get_args(hints[f.name]) or (hints[f.name],)) if k is not type(None)]
        optional = type(None) in typing.get_args(hints[f.name])
        flag, help = f"--{group.prefix}.{f.name}", f.metadata["help"]
        if kinds == [bool]:
            section.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=help)
        else:
            section.add_argument(
                flag, type=_optional(kinds[0]) if optional else kinds[0], default=f.default,
                choices=f.metadata["choices"], help=f"{help} (default: {f.default!r})",
            )


def _optional(kind: type) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = f"{kind.__name__} or none"  # argparse: "invalid float or none value: 'x'"
    return convert


if __name__ == "__main__":
    main()
