"""Bad launches: each ends by itself, soon, with one message and the exit code of docs/troubleshooting.md, and
leaves nothing.
"""

import json
import os
import shutil
import time
from pathlib import Path

import psutil
import pytest
from common import ROWS, SDPO, TWO_RANKS, Service, cases

from sdpo_plugin.testing import RunFailed, tiny_model

BEFORE_RAY, IN_RAY = 20.0, 90.0  # seconds, on two cores that may be busy
SOFTWARE, SETTINGS, REWARD, MACHINE = 1, 2, 3, 4


@pytest.fixture(scope="module", autouse=True)
def warm(openrlhf, tmp_path_factory):
    """The process that runs are forks of, so that its start counts in no run's seconds."""
    assert openrlhf.command("plugins", directory=tmp_path_factory.mktemp("warm")).returncode == 0


def chat(*roles) -> list[dict]:
    return [{"role": role, "content": "hello"} for role in roles]


def ends(openrlhf, *args, **kwargs) -> RunFailed:
    with pytest.raises(RunFailed) as failed:
        openrlhf(*args, **kwargs)
    time.sleep(1)
    mine = f"{openrlhf.directory}/run{openrlhf.runs}"
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if mine in " ".join(p.info["cmdline"] or [])]
    assert not left
    return failed.value


def message(failed) -> str:
    """The last thing printed, from the line that says what happened on."""
    lines = failed.output.rstrip().splitlines()
    at = max(i for i, line in enumerate(lines) if line.startswith("openrlhf-sdpo: error: "))
    assert len(lines) - at <= 4, lines[at:]  # what, where, fix, file
    assert "Traceback" not in "".join(lines[at:])
    if kept := [line.split()[-1] for line in lines[at:] if line.startswith("  all:")]:
        assert "Traceback" in Path(kept[0]).read_text()
    return "\n".join(lines[at:])


# name: (flags, error) of launches that end before Ray starts, with exit code 2
FLAGS = {
    "value": (["--distill.alpha", "2"], "--distill.alpha 2.0: give a number in [0, 1]"),
    "algorithm": (["--algo", "sdop"], "--algo sdop: unknown algorithm; choose one of"),
    "recipe": (["--config", "/no/recipe.yaml"], "--config /no/recipe.yaml: [Errno 2] No such file"),
    "plugin": (["--plugins", "no_such_plugin"], "--plugins no_such_plugin: No module named 'no_such_plugin'"),
    "hub": (["--data.prompt_dataset", "/no/data"], "--data.prompt_dataset /no/data: cannot be loaded"),
    "file": (["--data.prompt_dataset", "/no/data.jsonl"], "--data.prompt_dataset /no/data.jsonl: no such file; give"),
    "column": (["--data.input_key", "question"], "--data.input_key question: --data.prompt_dataset "),
    "label": (["--data.label_key", "gold"], "has no such column; it has prompt, label, note"),
    "evaluation": (["--eval.dataset", "/no/eval.jsonl"], "--eval.dataset /no/eval.jsonl: no such file"),
    "privileged": (["--algo", "sdft"], "--reprompt.privileged_key privileged_context: the dataset has no such column"),
    "reward file": (["--reward.remote_url", "/no/reward.py"], "--reward.remote_url /no/reward.py: No such file or dir"),
    "agent file": (["--train.agent_func_path", __file__], "defines no AgentExecutor; it has "),
    "model": (["--actor.model_name_or_path", "/no/model"], "--actor.model_name_or_path /no/model: cannot be loaded ("),
    "output": (["--ckpt.output_dir", "/proc/model"], "--ckpt.output_dir /proc/model: cannot be written to ("),
    "gpus": (["--actor.num_gpus_per_node", "65"], "needs 66 GPUs (actor 65, vllm 1), and this machine has 64; give"),
    "batches": (["--rollout.micro_batch_size", "64"], "The number of sample batches must be greater than or equal to"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag(openrlhf, model, reward, name):
    flags, error = FLAGS[name]
    failed = ends(openrlhf, model, ROWS, reward, *SDPO, *flags)
    assert error in message(failed)
    assert failed.code == SETTINGS and failed.seconds < BEFORE_RAY


ROW = {"label": "1"}
DATA = {
    "empty": ([], "is an empty file; give a file with rows"),
    "assistant last": ([ROW | {"prompt": chat("user")}, ROW | {"prompt": chat("user", "assistant")}],
                       "row 1 has no user turn at its end"),
    "not text": ([ROW | {"prompt": 7}], "row 0 has 7 there; expected text or a list of messages with role and content"),
    "no content": ([ROW | {"prompt": [{"role": "user", "text": "hello"}]}], "row 0 has [{'role': 'user', 'text': 'hel"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data(openrlhf, model, reward, tmp_path, name):
    rows, error = DATA[name]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    failed = ends(openrlhf, model, ROWS, reward, *SDPO, "--data.prompt_dataset", f"{tmp_path}/rows.jsonl")
    assert error in message(failed) and f"{tmp_path}/rows.jsonl" in message(failed)
    assert failed.code == SETTINGS and failed.seconds < BEFORE_RAY


def test_a_tokenizer_without_a_chat_template(openrlhf, reward, tmp_path):
    plain = tiny_model(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    failed = ends(openrlhf, plain, ROWS, reward, *SDPO)
    assert f"the tokenizer of {plain} has no chat template; use an instruction-tuned" in message(failed)
    assert failed.code == SETTINGS and failed.seconds < BEFORE_RAY


def test_an_engine_that_cannot_start(openrlhf, reward, tmp_path):
    """The policy worker would wait for it for minutes."""
    failed = ends(openrlhf, tiny_model(tmp_path / "short", positions=64), ROWS, reward, *SDPO)
    assert "vLLM cannot serve --actor.model_name_or_path with these flags: " in message(failed)
    assert "max_model_len" in message(failed) and "ray::Engine.__init__" in message(failed)
    assert failed.code == SETTINGS and failed.seconds < IN_RAY


REWARDS = {
    "raises": ("def reward_func(queries, prompts, labels):\n    return 1 / 0\n",
               "reward.py: the reward function failed: ZeroDivisionError: division by zero",
               "reward.py, line 2, in reward_func"),
    "feedback": ("import torch\ndef reward_func(queries, prompts, labels):\n"
                 "    return {'rewards': torch.zeros(1), 'scores': torch.zeros(1), 'feedback': [{'line': 3}]}\n",
                 "feedback of a rollout of group 0 is dict, not text", ""),
    "hangs": ("import time\ndef reward_func(queries, prompts, labels):\n    time.sleep(3600)\n",
              "reward.py: the reward function failed: no answer within 2 s (--reward.timeout)", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", cases(REWARDS.keys(), "raises", "hangs"))
def test_a_reward_function(openrlhf, model, tmp_path, name):
    code, error, where = REWARDS[name]
    (tmp_path / "reward.py").write_text(code)
    failed = ends(openrlhf, model, ROWS, tmp_path / "reward.py", *SDPO, "--reward.timeout", "2")
    assert error in message(failed) and where in message(failed)
    assert failed.code == REWARD and failed.seconds < IN_RAY


def test_a_reward_service_that_answers_with_two_rewards_for_one(openrlhf, model):
    service = Service(lambda request: b'{"rewards": [1.0, 0.0]}')
    failed = ends(openrlhf, model, ROWS, service.url, *SDPO)
    assert "rewards is [1.0, 0.0]; expected one number per query" in message(failed)
    assert failed.code == REWARD and failed.seconds < IN_RAY


# name: (what happens to a checkpoint of two ranks, flags, message)
CHECKPOINTS = {
    "truncated": (lambda path: os.truncate(path / "mp_rank_00_model_states.pt", 100), ["--ckpt.load_enable"],
                  "mp_rank_00_model_states.pt has 100 bytes of "),
    "other ranks": (None, ["--ckpt.load_enable", "--actor.num_gpus_per_node", "1"],
                    "--actor.num_gpus_per_node 1: the checkpoint "),
    "of an earlier run": (None, [], "an earlier run has left global_step2 there, and this run would overwrite"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint(openrlhf, model, reward, recorded, tmp_path, name):
    damage, flags, error = CHECKPOINTS[name]
    shutil.copytree(recorded.directory / "ckpt", tmp_path / "ckpt")
    if damage:
        damage(tmp_path / "ckpt" / "_actor" / "global_step2")
    flags = [*SDPO, *TWO_RANKS, "--ckpt.save_steps", "1", "--ckpt.path", str(tmp_path / "ckpt"), *flags]
    failed = ends(openrlhf, model, ROWS, reward, *flags, replay=recorded)
    assert error in message(failed)
    assert failed.code == SETTINGS and failed.seconds < BEFORE_RAY
    assert (tmp_path / "ckpt" / "_actor" / "latest").read_text() == "global_step2"


def test_two_runs_in_one_directory(openrlhf, model, reward, recorded, tmp_path):
    """This process is the other run."""
    from sdpo_plugin.openrlhf_adapter.launcher import preflight

    (tmp_path / "model").mkdir()
    preflight.alone("--ckpt.output_dir", str(tmp_path / "model"))
    failed = ends(openrlhf, model, ROWS, reward, *SDPO, "--ckpt.output_dir", f"{tmp_path}/model", replay=recorded)
    assert f"model: another run writes there (process {os.getpid()} on " in message(failed)
    assert failed.code == SETTINGS and failed.seconds < BEFORE_RAY


FAULTS = {
    "controller": (MACHINE, "Controller died"),
    "loss": (SETTINGS, "the loss is nan"),
    "gradient": (SETTINGS, "the gradient"),
    "gradient, ZeRO 3": (SETTINGS, "the gradient's norm is nan"),
}


@pytest.mark.parametrize("name", cases(FAULTS.keys(), "controller", "gradient, ZeRO 3"))
def test_in_step_2_of_training(openrlhf, model, reward, recorded, tmp_path, name):
    """On the last of two ranks; what step 1 saved is there."""
    (code, error), fault = FAULTS[name], name.split(",")[0]
    stage = "3" if "ZeRO 3" in name else "2"
    flags = (*SDPO, *TWO_RANKS, "--ckpt.save_steps", "1", "--plugins", "fault", "--ds.zero_stage", stage)
    flags += ("--fault.at", fault, "--fault.marker", f"{tmp_path}/fault")
    failed = ends(openrlhf, model, ROWS, reward, *flags, replay=recorded, timeout=IN_RAY)
    assert error in message(failed) and (tmp_path / "fault").exists()
    assert failed.code == code and failed.seconds < IN_RAY
    checkpoints = Path(f"{openrlhf.directory}/run{openrlhf.runs}/ckpt/_actor")
    assert [path.parent.name for path in checkpoints.glob("*/whole")] == ["global_step1"]


def test_a_plugin_that_raises_on_a_worker(openrlhf, model, reward, recorded, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(
        "from sdpo_plugin import hookimpl\n@hookimpl\ndef openrlhf_optimizer_step(worker):\n    raise KeyError('x')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    failed = ends(openrlhf, model, ROWS, reward, *SDPO, *TWO_RANKS, "--plugins", "broken", replay=recorded)
    assert "KeyError: 'x'" in message(failed) and "broken.py, line 4, in openrlhf_optimizer_step" in message(failed)
    assert failed.code == SOFTWARE and failed.seconds < IN_RAY


def test_metrics_of_one_rank_alone(openrlhf, model, reward, recorded):
    """OpenRLHF would wait for ever in a collective, or add one metric to another."""
    flags = (*SDPO, *TWO_RANKS, "--plugins", "differs")
    failed = ends(openrlhf, model, ROWS, reward, *flags, replay=recorded, timeout=IN_RAY)
    missing = "differs/here is missing on rank 0 of 2; differs/there is missing on rank 1 of 2"
    reporting = "(plugins that report any: algorithm sdpo, differs"
    assert f"metrics differ between ranks: {missing} {reporting}" in message(failed)
    assert failed.code == SOFTWARE and failed.seconds < IN_RAY


DYING = """
import os, psutil, signal, torch

def reward_func(queries, prompts, labels):
    {victims}
    rewards = torch.ones(len(queries))
    return {{"rewards": rewards, "scores": rewards}}
"""
KILL = "[p.send_signal(signal.SIGKILL) for p in {}]"
VICTIMS = {
    "engine": (KILL.format("[psutil.Process()]"), "Engine died"),
    "engine core": (KILL.format("psutil.Process().children(recursive=True)"), " died"),  # who hears of it first, tells
}


@pytest.mark.parametrize("victim", cases(VICTIMS.keys(), "engine core"))
def test_a_killed_engine(openrlhf, model, tmp_path, victim):
    victims, error = VICTIMS[victim]
    (tmp_path / "reward.py").write_text(DYING.format(victims=victims))
    failed = ends(openrlhf, model, ROWS, tmp_path / "reward.py", *SDPO, "--train.num_episodes", "2", timeout=IN_RAY)
    assert error in message(failed)
    assert failed.code == MACHINE and failed.seconds < IN_RAY


def test_a_killed_worker(openrlhf, model, reward, recorded, tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(
        "import os, signal\nfrom sdpo_plugin import hookimpl\n@hookimpl\ndef openrlhf_optimizer_step(worker):\n"
        "    if worker.rank == 1:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = (*SDPO, *TWO_RANKS, "--plugins", "dying")
    failed = ends(openrlhf, model, ROWS, reward, *flags, replay=recorded, timeout=IN_RAY)
    told = message(failed)  # by Ray, or by the other rank, which hears of it through gloo: by whom it is heard first
    assert "PolicyWorker died" in told or "a process died that the run was talking to" in told
    assert failed.code == MACHINE and failed.seconds < IN_RAY


def test_nothing_answers_at_the_address_of_ray(openrlhf, model, reward, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    failed = ends(openrlhf, model, ROWS, reward, *SDPO)
    assert "RAY_ADDRESS 127.0.0.1:9: nothing answers there ([Errno 111] Connection refused); start" in message(failed)
    assert failed.code == SETTINGS and failed.seconds < BEFORE_RAY
