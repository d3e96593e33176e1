"""`openrlhf-sdpo doctor` on this machine and on broken ones; the memory table's arithmetic."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from common import REWARD, ROWS
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sdpo_plugin import ConfigError
from sdpo_plugin.openrlhf_adapter.launcher import doctor, memory

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def flags(model, tmp_path_factory) -> list[str]:
    """Of a run that would work."""
    directory = tmp_path_factory.mktemp("recipe")
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (directory / "reward.py").write_text(REWARD)
    return [
        "--algo=sdpo", f"--actor.model_name_or_path={model}", f"--data.prompt_dataset={directory}/rows.jsonl",
        "--data.input_key=prompt", "--data.label_key=label", "--data.apply_chat_template", "--data.max_len=128",
        f"--reward.remote_url={directory}/reward.py", "--rollout.max_new_tokens=8", "--rollout.batch_size=8",
        "--rollout.n_samples_per_prompt=2", "--train.batch_size=16", "--train.micro_batch_size=8",
        "--rollout.micro_batch_size=8", "--algo.advantage.estimator=group_norm", "--algo.kl.init_coef=0",
        "--actor.num_gpus_per_node=2", "--vllm.num_engines=2", "--train.colocate_all", "--vllm.enable_sleep",
        "--ds.enable_sleep", f"--ckpt.output_dir={directory}/model", f"--ckpt.path={directory}/ckpt",
    ]  # fmt: skip


@pytest.fixture
def examine(openrlhf):
    """`examine(directory, *flags)`: exit code, what is shown, doctor.json."""

    def call(directory, *flags) -> tuple[int, str, dict]:
        done = openrlhf.command("doctor", *flags, directory=directory, COLUMNS="200")
        return done.returncode, done.stdout, json.loads((directory / "doctor.json").read_text())

    return call


def statuses(report) -> dict[str, str]:
    return {check["about"]: check["status"] for check in report["checks"]}


SECRETS = ("0123456789abcdef0123456789abcdef01234567", "swan-key", "sesame")
WITH_SECRETS = (
    f"--logger.wandb.key={SECRETS[0]}", f"--logger.swanlab.key={SECRETS[1]}",
    f"--logger.mlflow.uri=https://me:{SECRETS[2]}@mlflow.org:5000",
)  # fmt: skip


def test_a_run_that_would_work(examine, tmp_path, flags):
    (tmp_path / "doctor.json").touch(0o644)
    code, shown, report = examine(tmp_path, *flags, *WITH_SECRETS, "--rows")
    written = (tmp_path / "doctor.json").read_text()
    assert [secret for secret in SECRETS if secret in shown + written] == []
    assert report["flags"]["logger.wandb.key"] == "***" and report["flags"]["data.label_key"] == "label"
    assert report["flags"]["logger.mlflow.uri"] == "https://me:***@mlflow.org:5000"
    assert (tmp_path / "doctor.json").stat().st_mode & 0o777 == 0o600
    assert code == 0 and "fail" not in statuses(report).values()
    assert [one["row"] for one in report["teacher_prompts"]] == [0, 1, 2]
    assert all("Correct solution:" in one["prompt"] and one["tokens"] > 50 for one in report["teacher_prompts"])
    assert report["flags"]["algo.name"] == "sdpo" and "in CPU memory while the engines generate" in shown
    assert report["memory"]["shape"]["parameters"] == 354_432


def test_the_users_rows_are_written_on_request_only(tmp_path):
    prompts = [{"row": 0, "tokens": 9, "prompt": "mine"}]
    report = {"checks": [{"found": "http://me:sesame@h"}], "teacher_prompts": prompts}
    for rows, kept in ((False, {}), (True, {"prompt": "mine"})):
        doctor.write(report, str(tmp_path / f"{rows}.json"), rows)
        found = json.loads((tmp_path / f"{rows}.json").read_text())
        assert found["teacher_prompts"] == [{"row": 0, "tokens": 9, **kept}]
        assert found["checks"] == [{"found": "http://me:***@h"}]
    with pytest.raises(ConfigError, match="--json /proc/x.json: cannot be written to .*; give another file"):
        doctor.write(report, "/proc/x.json", False)


def test_a_broken_run_is_reported_whole(examine, tmp_path, flags, model):
    import shutil

    plain = tmp_path / "plain"
    shutil.copytree(model, plain)
    (plain / "chat_template.jinja").unlink()
    code, shown, report = examine(
        tmp_path, *flags, f"--actor.model_name_or_path={plain}", "--data.label_key=gold", "--ckpt.output_dir=/proc/x"
    )
    expected = {"tokenizer": "fail", "data": "fail", "model": "pass", "output": "fail"}
    assert code == 2 and expected.items() <= statuses(report).items()
    assert f"the tokenizer of {plain} has no chat template" in shown
    assert "has no such column; it has prompt, label" in shown


def test_rows_that_the_chat_template_refuses_are_a_failed_check(tmp_path, flags, model):
    """In this process: a doctor of its own would take ten seconds."""
    import shutil

    from rich.console import Console

    from sdpo_plugin.openrlhf_adapter.platform import cpu

    cpu.enable()
    from sdpo_plugin.openrlhf_adapter.launcher import install  # noqa: F401

    shutil.copytree(model, tmp_path / "model")
    refusing = "{{ raise_exception('no system turns') if messages[0].role == 'system' }}{{ messages[-1].content }}"
    (tmp_path / "model" / "chat_template.jinja").write_text(refusing)
    row = {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "say 1"}], "label": "1"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*ROWS, row]))
    changed = [f"--actor.model_name_or_path={tmp_path}/model", f"--data.prompt_dataset={tmp_path}/rows.jsonl"]
    checks = list(doctor.run([*flags, *changed, f"--ckpt.path={tmp_path}/c"], None, True, Console(), {}))
    (found,) = [check for check in checks if check.about == "prompts"]
    assert found.status == doctor.FAIL and f"{tmp_path}/rows.jsonl, row {len(ROWS)}: " in found.found
    assert f"the chat template of {tmp_path}/model rejects" in found.found and "no system turns" in found.found


@pytest.mark.check
def test_another_version_and_a_patch_point_that_moved(tmp_path):
    """In an interpreter of its own, which finds them as it starts."""
    other = tmp_path / "openrlhf-0.9.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: openrlhf\nVersion: 0.9.0\n")
    (tmp_path / "sitecustomize.py").write_text(
        "from wrapt import when_imported\n@when_imported('openrlhf.trainer.ppo_utils.replay_buffer')\n"
        "def moved(module):\n    del module.NaiveReplayBuffer.setup_dynamic_batch\n"
    )
    command = [sys.executable, "-m", "sdpo_plugin", "doctor"]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    code, shown, report = done.returncode, done.stdout, json.loads((tmp_path / "doctor.json").read_text())
    assert code == 2 and statuses(report)["openrlhf"] == "warn" and "0.9.0; tested with 0.11.2" in shown
    assert statuses(report)["patch points"] == "fail" and "NaiveReplayBuffer.setup_dynamic_batch: not found" in shown


def test_a_missing_start_up_hook_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    (found,) = [check for check in doctor.versions() if check.about == "start-up hook"]
    assert found.status == doctor.WARN and "use openrlhf-sdpo train" in found.found


# ── the memory table (that it is right: tests/slow/memory.py) ──


def arguments(**changed) -> SimpleNamespace:
    groups = {
        "algo": {"name": "sdpo"}, "data": {"max_len": 1024}, "rollout": {"max_new_tokens": 512},
        "actor": {"num_nodes": 1, "num_gpus_per_node": 8, "gradient_checkpointing_enable": True},
        "ds": {
            "zero_stage": 2, "ring_attn_size": 1, "adam_offload": False, "param_dtype": "bf16",
            "grad_accum_dtype": None,
        },
        "teacher": {
            "kind": "ema", "offload": False, "zero_stage": None, "max_tokens_per_gpu": 16384, "scored_by": "worker",
        },
        "distill": {"mode": "topk", "topk": 100},
        "reprompt": {"max_len": 3072},
        "train": {"micro_batch_size": 1, "dynamic_batch_enable": False},
    }  # fmt: skip
    filled = {name: SimpleNamespace(**{**values, **changed.get(name, {})}) for name, values in groups.items()}
    return SimpleNamespace(**filled)


SHAPE = memory.Shape(8_000_000_000, 0, 4096, 36, 12288, 151_936)


def parts(**changed) -> dict[str, tuple[float, float]]:
    return {p.name: (p.gpu / 1e9, p.cpu / 1e9) for p in memory.policy_worker(arguments(**changed), SHAPE)}


def test_engines_that_score_leave_the_ema_alone_on_the_workers():
    engine = {"scored_by": "engine"}
    base, ema = (parts(teacher={"kind": kind, **engine}) for kind in ("base", "ema"))
    assert "teacher's weights" not in base and ema["teacher's weights"] == (16, 0)
    assert memory.TEACHER_PASS not in ema and memory.TEACHER_PASS in parts()
    assert ema["the loss"][0] < parts()["the loss"][0]  # 8 bytes for each of the top-k, not two for each hidden state


def test_a_model_of_8_billion_parameters():
    found = parts()
    assert found["student's weights"] == (16, 0) and found["fp32 weights and moments"] == (12, 0)
    assert found["teacher's weights"] == (16, 0) and found["EMA teacher's fp32 residual"] == (4, 0)
    third = parts(ds={"zero_stage": 3})
    assert third["student's weights"] == third["teacher's weights"] == (2, 0) and third["gathered weights"] == (2, 0)
    away = parts(teacher={"offload": True}, ds={"adam_offload": True})
    assert away["teacher's weights"] == (0, 16) and away["fp32 weights and moments"] == (0, 12)
    assert "teacher's weights" not in parts(teacher={"kind": "live"})


def test_a_teacher_s_forward_pass_and_gathered_head_are_counted():
    name, states = memory.TEACHER_PASS, 4096 * (2 * 4096 + 3 * 12288) * 2 / 1e9
    assert parts()[name] == (pytest.approx(states), 0)
    assert parts(train={"micro_batch_size": 9})[name][0] == pytest.approx(4 * states)  # --teacher.max_tokens_per_gpu
    head = 2 * 151_936 * 4096 / 1e9
    live, base = (parts(ds={"zero_stage": 3}, teacher={"kind": kind})["the loss"][0] for kind in ("live", "base"))
    assert base - live == pytest.approx(head)
    assert parts()["the loss"] == parts(teacher={"kind": "live"})["the loss"]


def test_of_phases_that_follow_one_another_the_largest_counts():
    def total(micro_batch_size):
        made = memory.policy_worker(arguments(train={"micro_batch_size": micro_batch_size}), SHAPE)
        return memory.total(made)[0], {p.name: p.gpu for p in made}

    for size in (1, 16):
        whole, found = total(size)
        phases = [found["gradients in fp32, at the step"], found["activations"] + found["the loss"],
                  found[memory.TEACHER_PASS]]  # fmt: skip
        assert whole == pytest.approx(sum(found.values()) - sum(phases) + max(phases))


def test_what_sleeps_is_in_cpu_memory():
    every = memory.policy_worker(arguments(), SHAPE)
    awake, asleep = memory.total(every), memory.total(every, asleep=True)
    assert asleep[1] / 1e9 == 12 + 16 + 4 and awake[1] == 0 and asleep[0] < awake[0] - 32e9


def test_the_shape_is_read_off_a_configuration():
    config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=False)  # fmt: skip
    shape = memory.shape_of(config, lora_rank=4, lora_targets=["q_proj", "down_proj"])
    assert shape.parameters == 2 * 100 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert shape.adapters == 2 * 4 * (64 + 64 + 128 + 64)


def test_the_shape_of_a_vision_language_model_is_that_of_all_its_weights():
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=28
        ),
    )
    shape = memory.shape_of(config)
    assert (shape.hidden, shape.layers, shape.intermediate, shape.vocab) == (64, 2, 128, 100)
    assert shape.parameters == sum(p.numel() for p in LlavaForConditionalGeneration(config).parameters())
