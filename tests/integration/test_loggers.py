"""What OpenRLHF logs reaches MLflow and SwanLab, without `--algo` too; a continued run goes on, a failed one failed."""

import pytest
from common import ROWS, SDPO

from sdpo_plugin.testing import RunFailed

KEY = "0123456789abcdef0123456789abcdef01234567"
FAILS = """
from sdpo_plugin import hookimpl
@hookimpl
def openrlhf_optimizer_step(worker):
    raise RuntimeError("out of steps")
"""


@pytest.fixture
def fails(tmp_path, monkeypatch):
    (tmp_path / "fails.py").write_text(FAILS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return ("--plugins", "fails")


@pytest.fixture
def store(tmp_path):
    """The client of a new store, and the flags that log to it."""
    pytest.importorskip("mlflow", reason="MLflow is not installed (extra mlflow)")
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    return MlflowClient(uri), ("--logger.mlflow.uri", uri, "--logger.mlflow.run_name", "mine")


def history(client, run, name):
    return [[metric.step, metric.value] for metric in client.get_metric_history(run.info.run_id, name)]


def runs(client):
    return client.search_runs([client.get_experiment_by_name("openrlhf_train_ppo").experiment_id])


def test_mlflow_has_what_tensorboard_has_and_goes_on_after_a_restart(
    openrlhf, model, reward, store, tmp_path, monkeypatch
):
    client, flags = store
    for name, value in {"MODE": "offline", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    flags += ("--logger.wandb.key", KEY, "--logger.swanlab.key", "sesame")
    rows = tmp_path / "held_out.jsonl"
    rows.write_text('{"prompt": [{"role": "user", "content": "ask 1"}], "label": "1"}\n')
    flags += ("--ckpt.save_steps", "1", "--ckpt.path", f"{tmp_path}/ckpt")
    flags += ("--eval.dataset", str(rows), "--eval.steps", "1")
    first = openrlhf(model, ROWS, reward, *flags)
    (run,) = runs(client)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "mine")
    assert float(run.data.params["actor.adam.lr"]) == 1e-3 and run.data.params["algo.name"] == "None"
    assert not any(name.endswith(".key") for name in run.data.params)
    assert "key='***'" in first.output and KEY not in first.output and "sesame" not in first.output
    of_wandb = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file())
    assert b"key='***'" in of_wandb and KEY.encode() not in of_wandb and b"sesame" not in of_wandb
    logged = {name: values for name, values in first.metrics.items() if name.startswith(("train/", "eval/"))}
    assert "eval/eval_num_samples" in logged and "train/timing/generation" in logged
    for name, values in logged.items():
        assert history(client, run, name) == [[step, pytest.approx(value)] for step, value in values]

    openrlhf(model, ROWS, reward, *flags, "--ckpt.load_enable", "--train.num_episodes", "2")
    (run,) = runs(client)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in history(client, run, "train/policy_loss")] == [1, 2]


@pytest.mark.check
def test_a_failed_run_is_a_failed_run_at_mlflow_s(openrlhf, model, reward, recorded, store, fails):
    client, flags = store
    with pytest.raises(RunFailed, match="out of steps"):
        openrlhf(model, ROWS, reward, *SDPO, *flags, *fails, replay=recorded)
    (run,) = runs(client)
    assert run.info.status == "FAILED"


def test_swanlab_has_the_metrics(openrlhf, model, reward, recorded, tmp_path):
    pytest.importorskip("swanlab", reason="SwanLab is not installed (extra swanlab)")
    flags = ("--logger.swanlab.mode", "offline", "--logger.swanlab.dir", f"{tmp_path}/swanlog")
    openrlhf(model, ROWS, reward, *SDPO, *flags, replay=recorded)
    (directory,) = (tmp_path / "swanlog").glob("run-*")
    (values,) = directory.glob("*.swanlab")
    written = values.read_bytes()
    for name in ("train/policy_loss", "train/self_distillation/loss", "train/timing/step_total"):
        assert name.encode() in written
    config = (directory / "files" / "config.yaml").read_text()
    assert "actor.adam.lr" in config and "logger.swanlab.key" not in config
