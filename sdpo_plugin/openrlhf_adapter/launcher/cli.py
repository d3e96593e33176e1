"""The command `openrlhf-sdpo`.

All of it is argparse: `train` extends OpenRLHF's parser, which is argparse's, and with one library all commands have
the same form of help and errors.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from sdpo_plugin import __version__
from sdpo_plugin.openrlhf_adapter.launcher import quiet

PROG = "openrlhf-sdpo"
COMMANDS = {
    "train": "train with OpenRLHF and a self-distillation algorithm",
    "doctor": "check this machine, and a run before it starts",
    "report": "write an HTML report of runs, or print their samples",
    "plugins": "list the plugins with their algorithms and hooks",
    "options": "print the options of train as a Markdown page",
}
INTERRUPTED = 130


def main(command: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if command is None else command)
    if not arguments or arguments[0] not in COMMANDS:
        parser().parse_args(arguments)  # --help, --version or an error: each of them exits
    name, *rest = arguments
    quiet.silence()
    commands = {
        "train": train, "doctor": show_doctor, "report": report, "plugins": show_plugins, "options": show_options,
    }  # fmt: skip
    try:
        importlib.import_module("sdpo_plugin.openrlhf_adapter.launcher.launch")
    except ModuleNotFoundError as missing:  # the package alone is not a whole installation
        sys.exit(
            f"{PROG}: error: {missing.name} is not installed; pip install 'openrlhf-sdpo[gpu]', or on a machine "
            "without CUDA follow docs/install.md"
        )
    try:
        commands[name](rest)
    except KeyboardInterrupt:
        _end_quietly()
        print(f"{PROG}: interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        from sdpo_plugin.openrlhf_adapter import failures

        _end_quietly()
        code, message = failures.format_error(error)
        print(message, file=sys.stderr, flush=True)
        sys.exit(code)


def parser() -> argparse.ArgumentParser:
    """The parser of the command itself; each subcommand has one of its own."""
    found = argparse.ArgumentParser(
        PROG, f"{PROG} COMMAND [OPTION ...]", "Self-distillation (SDPO, SDFT, OPSD, ...) for OpenRLHF.",
        f"example:\n  {PROG} train --config recipes/quickstart/sdpo.yaml\n\n"
        f"{PROG} COMMAND --help shows the options of a command, an example and its exit codes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    found.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = found.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, help in COMMANDS.items():
        commands.add_parser(name, help=help, add_help=False)
    return found


def subparser(name: str, example: str, **codes: str) -> argparse.ArgumentParser:
    """The parser of a subcommand, whose help ends with an example and its exit codes.

    codes: what a code means where it is not what it means for `train` (`_2="a check failed"`).
    """
    from sdpo_plugin.openrlhf_adapter.failures import EXIT_CODES, SETTINGS, SOFTWARE
    from sdpo_plugin.openrlhf_adapter.launcher import options

    description = f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}."
    meanings = {code: codes.get(f"_{code}", EXIT_CODES[code]) for code in (0, SOFTWARE, SETTINGS, INTERRUPTED)}
    epilog = f"example:\n  {PROG} {name} {example}\n\n{options.exit_codes(meanings)}"
    return argparse.ArgumentParser(
        f"{PROG} {name}", None, description, epilog, formatter_class=options.Formatter, allow_abbrev=False
    )


def completion() -> argparse.ArgumentParser:
    """The parser of the command with the options of `train` and `doctor`, from which shtab makes shell completions."""
    from sdpo_plugin.openrlhf_adapter.launcher import doctor, options

    found = parser()
    (commands,) = (action for action in found._actions if isinstance(action, argparse._SubParsersAction))
    own, _ = options.own_parser()
    for name in ("train", "doctor"):
        for action in own._actions:
            commands.choices[name]._add_action(action)
    doctor.add_arguments(commands.choices["doctor"])
    return found


def _end_quietly() -> None:
    """End Ray, if it runs, so that nothing is printed after the error and no process is left."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    sys.stdout.flush()


def train(arguments: list[str]) -> None:
    """Train, or print the help of `train`."""
    from sdpo_plugin.openrlhf_adapter.launcher import launch

    launch.train(arguments)


def show_doctor(arguments: list[str]) -> None:
    """Print what was found on this machine, and for a run on it."""
    from sdpo_plugin.openrlhf_adapter.launcher import doctor

    own = subparser("doctor", "--config recipes/quickstart/sdpo.yaml", _0="no check failed", _2="a check failed")
    doctor.add_arguments(own)
    parsed, recipe = own.parse_known_args(arguments)
    doctor.doctor(parsed, recipe)


def report(arguments: list[str]) -> None:
    """Write the page of runs, or print their samples."""
    from sdpo_plugin.config import ConfigError

    try:
        from sdpo_plugin.report import command

        own = subparser("report", "runs/quickstart/sdpo runs/quickstart/grpo --out report.html")
        command.main(arguments, own)
    except ModuleNotFoundError as error:
        raise ConfigError(f"report needs {error.name}: pip install 'openrlhf-sdpo[report]'") from error


def show_plugins(arguments: list[str]) -> None:
    """Print the plugins that were found: algorithms and hooks of each, or why it is not active."""
    from sdpo_plugin import plugins

    own = subparser("plugins", "--plugins my_plugin")
    own.add_argument(
        "--plugins", nargs="*", default=[], metavar="MODULE",
        help="Python modules with hooks, in addition to the installed plugins",
    )  # fmt: skip
    manager, found = plugins.load(own.parse_args(arguments).plugins)
    for one in found:
        print(one)
        if one.problem is None:
            plugin = manager.get_plugin(one.name)
            for algorithm in getattr(plugin, "openrlhf_algorithms", list)():
                print(f"  --algo {algorithm.name:6} {(algorithm.__doc__ or '').strip().splitlines()[0]}")
            print("  hooks   " + ", ".join(sorted(caller.name for caller in manager.get_hookcallers(plugin) or ())))


def show_options(arguments: list[str]) -> None:
    """Print docs/options.md."""
    from sdpo_plugin.openrlhf_adapter.launcher import options

    subparser("options", "> docs/options.md").parse_args(arguments)
    print(options.page(), end="")
