"""The command `openrlhf-sdpo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

try:
    from sdpo_plugin import plugins
    from sdpo_plugin.config import GROUPS, ConfigError, RewardConfig, options_page
    from sdpo_plugin.monitoring.loggers import MlflowConfig, SwanlabConfig
    from sdpo_plugin.openrlhf_adapter.launcher import launch
except ModuleNotFoundError as missing:  # the package alone is not a whole installation
    sys.exit(
        f"openrlhf-sdpo: error: {missing.name} is not installed; pip install 'openrlhf-sdpo[gpu]', or on a machine "
        "without CUDA as docs/cpu.md says"
    )

USAGE = """usage: openrlhf-sdpo train [--config RECIPE.yaml] [--algo NAME] [any flag of openrlhf.cli.train_ppo_ray]
       openrlhf-sdpo doctor [--config RECIPE.yaml] [--run]   what will go wrong, on this machine, before it does
       openrlhf-sdpo report RUN [RUN ...] [--out report.html] [--text]   what runs logged, and their samples
       openrlhf-sdpo plugins [--plugins MODULE ...]   which plugins are active, and what they do
       openrlhf-sdpo options                          every option of the algorithms, as a page"""


def main(command: Sequence[str] | None = None) -> None:
    name, *arguments = (sys.argv[1:] if command is None else command) or ["--help"]
    commands = {
        "train": launch.train, "doctor": show_doctor, "report": report, "plugins": show_plugins,
        "options": show_options,
    }  # fmt: skip
    if name not in commands:
        sys.exit(USAGE if name in ("-h", "--help") else f"unknown command {name}\n{USAGE}")
    try:
        commands[name](arguments)
    except Exception as error:
        from sdpo_plugin.openrlhf_adapter import failures

        _end_quietly()
        code, message = failures.told(error)
        print(message, file=sys.stderr, flush=True)
        sys.exit(code)


def _end_quietly() -> None:
    """End Ray, if it runs, so that nothing is printed after the error, and nothing stays behind."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    sys.stdout.flush()


def show_doctor(arguments: list[str]) -> None:
    """Print what this machine, and a recipe on it, will do."""
    from sdpo_plugin.openrlhf_adapter.launcher.doctor import doctor

    doctor(arguments)


def report(arguments: list[str]) -> None:
    """Write the page of runs, or print their samples."""
    try:
        from sdpo_plugin.report.command import main

        main(arguments)
    except ModuleNotFoundError as error:
        raise ConfigError(f"report needs {error.name}: pip install 'openrlhf-sdpo[report]'") from error


def show_plugins(arguments: list[str]) -> None:
    """Print the plugins that were found: what each does, or why it is not active."""
    parser = argparse.ArgumentParser(prog="openrlhf-sdpo plugins")
    parser.add_argument("--plugins", nargs="*", default=[], metavar="MODULE", help="modules besides the installed ones")
    manager, found = plugins.load(parser.parse_args(arguments).plugins)
    for one in found:
        print(one)
        if one.problem is None:
            plugin = manager.get_plugin(one.name)
            for algorithm in getattr(plugin, "openrlhf_algorithms", list)():
                print(f"  --algo {algorithm.name:6} {(algorithm.__doc__ or '').strip().splitlines()[0]}")
            print("  hooks   " + ", ".join(sorted(caller.name for caller in manager.get_hookcallers(plugin) or ())))


def show_options(arguments: list[str]) -> None:
    """Print docs/options.md."""
    offered = plugins.algorithms(plugins.load()[0]).values()
    own = [group for algorithm in offered for group in getattr(algorithm, "options", ())]
    print(options_page([*GROUPS, *dict.fromkeys(own), RewardConfig, MlflowConfig, SwanlabConfig]), end="")


if __name__ == "__main__":
    main()
