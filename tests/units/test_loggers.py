"""What a logger is given and what not, and what happens without it. With runs: integration/test_loggers.py."""

import argparse
import sys

import pytest

from sdpo_plugin import ConfigError
from sdpo_plugin.monitoring import loggers

NAMES = {"--logger.wandb.key": "secret", "--logger.wandb.run_name": "of OpenRLHF", "--actor.adam.lr": "0.001"}


@pytest.fixture(autouse=True)
def no_run(monkeypatch):
    monkeypatch.setattr(loggers, "_runs", {})


def parsed(*flags):
    from openrlhf.utils.config import hierarchize

    parser = argparse.ArgumentParser()
    for name, default in NAMES.items():
        parser.add_argument(name, default=default)
    loggers.openrlhf_add_arguments(parser)
    return hierarchize(parser.parse_args(flags))


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--logger.mlflow.uri", "sqlite:///x"), r"--logger.mlflow.uri sqlite:///x: mlflow is not installed; "
         r"pip install 'openrlhf-sdpo\[mlflow\]'"),
        (("--logger.swanlab.mode", "offline"), r"--logger.swanlab.mode offline: swanlab is not installed; "
         r"pip install 'openrlhf-sdpo\[swanlab\]'"),
    ],
)  # fmt: skip
def test_a_missing_library_is_named_before_anything_loads(flags, message, monkeypatch):
    for name in ("mlflow", "swanlab"):
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    loggers.openrlhf_configure(parsed())  # nothing was asked for
    with pytest.raises(ConfigError, match=message):
        loggers.openrlhf_configure(parsed(*flags))


def test_keys_and_texts_stay_here():
    args = parsed("--logger.swanlab.key", "secret", "--logger.mlflow.uri", "https://me:secret@h")
    assert loggers.arguments(args)["logger.mlflow.uri"] == "https://me:***@h"
    assert loggers.arguments(args)["actor.adam.lr"] == "0.001" and "secret" not in loggers.arguments(args).values()
    metrics = {"reward": 0.5, "kl": None, "generated_samples": ["text", 1.0]}
    assert loggers.numbers(metrics, "train/") == {"train/reward": 0.5}


def test_a_logger_that_fails_stops_nothing(tmp_path, caplog):
    pytest.importorskip("mlflow", reason="MLflow is not installed (extra mlflow)")
    args = parsed("--logger.mlflow.uri", f"sqlite:///{tmp_path}/mlflow.db")
    states = {}
    loggers.openrlhf_load_controller_state(states, args)
    loggers.openrlhf_save_controller_state(states, args)
    run = states["loggers"]["mlflow"]
    client = loggers._runs["mlflow"].client
    loggers.openrlhf_log({"a b/ö#": 1.0}, 1, False)
    found = client.get_run(run)
    assert (found.info.run_name, found.data.metrics) == ("of OpenRLHF", {"train/a b/ö_": 1.0})
    client.delete_run(run)
    loggers.openrlhf_log({"reward": 1.0}, 2, False)
    assert "--logger.mlflow: this is not logged: " in caplog.text
    loggers.openrlhf_train_end(None)

    with pytest.raises(ConfigError, match="--logger.mlflow: the run cannot be logged"):
        loggers.openrlhf_load_controller_state({"loggers": {"mlflow": "no such run"}}, args)
