"""This package's options of `openrlhf-sdpo train`: their flags, their help, and docs/options.md.

OpenRLHF's parser is extended by them in `launch.py`. For `--help` and the page they are in a parser of their own, so
that neither imports OpenRLHF.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pluggy

from sdpo_plugin import plugins
from sdpo_plugin.config import DiagnosticsConfig, DistillConfig, RepromptConfig, RewardConfig, TeacherConfig
from sdpo_plugin.flags import add_group
from sdpo_plugin.openrlhf_adapter.engine import deterministic
from sdpo_plugin.openrlhf_adapter.failures import EXIT_CODES
from sdpo_plugin.openrlhf_adapter.platform.cluster import PLATFORMS, VARIABLE

PROG = "openrlhf-sdpo train"
USAGE = f"{PROG} [--config RECIPE.yaml ...] [--algo NAME] [OPTION ...]"
DESCRIPTION = """\
Train with OpenRLHF. With --algo, the policy is trained by self-distillation; without it, the run is OpenRLHF's own.
An option of the command line overrides the recipe, which overrides the algorithm's defaults."""
EXAMPLE = "openrlhf-sdpo train --config recipes/quickstart/sdpo.yaml --actor.adam.lr 5e-4"
RUN = "run"
# Of the option groups, in the order of help and page. Those of algorithms, of loggers and of other plugins follow.
FIRST = [RUN, *(f"--{g.prefix}" for g in (DistillConfig, TeacherConfig, RepromptConfig, DiagnosticsConfig))]
# OpenRLHF's options without which hardly a run is started: what `--help` names of them.
USUAL = {
    "--actor.model_name_or_path": "the policy: a Hugging Face model name or directory",
    "--data.prompt_dataset": "training data: a file, a directory, or a dataset's name on the Hugging Face Hub",
    "--data.input_key": "the column with the prompt",
    "--data.label_key": "the column with the label that the reward function is given",
    "--data.apply_chat_template": "prompts are chats, or text that becomes the user's turn",
    "--data.max_len": "longest prompt and response together, in tokens",
    "--reward.remote_url": "reward function (a .py file) or reward server (http://...)",
    "--rollout.batch_size": "prompts of a rollout batch",
    "--rollout.n_samples_per_prompt": "responses for each prompt",
    "--train.batch_size": "responses of an optimizer step",
    "--train.micro_batch_size": "responses of a forward and backward pass on one GPU",
    "--actor.adam.lr": "learning rate",
    "--algo.advantage.estimator": "how advantages are computed",
    "--actor.num_gpus_per_node": "GPUs of the policy",
    "--vllm.num_engines": "vLLM engines",
    "--train.colocate_all": "policy and vLLM engines share their GPUs",
    "--ckpt.output_dir": "where the trained model is saved",
    "--ckpt.path": "where checkpoints are saved",
    "--logger.tensorboard_dir": "where TensorBoard files are written",
}


def add_run_options(parser: argparse.ArgumentParser, algorithms: Iterable[str]) -> None:
    """Which algorithm, recipe, plugins and machine: the options that belong to no option group."""
    group = parser.add_argument_group(RUN)
    group.add_argument(
        "--algo", dest="algo.name", metavar="NAME",
        help=f"self-distillation algorithm, one of {', '.join(algorithms)}; without it OpenRLHF trains alone",
    )  # fmt: skip
    group.add_argument(
        "--config", metavar="RECIPE.yaml", action="append", help="recipe: a YAML file whose nested keys are flag names "
        "(actor: {adam: {lr: 1e-5}}); may be given several times, and a later recipe overrides an earlier one",
    )  # fmt: skip
    group.add_argument(
        "--plugins", nargs="*", default=[], metavar="MODULE",
        help="Python modules with hooks, in addition to the installed plugins",
    )  # fmt: skip
    group.add_argument(
        "--platform", choices=PLATFORMS, help="where the workers run; auto: on the CPU if neither this machine nor the "
        f"Ray cluster that the run joins has a GPU. Without the flag: the environment variable {VARIABLE}, else auto",
    )  # fmt: skip
    deterministic.add_argument(group)
    group.add_argument(
        "--data.chat_template_kwargs", default="{}", metavar="JSON",
        help="arguments of the chat template, as a JSON object such as '{\"enable_thinking\": false}'; they apply to "
        "student and teacher, in training and evaluation",
    )
    if "--help" not in parser._option_string_actions:
        group.add_argument("-h", "--help", action="help", help="show this help and exit")
    group.add_argument("--help-all", action="help", help="show these options and all of OpenRLHF's, and exit")


def help_asked(arguments: Collection[str]) -> str | None:
    """`--help` or `--help-all`, if one of them is among the arguments."""
    if "--help-all" in arguments:
        return "--help-all"
    return "--help" if not {"-h", "--help"}.isdisjoint(arguments) else None


def own_parser(
    modules: Sequence[str] = (), algorithm: str | None = None
) -> tuple[argparse.ArgumentParser, dict[str, type[Any]]]:
    """A parser of this package's and all plugins' options, without OpenRLHF's, and the algorithms by name.

    Args:
        modules: of `--plugins`. algorithm: whose own options there are; None: those of all algorithms.
    """
    parser = argparse.ArgumentParser(PROG, add_help=False, allow_abbrev=False, formatter_class=Formatter)
    manager, _ = plugins.load(modules)
    known = plugins.algorithms(manager)
    chosen = known.values() if algorithm is None else [plugins.algorithm_class(manager, algorithm)]
    add_options(parser, manager, known, chosen)
    return parser, known


def add_options(
    parser: argparse.ArgumentParser, manager: pluggy.PluginManager, known: Iterable[str], chosen: Iterable[type[Any]]
) -> None:
    """Add the flags of the package and its plugins, and the own ones of the `chosen` algorithms."""
    add_run_options(parser, known)
    manager.hook.openrlhf_add_arguments(parser=parser)
    for group in dict.fromkeys(group for algorithm in chosen for group in getattr(algorithm, "options", ())):
        add_group(parser, group)
    add_group(parser, RewardConfig)


# ── help ──


def spelled(value: Any) -> str:
    """A default as a recipe may have it: true, none, 0.5, [0.0, 2.0]."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(list(value) if isinstance(value, tuple) else value).replace("\n", "\\n") or "''"


def default_of(action: argparse.Action) -> str | None:
    """A flag's default; None where it has none, or is the flag that turns another one off."""
    if isinstance(action, argparse._StoreFalseAction):
        return None
    takes_none = getattr(action.type, "__name__", "").endswith("or none")
    if action.default in (argparse.SUPPRESS, []) or (action.default is None and not takes_none):
        return None
    return spelled(action.default)


def help_of(action: argparse.Action) -> str:
    """A flag's help. Python before 3.13 appends the default to a boolean's, spelled as Python spells it."""
    return (action.help or "").removesuffix(" (default: %(default)s)")


def kind_of(action: argparse.Action) -> str:
    """What a flag's value is: FLOAT, INT|none, ..."""
    first, *rest = getattr(action.type, "__name__", "str").split(" or ")
    return "|".join([{"str": "TEXT"}.get(first, first.upper()), *rest])


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Every option with the kind of its value and its default, and its help on the next line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return kind_of(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        default = default_of(action)
        if default is None or "(default: " in help_of(action):
            return help_of(action)
        return f"{help_of(action)} (default: {default.replace('%', '%%')})".strip()


@dataclass(frozen=True)
class Section:
    """Options under one heading."""

    title: str
    description: str
    actions: list[argparse.Action]


def sections(parser: argparse.ArgumentParser, theirs: Collection[argparse.Action] = ()) -> list[Section]:
    """The option groups of `parser` without the actions that are OpenRLHF's, in the order of help and page."""
    found = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action not in theirs]
        if actions and group.title in ("options", "optional arguments"):  # argparse's, for flags without a group
            found.append(Section("other plugins", "", actions))
        elif actions:
            found.append(Section(group.title or "", group.description or "", actions))
    return sorted(found, key=_place)


def _place(section: Section) -> int:
    last = [f"--{RewardConfig.prefix}", "--logger.mlflow", "--logger.swanlab", "other plugins"]
    if section.title in FIRST:
        return FIRST.index(section.title)
    return len(FIRST) + (1 + last.index(section.title) if section.title in last else 0)


def openrlhf_sections(actions: Iterable[argparse.Action]) -> list[Section]:
    """OpenRLHF's options by the first part of their names."""
    found: dict[str, list[argparse.Action]] = {}
    for action in actions:
        if not isinstance(action, argparse._HelpAction):
            if not action.help and default_of(action) is not None:
                action.help = f"(default: {default_of(action)})".replace("%", "%%")
            found.setdefault(action.dest.split(".")[0] if "." in action.dest else "", []).append(action)
    titles = sorted(found, key=lambda name: (not name, name))
    return [Section(f"OpenRLHF: --{name}" if name else "OpenRLHF: others", "", found[name]) for name in titles]


def help_text(parser: argparse.ArgumentParser, shown: Iterable[Section], epilog: str) -> str:
    """The help of `train` with these sections."""
    formatter = Formatter(PROG)
    formatter.add_usage(USAGE, [], [])
    formatter.add_text(DESCRIPTION)
    formatter.add_text(f"example:\n  {EXAMPLE}")
    for section in shown:
        if section.actions:
            formatter.start_section(f"{section.title}.*" if "--" in section.title else section.title)
            formatter.add_text(section.description.replace("`", "") or None)
            formatter.add_arguments(section.actions)
            formatter.end_section()
    formatter.add_text(epilog)
    return formatter.format_help()


def exit_codes(codes: Mapping[int, str] = EXIT_CODES) -> str:
    """The exit codes, as the end of a command's help."""
    return "\n".join(["exit codes:", *(f"  {code:<3}  {meaning}" for code, meaning in codes.items())])


def own_help(modules: Sequence[str], algorithm: str | None) -> str:
    """`train --help`: the options of package and plugins, with the defaults of the algorithm if one is given."""
    parser, known = own_parser(modules, algorithm)
    parts = []
    if algorithm is None:
        names = {name: summary(one) for name, one in known.items()}
        parts.append("\n".join(["algorithms (--algo NAME --help shows the defaults of one):", *_columns(names)]))
    else:
        defaults = defaults_of(known[algorithm])
        parser.set_defaults(**defaults)
        own = {action.dest for action in parser._actions}
        theirs = {f"--{name}": spelled(value) for name, value in defaults.items() if name not in own}
        if theirs:
            parts.append("\n".join([f"--algo {algorithm} changes these defaults of OpenRLHF:", *_columns(theirs)]))
    parts.append("\n".join(["OpenRLHF's options that most runs set (--help-all has all of them):", *_columns(USUAL)]))
    return help_text(parser, sections(parser), "\n\n".join([*parts, exit_codes()]))


def _columns(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:{width}}  {text}".rstrip() for name, text in rows.items()]


def whole_help(parser: argparse.ArgumentParser, theirs: Collection[argparse.Action]) -> str:
    """`train --help-all`: of OpenRLHF's extended parser, the options of package and plugins, then OpenRLHF's."""
    shown = [*sections(parser, theirs), *openrlhf_sections(theirs)]
    return help_text(parser, shown, exit_codes())


# ── docs/options.md ──


def summary(algorithm: type[Any]) -> str:
    """The first line of an algorithm's docstring."""
    return (algorithm.__doc__ or "").strip().partition("\n")[0]


def defaults_of(algorithm: type[Any]) -> dict[str, Any]:
    """What an algorithm sets by dotted name, in a run with a reward function."""
    fixed = dict(algorithm.defaults)
    args = SimpleNamespace(
        **{group.prefix: SimpleNamespace(**vars(group())) for group in (DistillConfig, TeacherConfig, RepromptConfig)},
        reward=SimpleNamespace(remote_url="reward.py", model_name_or_path=None),
        train=SimpleNamespace(agent_func_path=None, async_enable=False),
    )
    for name, value in fixed.items():
        group, _, field = name.partition(".")
        if hasattr(args, group):
            setattr(getattr(args, group), field, value)
    try:
        return fixed | algorithm.defaults_for(args)
    except AttributeError:  # they depend on more than this
        return fixed


def page() -> str:
    """docs/options.md: every option of the package and the installed plugins."""
    parser, known = own_parser()
    differing: dict[str, dict[str, str]] = {}  # by flag's name, then by algorithm
    for algorithm in known.values():
        for name, value in defaults_of(algorithm).items():
            differing.setdefault(name, {})[algorithm.name] = spelled(value)
    lines = [
        "# Options", "", "Generated by `openrlhf-sdpo options > docs/options.md`. `openrlhf-sdpo train --help` shows "
        "the same options, `--help-all` also OpenRLHF's.", "",
        "A value on the command line overrides the recipe, which overrides the algorithm's default, which overrides "
        "the default below. A boolean of an option group takes no value on the command line: `--distill.add_tail` "
        "turns it on, `--no-distill.add_tail` off. In a recipe it is `true` or `false`.", "",
    ]  # fmt: skip
    own = {action.dest: action for action in parser._actions}
    for section in sections(parser):
        lines += [f"## {section.title if section.title != RUN else 'The run'}", ""]
        lines += [section.description, ""] if section.description else []
        lines += ["| flag | default | |", "| --- | --- | --- |"]
        lines += [
            _row(action, differing.get(action.dest, {})) for action in section.actions
            if not isinstance(action, argparse._HelpAction)
        ]  # fmt: skip
        lines.append("")
    lines += [
        "## Defaults by algorithm", "", "What `--algo` sets where it is not the default above or OpenRLHF's own. Long "
        "texts are in the tables above.", "", "| algorithm | | defaults |", "| --- | --- | --- |",
    ]  # fmt: skip
    for algorithm in known.values():
        changed = {
            name: shown for name, found in differing.items() if (shown := found.get(algorithm.name)) is not None
            and not (name in own and shown == default_of(own[name]))
        }  # fmt: skip
        cells = [f"`--{name}`" + (f" `{value}`" if len(value) < 40 else "") for name, value in changed.items()]
        lines.append(f"| `{algorithm.name}` | {_cell(summary(algorithm))} | {', '.join(cells)} |")
    return "\n".join([*lines, ""])


def _row(action: argparse.Action, differing: dict[str, str]) -> str:
    flag = next(option for option in action.option_strings if option.startswith("--"))
    default = default_of(action)
    shown = "-" if default is None else f"`{default}`"
    values: dict[str, list[str]] = {}
    for algorithm, value in differing.items():
        if value != default:
            values.setdefault(value, []).append(algorithm)
    shown += "".join(f"; {', '.join(names)}: `{value}`" for value, names in values.items())
    choices = f"; one of {', '.join(map(str, action.choices))}" if action.choices else ""
    return f"| `{flag}` | {_cell(shown)} | {_cell(help_of(action).replace('%%', '%') + choices)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") if "`" not in text else text.replace("|", "\\|")

