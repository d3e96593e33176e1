"""MLflow and SwanLab beside W&B and TensorBoard (`--logger.mlflow.*`, `--logger.swanlab.*`), with or without `--algo`.

They get the numbers that OpenRLHF gives its own loggers, under the same names, and the arguments, without what is
secret in them. A run that is continued from a checkpoint continues theirs.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from sdpo_plugin.config import ConfigError, OptionGroup, StopTraining, flat, from_namespace, option
from sdpo_plugin.flags import add_group
from sdpo_plugin.hookspecs import hookimpl
from sdpo_plugin.monitoring.masking import is_secret, masked

STATE = "loggers"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MlflowConfig(OptionGroup):
    """Log to MLflow (`pip install 'openrlhf-sdpo[mlflow]'`); for every run, with or without `--algo`."""

    prefix = "logger.mlflow"

    uri: str | None = option(None, "MLflow tracking server (https://...) or store (sqlite:///...); none: no MLflow")
    experiment: str = option("openrlhf_train_ppo", "MLflow experiment name; created if it does not exist")
    run_name: str | None = option(None, "MLflow run name; none: --logger.wandb.run_name")


@dataclass(frozen=True)
class SwanlabConfig(OptionGroup):
    """Log to SwanLab (`pip install 'openrlhf-sdpo[swanlab]'`); for every run, with or without `--algo`."""

    prefix = "logger.swanlab"

    mode: str | None = option(
        None, "SwanLab logging: online: to the cloud or your server; offline: to files, for `swanlab sync`; none: off",
        ("online", "offline"),
    )
    key: str | None = option(None, "SwanLab API key; none: that of `swanlab login`, or SWANLAB_API_KEY")
    workspace: str | None = option(None, "SwanLab workspace; none: your own")
    project: str = option("openrlhf_train_ppo", "SwanLab project name")
    run_name: str | None = option(None, "SwanLab run name; none: --logger.wandb.run_name")
    dir: str = option("swanlog", "directory for SwanLab's files")


class Tracker(Protocol):
    """A run at a logger's."""

    @property
    def id(self) -> str | None:
        """Under which it can be continued, if it can."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Numbers of global step `step`, by name."""

    def end(self, error: BaseException | None) -> None:
        """Close the run, as failed where there was an error."""


class Mlflow:
    """A run at MLflow's, through its client: nothing global, so a reward function may use MLflow itself."""

    BATCH = 100  # parameters in one request, MLflow's limit
    LONGEST = 6000  # characters of a parameter, for the same reason

    def __init__(self, args: Any, run: str | None) -> None:
        """`run`: the id of the run to continue, or None. Its parameters stay those it began with."""
        from mlflow.entities import Param, RunStatus
        from mlflow.tracking import MlflowClient

        config: MlflowConfig = from_namespace(MlflowConfig, args)
        self.client = MlflowClient(config.uri)
        if run is not None:
            self.id = run
            self.client.update_run(run, status=RunStatus.to_string(RunStatus.RUNNING))
            return
        known = self.client.get_experiment_by_name(config.experiment)
        experiment = known.experiment_id if known else self.client.create_experiment(config.experiment)
        self.id = self.client.create_run(experiment, run_name=run_name(config.run_name, args)).info.run_id
        params = [Param(name, str(value)[: self.LONGEST]) for name, value in arguments(args).items()]
        for start in range(0, len(params), self.BATCH):
            self.client.log_batch(self.id, params=params[start : start + self.BATCH])

    def log(self, metrics: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        found = [Metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, step) for name, value in metrics.items()]
        self.client.log_batch(self.id, metrics=found)

    def end(self, error: BaseException | None) -> None:
        self.client.set_terminated(self.id, "FAILED" if error else "FINISHED")


class Swanlab:
    """A run at SwanLab's. Only one that is online can be continued."""

    def __init__(self, args: Any, run: str | None) -> None:
        import swanlab

        config: SwanlabConfig = from_namespace(SwanlabConfig, args)
        if config.key is not None and config.mode == "online":
            swanlab.login(api_key=config.key)
        found = swanlab.init(
            mode=config.mode, workspace=config.workspace, project=config.project, log_dir=config.dir,
            name=run_name(config.run_name, args), config=arguments(args), id=run, resume="allow" if run else None,
        )  # fmt: skip
        self.id = found.id if config.mode == "online" else None

    def log(self, metrics: dict[str, float], step: int) -> None:
        import swanlab

        swanlab.log(metrics, step=step)

    def end(self, error: BaseException | None) -> None:
        import swanlab

        swanlab.finish(state="crashed" if error else "success", error=masked(str(error)) if error else None)


def run_name(given: str | None, args: Any) -> str:
    return given or args.logger.wandb.run_name


def arguments(args: Any) -> dict[str, Any]:
    """OpenRLHF's and all plugins', by dotted name, without keys; what is secret in others is masked."""
    return masked({name: value for name, value in flat(args).items() if not is_secret(name)})


def numbers(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    """What of OpenRLHF's metrics is a number, `prefix` before its name."""
    found = {}
    for name, value in metrics.items():
        try:
            found[prefix + name] = float(value)
        except (TypeError, ValueError):  # generated_samples, None
            continue
    return found


def requested(args: Any) -> dict[str, Callable[[Any, str | None], Tracker]]:
    """The loggers that the arguments request, by the library's name."""
    found: dict[str, Callable[[Any, str | None], Tracker]] = {}
    if args.logger.mlflow.uri:
        found["mlflow"] = Mlflow
    if args.logger.swanlab.mode:
        found["swanlab"] = Swanlab
    return found


_runs: dict[str, Tracker] = {}  # of the controller


@hookimpl
def openrlhf_add_arguments(parser: argparse.ArgumentParser) -> None:
    for group in (MlflowConfig, SwanlabConfig):
        add_group(parser, group)


@hookimpl
def openrlhf_configure(args: Any) -> None:
    for group in (MlflowConfig, SwanlabConfig):
        from_namespace(group, args)
    args.logger.swanlab.dir = os.path.abspath(args.logger.swanlab.dir)
    flags = {"mlflow": f"--logger.mlflow.uri {args.logger.mlflow.uri}",
             "swanlab": f"--logger.swanlab.mode {args.logger.swanlab.mode}"}  # fmt: skip
    for name in requested(args):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{flags[name]}: {name} is not installed; pip install 'openrlhf-sdpo[{name}]'")


@hookimpl
def openrlhf_load_controller_state(states: dict[str, Any], args: Any) -> None:
    """Called once in every run, on the controller."""
    before = states.get(STATE, {})
    for name, start in requested(args).items():
        try:
            _runs[name] = start(args, before.get(name))
        except Exception as error:
            said = masked(f"{type(error).__name__}: {error}")
            raise ConfigError(f"--logger.{name}: the run cannot be logged ({said})") from error


@hookimpl
def openrlhf_save_controller_state(states: dict[str, Any], args: Any) -> None:
    states[STATE] = {name: run.id for name, run in _runs.items()}


@hookimpl(trylast=True)
def openrlhf_log(metrics: dict[str, Any], step: int, evaluation: bool) -> None:
    found = numbers(metrics, "eval/" if evaluation else "train/")
    for name, run in _runs.items():
        _unharmed(name, run.log, found, step)


@hookimpl
def openrlhf_train_end(error: BaseException | None) -> None:
    failed = None if isinstance(error, StopTraining) else error
    for name, run in _runs.items():
        _unharmed(name, run.end, failed)
    _runs.clear()


def _unharmed(name: str, call: Callable[..., None], *args: Any) -> None:
    """Training continues where a logger fails."""
    try:
        call(*args)
    except Exception as error:
        logger.warning(masked(f"--logger.{name}: this is not logged: {type(error).__name__}: {error}"))
