"""OpenRLHF's launcher in this process: its parser extended by recipe and plugins, its arguments checked, its run."""

from __future__ import annotations

import argparse
import difflib
import runpy
import sys
from collections.abc import Callable
from typing import Any

from sdpo_plugin import plugins
from sdpo_plugin.config import ConfigError, RewardConfig, flat, from_namespace
from sdpo_plugin.distillation.chat_arguments import chat_template_kwargs
from sdpo_plugin.openrlhf_adapter import patch_points
from sdpo_plugin.openrlhf_adapter.engine import deterministic
from sdpo_plugin.openrlhf_adapter.launcher import options, recipe
from sdpo_plugin.openrlhf_adapter.worker import sleep

LAUNCHER = "openrlhf.cli.train_ppo_ray"


def train(arguments: list[str]) -> None:
    """Run OpenRLHF's launcher in this process on `arguments`, or print its help.

    Raises:
        ConfigError: before Ray starts or a model loads.
        IncompatibleOpenRLHF: the installed OpenRLHF cannot be extended.
    """
    if options.help_asked(arguments) == "--help":
        known, _ = early(arguments)
        print(options.own_help(known.plugins or (), known.algo), end="")
        return
    if options.help_asked(arguments):
        show_all_options(arguments)
        return
    import torch

    from sdpo_plugin.openrlhf_adapter.platform import cluster

    joined = cluster.joined()
    on_cpu = cluster.on_cpu(early(arguments)[0].platform, joined)
    if on_cpu:
        from sdpo_plugin.openrlhf_adapter.platform import cpu

        print("openrlhf-sdpo: OpenRLHF runs on the CPU, which is meant for trying and testing (docs/install.md)")
        cpu.enable()
    try:
        from sdpo_plugin.openrlhf_adapter.launcher.install import install  # with all modules that declare patch_points
    except (ImportError, AttributeError) as error:
        if joined is not None and not on_cpu and not torch.cuda.is_available():
            raise ConfigError(
                f"--platform: the run uses the GPUs of the Ray cluster at {joined.address}, but OpenRLHF cannot be "
                f"imported on this machine, where the run is started ({error}); install the cluster's packages here "
                "or, if the cluster has no real GPUs, give --platform cpu"
            ) from error
        raise patch_points.IncompatibleOpenRLHF(patch_points.cannot_be_extended(f"  {error}")) from error
    patch_points.check()
    install()
    from sdpo_plugin.openrlhf_adapter.launcher import preflight

    outputs: list[str] = []

    def check(args: Any, defaults: dict[str, Any]) -> None:
        preflight.check(args, joined, on_cpu)
        outputs.append(args.ckpt.output_dir)

    _launch(arguments, on_cpu, check)
    print(f"openrlhf-sdpo: finished; the model is in {outputs[0]}", flush=True)


def show_all_options(arguments: list[str]) -> None:
    """Print the options of package, plugins and OpenRLHF, whose parser is only there once it runs."""
    import torch

    if not torch.cuda.is_available():
        from sdpo_plugin.openrlhf_adapter.platform import cpu

        cpu.enable()
    try:
        _launch(arguments, not torch.cuda.is_available(), lambda args, defaults: None)
    except ImportError as error:
        raise patch_points.IncompatibleOpenRLHF(patch_points.cannot_be_extended(f"  {error}")) from error


class _Parsed(Exception):  # noqa: N818
    """Ends OpenRLHF's launcher once it has parsed its arguments."""


def parsed(arguments: list[str], on_cpu: bool) -> tuple[Any, dict[str, Any]]:
    """The nested arguments of `train`, and OpenRLHF's own defaults by dotted name."""

    def end(*found: Any) -> None:
        raise _Parsed(*found)

    try:
        _launch(arguments, on_cpu, end)
    except _Parsed as found:
        return found.args
    raise RuntimeError("OpenRLHF's launcher did not parse its arguments")


def _launch(arguments: list[str], on_cpu: bool, check: Callable[[Any, dict[str, Any]], None]) -> None:
    _extend_parser(on_cpu, check)
    sys.argv = [LAUNCHER, *arguments]
    runpy.run_module(LAUNCHER, run_name="__main__", alter_sys=True)


def _extend_parser(on_cpu: bool, check: Callable[[Any, dict[str, Any]], None]) -> None:
    """Extend OpenRLHF's parser, and no other, by recipe and plugins.

    `check` is given the nested result and OpenRLHF's own defaults.

    OpenRLHF builds its parser under `if __name__ == "__main__"`, out of reach, and calls `parse_args()` on it.
    """
    parser_class: Any = argparse.ArgumentParser
    original = parser_class.parse_args

    def parse_args(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        if not any(action.dest == "actor.model_name_or_path" for action in parser._actions):
            return original(parser, args, namespace)
        parser_class.parse_args = original
        defaults = {action.dest: action.default for action in parser._actions}
        patch_points.check_flags(defaults)
        found = parse(parser, sys.argv[1:] if args is None else list(args), on_cpu)
        from openrlhf.utils.config import hierarchize

        check(hierarchize(found), defaults)
        return found

    parser_class.parse_args = parse_args


def parse(parser: argparse.ArgumentParser, arguments: list[str], on_cpu: bool) -> argparse.Namespace:
    """Parse `arguments` with OpenRLHF's `parser`, extended by recipe and plugins; every plugin checks the result.

    Order, later wins: OpenRLHF's defaults, the algorithm's defaults, the recipe, the command line.
    """
    # Plugins add flags and algorithms set defaults, so these must be known before the rest can be parsed.
    known, from_recipe = early(arguments)
    algorithm = known.algo
    manager, found = plugins.load(known.plugins or ())
    chosen = plugins.algorithm_class(manager, algorithm) if algorithm else None
    theirs = list(parser._actions)
    options.add_options(parser, manager, plugins.algorithms(manager), [chosen] if chosen else [])
    parser.prog, parser.usage = options.PROG, options.USAGE
    if on_cpu:
        from sdpo_plugin.openrlhf_adapter.platform import cpu

        parser.set_defaults(**cpu.DEFAULTS)
    if options.help_asked(arguments):
        parser.set_defaults(**(options.defaults_of(chosen) if chosen else {}))
        print(options.whole_help(parser, theirs), end="")
        raise SystemExit(0)
    arguments = recipe.command_line(from_recipe, parser) + arguments
    from openrlhf.utils.config import hierarchize

    if chosen is not None:
        parser.set_defaults(**chosen.defaults)
        parser.set_defaults(**chosen.defaults_for(hierarchize(_parse(parser, arguments))))
    nested = hierarchize(_parse(parser, arguments))
    plugins.activate(nested, manager).hook.openrlhf_configure(args=nested)
    chat_template_kwargs(nested)
    deterministic.reject(nested)
    sleep.reject(nested)
    from_namespace(RewardConfig, nested)
    acting = f"--algo {algorithm}" if plugins.algorithm() else "no self-distillation"
    print(f"openrlhf-sdpo: {acting}; plugins: {'; '.join(map(str, found))}")
    if on_cpu:
        cpu.reject(nested)
    return argparse.Namespace(**flat(nested))


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """`parser.parse_args`, but an unknown flag is answered with the nearest one, not with all flags."""
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(flag, parser._option_string_actions, n=1) if flag.startswith("-") else []
        fix = f"did you mean {near[0]}?" if near else f"{options.PROG} --help-all shows all flags"
        raise ConfigError(f"{flag}: unknown {'flag' if flag.startswith('-') else 'argument'}; {fix}")
    return found


def early(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags that must be known before the rest can be parsed, and the recipe."""
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
