"""OpenRLHF's launcher in this process: its parser extended by recipe and plugins, its arguments checked, its run."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable
from typing import Any

from sdpo_plugin import plugins
from sdpo_plugin.config import ConfigError, RewardConfig, add_group, chat_template_kwargs, flat, from_namespace
from sdpo_plugin.openrlhf_adapter import patch_points as seams
from sdpo_plugin.openrlhf_adapter.engine import deterministic
from sdpo_plugin.openrlhf_adapter.launcher import recipe
from sdpo_plugin.openrlhf_adapter.platform.cluster import PLATFORMS, VARIABLE
from sdpo_plugin.openrlhf_adapter.worker import sleep

LAUNCHER = "openrlhf.cli.train_ppo_ray"


def train(arguments: list[str]) -> None:
    """Run OpenRLHF's launcher in this process on `arguments`.

    Raises:
        ConfigError: before Ray starts or a model loads.
        SeamError: the installed OpenRLHF cannot be extended.
    """
    import torch

    from sdpo_plugin.openrlhf_adapter.platform import cluster

    joined = cluster.joined()
    on_cpu = cluster.on_cpu(early(arguments)[0].platform, joined)
    if on_cpu:
        from sdpo_plugin.openrlhf_adapter.platform import cpu

        print("openrlhf-sdpo: running OpenRLHF on CPU (for trying and testing; see docs/cpu.md)")
        cpu.enable()
    try:
        from sdpo_plugin.openrlhf_adapter.launcher.install import install  # with all modules that declare seams
    except (ImportError, AttributeError) as error:
        if joined is not None and not on_cpu and not torch.cuda.is_available():
            raise ConfigError(
                f"--platform: the run is on the GPUs of the Ray cluster at {joined.address}, but OpenRLHF cannot be "
                f"imported on this machine, where it is started ({error}); install it here as it is there, or, if "
                "those GPUs are only names, give --platform cpu"
            ) from error
        raise seams.SeamError(seams.cannot_be_extended(f"  {error}")) from error
    seams.check()
    install()
    from sdpo_plugin.openrlhf_adapter.launcher import preflight

    _launch(arguments, on_cpu, lambda args, _: preflight.check(args, joined, on_cpu))


class _Parsed(Exception):  # noqa: N818
    """Ends OpenRLHF's launcher where it has parsed its arguments."""


def parsed(arguments: list[str], on_cpu: bool) -> tuple[Any, dict[str, Any]]:
    """What `train` would run with: the nested arguments, and OpenRLHF's own defaults by dotted name."""

    def end(*found: Any) -> None:
        raise _Parsed(*found)

    try:
        _launch(arguments, on_cpu, end)
    except _Parsed as found:
        return found.args
    raise RuntimeError("OpenRLHF's launcher parsed nothing")


def _launch(arguments: list[str], on_cpu: bool, check: Callable[[Any, dict[str, Any]], None]) -> None:
    _extend_parser(on_cpu, check)
    sys.argv = [LAUNCHER, *arguments]
    runpy.run_module(LAUNCHER, run_name="__main__", alter_sys=True)


def _extend_parser(on_cpu: bool, check: Callable[[Any, dict[str, Any]], None]) -> None:
    """Let OpenRLHF's parser, and no other, take plugins into account.

    `check` looks at the nested result, and at OpenRLHF's own defaults.

    OpenRLHF builds its parser under `if __name__ == "__main__"`, out of reach, and calls `parse_args()` on it.
    """
    parser_class: Any = argparse.ArgumentParser
    original = parser_class.parse_args

    def parse_args(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        if not any(action.dest == "actor.model_name_or_path" for action in parser._actions):
            return original(parser, args, namespace)
        parser_class.parse_args = original
        defaults = {action.dest: action.default for action in parser._actions}
        seams.check_flags(defaults)
        found = parse(parser, sys.argv[1:] if args is None else list(args), on_cpu)
        from openrlhf.utils.config import hierarchize

        check(hierarchize(found), defaults)
        return found

    parser_class.parse_args = parse_args


def parse(parser: argparse.ArgumentParser, arguments: list[str], on_cpu: bool) -> argparse.Namespace:
    """Parse `arguments` with OpenRLHF's `parser` extended by recipe and plugins; every plugin has agreed.

    Order, later wins: OpenRLHF's defaults, the algorithm's defaults, the recipe, the command line.
    """
    group = parser.add_argument_group("plugins")
    algo = group.add_argument("--algo", dest="algo.name", metavar="NAME", help="self-distillation algorithm")
    group.add_argument(
        "--config", metavar="RECIPE.yaml", action="append", help="flags as nested YAML; may be given several times, "
        "later ones win, and the command line over all",
    )  # fmt: skip
    group.add_argument("--plugins", nargs="*", default=[], metavar="MODULE", help="plugin modules besides installed")
    group.add_argument(
        "--platform", choices=PLATFORMS, help="where the workers run; auto: on CPU if neither this machine nor the Ray "
        f"cluster that is joined has a GPU (default: the environment's {VARIABLE}, or auto)",
    )  # fmt: skip
    deterministic.add_argument(group)
    add_group(parser, RewardConfig)
    group.add_argument(
        "--data.chat_template_kwargs", default="{}", metavar="JSON",
        help="what the chat template is given besides the messages, for student and teacher, in training and "
        "evaluation, as a JSON object: '{\"enable_thinking\": false}'",
    )

    # Plugins add flags and algorithms set defaults, so these must be known before the rest can be parsed.
    known, from_recipe = early(arguments)
    algorithm = known.algo
    manager, found = plugins.load(known.plugins or ())
    algo.help = f"{algo.help}: {', '.join(plugins.algorithms(manager))}"
    manager.hook.openrlhf_add_arguments(parser=parser)
    chosen = plugins.algorithm_class(manager, algorithm) if algorithm else None
    for options in getattr(chosen, "options", ()):
        add_group(parser, options)
    if on_cpu:
        from sdpo_plugin.openrlhf_adapter.platform import cpu

        parser.set_defaults(**cpu.DEFAULTS)
    arguments = recipe.command_line(from_recipe, parser) + arguments
    from openrlhf.utils.config import hierarchize

    if chosen is not None:
        parser.set_defaults(**chosen.defaults)
        parser.set_defaults(**chosen.defaults_for(hierarchize(parser.parse_args(arguments))))
    nested = hierarchize(parser.parse_args(arguments))
    plugins.activate(nested, manager).hook.openrlhf_configure(args=nested)
    chat_template_kwargs(nested)
    deterministic.refuse(nested)
    sleep.refuse(nested)
    from_namespace(RewardConfig, nested)
    acting = f"--algo {algorithm}" if plugins.algorithm() else "no self-distillation"
    print(f"openrlhf-sdpo: {acting}; plugins: {'; '.join(map(str, found))}")
    if on_cpu:
        cpu.refuse(nested)
    return argparse.Namespace(**flat(nested))


def early(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """What must be known before the rest can be parsed, and the recipe."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--algo", "--platform"):
        parser.add_argument(name)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--plugins", nargs="*")
    known, _ = parser.parse_known_args(arguments)
    from_recipe: dict[str, Any] = {}
    for path in known.config:
        from_recipe |= recipe.load(path)
    for name, key in (("algo", "algo.name"), ("plugins", "plugins"), ("platform", "platform")):
        if getattr(known, name) is None:
            setattr(known, name, from_recipe.get(key))
    if isinstance(known.plugins, str):  # `plugins: mine` in a recipe
        known.plugins = [known.plugins]
    return known, from_recipe
