"""The command line: help of every command, the order and defaults of options, exit codes, hidden warnings."""

import argparse
import os
import re
import subprocess
import sys
import warnings

import pytest

from sdpo_plugin import __version__, plugins
from sdpo_plugin.openrlhf_adapter import failures
from sdpo_plugin.openrlhf_adapter.launcher import cli, launch, options, quiet

OPTION = re.compile(r"^  (?:-h, )?(--\S+)", re.MULTILINE)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in an interpreter of its own, as a user starts it, in a terminal of 100 columns."""
    command = [sys.executable, "-m", "sdpo_plugin", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != quiet.VARIABLE}
    return subprocess.run(command, capture_output=True, text=True, env={**environment, "COLUMNS": "100"})


@pytest.fixture(scope="module")
def helps() -> dict[str, subprocess.CompletedProcess[str]]:
    return {name: run(*filter(None, [name]), "--help") for name in ("", *cli.COMMANDS)}


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_help_is_on_standard_output_and_has_one_example(helps, name):
    shown = helps[name]
    assert (shown.returncode, shown.stderr) == (0, "")
    command = f"openrlhf-sdpo {name}".rstrip()
    assert shown.stdout.startswith(f"usage: {command} ")
    assert shown.stdout.count("example:\n") == 1 and f"\n  {command} " in shown.stdout.partition("example:")[2]
    assert name == "" or "\nexit codes:\n  0 " in shown.stdout


def test_every_command_is_listed(helps):
    for name, help in cli.COMMANDS.items():
        assert re.search(rf"^    {name} +{help}$", helps[""].stdout, re.MULTILINE)


def test_the_exit_codes_are_in_the_help_of_train(helps):
    shown = helps["train"].stdout.partition("exit codes:\n")[2].splitlines()
    assert [tuple(line.split(None, 1)) for line in shown] == [(str(c), m) for c, m in failures.EXIT_CODES.items()]


def test_the_version():
    shown = run("--version")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, f"openrlhf-sdpo {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments, error",
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["plugins", "--plugin", "x"], "unrecognized arguments: --plugin x"),
        (["report"], "the following arguments are required: [NAME=]RUN"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(capsys, arguments, error):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    shown = capsys.readouterr()
    assert end.value.code == failures.SETTINGS and shown.out == "" and error in shown.err
    assert len(shown.err.splitlines()) <= 3


def test_own_options_come_first_and_have_their_defaults(helps):
    shown = helps["train"].stdout
    assert OPTION.findall(shown)[:3] == ["--algo", "--config", "--plugins"]
    lines = shown.splitlines()
    assert lines.index("  --algo NAME") < 12 and lines.index("--distill.*:") < 45 and len(lines) < 360
    assert shown.index("--distill.*:") < shown.index("--teacher.*:") < shown.index("--reward.*:")
    assert not re.search(r"^ +--\S+ [A-Z_]+\.[A-Z_]+", shown, re.MULTILINE)  # metavars like DISTILL.ALPHA
    parser, _ = options.own_parser()
    for action in parser._actions:
        flag = next(name for name in action.option_strings if name.startswith("--"))
        entry = re.search(rf"^  (?:-h, )?{re.escape(flag)}\b.*\n(?: {{8}}.*\n)+", shown, re.MULTILINE)
        assert entry, flag
        if action.nargs == 0 and not isinstance(action, argparse._HelpAction):
            assert re.search(r"\(default:\s+(true|false)\)", entry[0]), entry[0]
        elif action.default is not None and flag not in ("--plugins", "--help", "--help-all"):
            assert "(default:" in entry[0], entry[0]
    assert "--actor.adam.betas" not in shown


def test_the_defaults_of_an_algorithm_are_in_its_help():
    shown = options.own_help((), "opsd")
    assert re.search(r"--distill.kl_clip FLOAT\|none\n.*\n? *\(?.*default: 0.05\)", shown)
    assert "--rollout.temperature" in shown.partition("--algo opsd changes these defaults of OpenRLHF:")[2]
    assert "--srpo.beta" not in shown and "--srpo.beta" in options.own_help((), "srpo")


def test_all_options_are_in_help_all(helps):
    """Those of `--help`, in its order; then OpenRLHF's."""
    shown = run("train", "--help-all", "--algo", "srpo")
    assert shown.returncode == 0, shown.stderr
    found = OPTION.findall(shown.stdout.partition("exit codes")[0])
    heading = shown.stdout.index("\nOpenRLHF: --actor.*:\n")
    for flag in ("--algo", "--distill.alpha", "--srpo.beta", "--logger.mlflow.uri"):
        assert 0 < shown.stdout.index(f"\n  {flag}") < heading, flag
    for flag in ("--actor.adam.lr", "--vllm.num_engines", "--local_rank", *options.USUAL):
        assert shown.stdout.index(f"\n  {flag}") > heading, flag
    assert len(found) > 200 and len(found) == len(set(found))
    assert re.search(r"--train.colocate_all\n(?: {8}.*\n)*? {8}.*\(default: false\)", shown.stdout)
    assert re.search(r"--ckpt.save_hf\n +\(default: false\)", shown.stdout)
    assert re.search(r"--algo.advantage.estimator .*\n(?: {8}.*\n)*? {8}.*\(default: group_norm\)", shown.stdout)


def test_an_unknown_flag_is_answered_with_the_nearest_one():
    parser = argparse.ArgumentParser()
    parser.add_argument("--distill.alpha")
    with pytest.raises(launch.ConfigError, match=r"^--distil.alpha: unknown flag; did you mean --distill.alpha\?$"):
        launch._parse(parser, ["--distil.alpha", "1"])
    with pytest.raises(launch.ConfigError, match="^x: unknown argument; openrlhf-sdpo train --help-all shows all"):
        launch._parse(parser, ["x"])


def test_help_strings_stand_alone():
    """Each begins with what is set, and neither refers to a flag by a bare "of" nor to a value as "its"."""
    parser, _ = options.own_parser()
    for action in parser._actions:
        text = options.help_of(action)
        assert len(text) > 15, (action.dest, text)
        if not action.dest.startswith(("srpo", "rlsd", "rlcsd", "sdpg", "fsd")):
            assert not re.match(r"(of|its|None|none|as) ", text), (action.dest, text)


def test_the_page_has_every_option_and_where_algorithms_differ():
    page = options.page()
    rows = dict(re.findall(r"^\| `(--\S+?)` \| (.*?) \|", page, re.MULTILINE))
    parser, known = options.own_parser()
    flags = {name for action in parser._actions for name in action.option_strings if name.startswith("--")}
    assert rows.keys() == {flag for flag in flags if not flag.startswith(("--no-", "--help"))}
    assert {"--algo", "--config", "--plugins", "--platform", "--rollout.deterministic",
            "--data.chat_template_kwargs"} <= rows.keys()  # fmt: skip
    assert rows["--distill.alpha"] == "`0.5`; sdft, opsd: `0.0`; sdpg, sdzero, opd: `1.0`"
    for name, algorithm in known.items():
        (row,) = re.findall(rf"^\| `{name}` \| .*$", page, re.MULTILINE)
        for flag, value in algorithm.defaults.items():
            same = f"--{flag}" in rows and rows[f"--{flag}"].startswith(f"`{options.spelled(value)}`")
            assert (f"`--{flag}`" in row) != same, (name, flag)


def test_another_plugin_s_options_are_shown(tmp_path, monkeypatch):
    (tmp_path / "toy_options.py").write_text(
        "from sdpo_plugin import hookimpl\n@hookimpl\ndef openrlhf_add_arguments(parser):\n"
        "    parser.add_argument('--toy.size', type=int, default=3, help='number of toys')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shown = options.own_help(["toy_options"], None)
    assert re.search(r"other plugins:\n+  --toy.size INT\n        number of toys \(default: 3\)", shown)


def test_completions_are_made_of_the_commands_and_own_options():
    """By shtab, from this parser (docs/cli.md)."""
    (commands,) = (a for a in cli.completion()._actions if isinstance(a, argparse._SubParsersAction))
    assert list(commands.choices) == list(cli.COMMANDS)
    assert {"--algo", "--distill.alpha", "--srpo.beta"} <= commands.choices["train"]._option_string_actions.keys()
    assert {"--algo", "--smoke-test"} <= commands.choices["doctor"]._option_string_actions.keys()


def test_an_interrupted_command_has_a_code_of_its_own(monkeypatch, capsys):
    def interrupt(modules=()):
        raise KeyboardInterrupt

    monkeypatch.setattr(plugins, "load", interrupt)
    with pytest.raises(SystemExit) as end:
        cli.main(["plugins"])
    assert end.value.code == cli.INTERRUPTED and capsys.readouterr().err == "openrlhf-sdpo: interrupted\n"


# ── warnings ──


def test_the_pynvml_warning_is_left_out_and_no_other(monkeypatch):
    monkeypatch.setenv(quiet.VARIABLE, "error::ImportWarning")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet.silence()
        warnings.warn(f"{quiet.PYNVML}. Please install nvidia-ml-py instead.", FutureWarning, stacklevel=1)
        warnings.warn("another one", FutureWarning, stacklevel=1)
    assert [str(one.message) for one in shown] == ["another one"]
    filters = os.environ[quiet.VARIABLE]
    assert filters.startswith("error::ImportWarning,ignore:") and quiet.filters() == filters
    code = f"import warnings; warnings.warn('{quiet.PYNVML}.', FutureWarning); warnings.warn('other', FutureWarning)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert "other" in said and quiet.PYNVML not in said.replace(code, "")


def test_workers_leave_both_warnings_out_and_keep_their_hook():
    given = []
    init = quiet.in_workers(lambda **settings: given.append(settings["runtime_env"]))
    init(runtime_env={"env_vars": {"A": "1"}})
    init(runtime_env={"worker_process_setup_hook": "sdpo_plugin.openrlhf_adapter.platform.cpu.enable"})
    init(runtime_env={"worker_process_setup_hook": "mine"})
    init()
    hooks = [environment["worker_process_setup_hook"].rpartition(".")[2] for environment in given]
    assert hooks == ["set_up_worker", "set_up_cpu_worker", "mine", "set_up_worker"]
    assert given[0]["env_vars"] == {"A": "1", quiet.VARIABLE: quiet.filters()}
    from ray._private.tensor_serialization_utils import ZeroCopyTensorsWarning

    with warnings.catch_warnings(record=True) as shown:
        warnings.filterwarnings("once", category=ZeroCopyTensorsWarning)  # as Ray does
        quiet.set_up_worker()
        warnings.warn(f"{quiet.ZERO_COPY}, but", ZeroCopyTensorsWarning, stacklevel=1)
    assert shown == []
