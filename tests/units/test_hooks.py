"""docs/hooks.md: every hook is there, its package is one, and what is active is told."""

import os
import re
import subprocess
import sys

import pytest
from documented import PAGE, install_toy, modules

import sdpo_plugin
from sdpo_plugin import hookspecs, plugins

HOOKS = {name for name in vars(hookspecs) if name.startswith("openrlhf_")}


def run(*command, path, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(path), **environment}
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=env, cwd="/")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return install_toy(tmp_path_factory.mktemp("package"))


def test_every_hook_has_its_place_on_the_page():
    assert {name for name in HOOKS if f"`{name}(" in PAGE} == HOOKS
    found = modules()
    assert HOOKS - set(re.findall(r"def (openrlhf_\w+)", found["curriculum"])) == {"openrlhf_algorithms"}
    assert "def openrlhf_algorithms" in found["early"]


def test_what_is_active_is_reported_as_the_page_says(tmp_path):
    (tmp_path / "toy.py").write_text(modules()["toy"])
    shown = run("sdpo_plugin", "plugins", "--plugins", "toy", path=tmp_path).stdout
    expected = re.search(r"--plugins toy\n(.*?)```", PAGE, re.DOTALL)[1]
    assert shown == expected


@pytest.mark.check
def test_the_page_s_package_is_found_and_can_be_left_out(installed):
    command = ("sdpo_plugin", "plugins")
    assert "toy (openrlhf-toy 1.0)\n  hooks   openrlhf_add_arguments" in run(*command, path=installed).stdout
    narrowed = run(*command, path=installed, OPENRLHF_PLUGINS="sdpo").stdout
    assert "toy (openrlhf-toy 1.0), not active: excluded by OPENRLHF_PLUGINS=sdpo" in narrowed


@pytest.mark.check
def test_an_installed_plugin_acts_in_openrlhf_s_plain_command(installed, tmp_path):
    """Without `--algo`: the start-up file finds it. Its own check ends the command, seconds before Ray would start."""
    check = "@hookimpl\ndef openrlhf_configure(args):\n    raise sdpo_plugin.ConfigError('no toys')"
    (tmp_path / "toy.py").write_text(modules()["toy"] + "import sdpo_plugin\n" + check)
    path = f"{tmp_path}{os.pathsep}{installed}"
    plain = ("openrlhf.cli.train_ppo_ray", "--actor.model_name_or_path", "x")
    assert run(*plain, path=path).stderr.rstrip().endswith("openrlhf-sdpo: error: no toys")
    without = run(*plain, path=path, OPENRLHF_PLUGINS="sdpo")  # OpenRLHF's own command, which this CPU cannot run
    assert without.returncode != 0 and "openrlhf-sdpo" not in without.stdout + without.stderr


def test_a_plugin_that_cannot_be_loaded_is_named_and_left_out(installed, tmp_path, monkeypatch, caplog):
    (tmp_path / "toy.py").write_text("raise RuntimeError('out of toys')")
    for path in (str(installed), str(tmp_path)):
        monkeypatch.syspath_prepend(path)
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    manager, found = plugins.load()
    toy = "RuntimeError: out of toys"
    assert {one.name: one.problem for one in found} == {"loggers": None, "sdpo": None, "toy": toy}
    assert "plugin toy (toy) is left out, it cannot be loaded: RuntimeError: out of toys" in caplog.text
    assert "sdpo" in plugins.algorithms(manager)


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("openrlhf_polcy_loss(micro_batch)", "--plugins misspelt: unknown hook 'openrlhf_polcy_loss'"),
        ("openrlhf_rollout_batch(batch, rollouts)", r"--plugins misspelt: .*openrlhf_rollout_batch(.|\n)*rollouts"),
    ],
)
def test_a_hook_or_an_argument_that_does_not_exist_is_named(tmp_path, monkeypatch, signature, message):
    source = f"from sdpo_plugin import hookimpl\n@hookimpl\ndef {signature}:\n    pass\n"
    (tmp_path / "misspelt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "misspelt", raising=False)  # the other case's
    with pytest.raises(sdpo_plugin.ConfigError, match=message):
        plugins.load(["misspelt"])


def test_what_a_plugin_author_needs_is_importable_from_the_top():
    for name in sdpo_plugin.__all__:
        assert getattr(sdpo_plugin, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        sdpo_plugin.no_such_name  # noqa: B018
