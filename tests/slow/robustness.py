"""What a run does when something around it fails, case by case: `make robustness`, which writes docs/robustness.md.

A quarter of an hour. What the suite holds of it: host/test_failures.py, host/test_resume.py, host/test_rewards.py.
"""

import json
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from common import LORA, ROWS, SDPO, TWO_RANKS, Service
from safetensors.torch import load_file, save_file

from sdpo_plugin.openrlhf_adapter.worker.checkpoint import missing, named_latest
from sdpo_plugin.testing import RunFailed

PAGE = Path(__file__).parents[2] / "docs" / "robustness.md"
SETTINGS, REWARD, MACHINE = 2, 3, 4
TIMEOUT = 150.0  # seconds in which every run has ended
HEAD = """# When something around a run fails

Made by `make robustness`: each line is a run of OpenRLHF on CPU that had the accident. Seconds are those from the
accident until the run had ended, or what a run that goes on lost; of reward services, and of what is there before the
start, they are the whole command's (whose imports, some ten seconds, were done before). No case hangs, none goes on in
silence with something that is wrong, and no whole checkpoint is lost. Exit codes are those of
[train.md](train.md#when-something-is-wrong).

"""


@dataclass
class Case:
    """One line of the page, filled by its test; `kept` last, so that the page has it only of a test that passed."""

    sees: str = ""
    kept: str = ""
    seconds: float = 0.0


@pytest.fixture(scope="session")
def cases():
    found: dict[str, Case] = {}
    yield found
    known = {}
    if PAGE.exists():  # lines of cases that were not run now stay
        known = dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", PAGE.read_text(), re.M))
    known |= {
        name: f"{case.sees} | {case.kept} | {round(case.seconds) or 'under 1'}"
        for name, case in found.items()
        if case.kept
    }
    head = ["| what happens | what the user sees | what is kept | seconds |", "| --- | --- | --- | --- |"]
    lines = [f"| {name} | {known[name]} |" for name in NAMES if name in known]
    PAGE.write_text(HEAD + "\n".join([*head, *lines]) + "\n")


@pytest.fixture
def case(cases, request) -> Case:
    name = request.node.callspec.params["name"] if hasattr(request.node, "callspec") else NAMES_OF[request.node.name]
    return cases.setdefault(name, Case())


@pytest.fixture
def fault(tmp_path) -> Path:
    """A file that is made when the accident happens."""
    return tmp_path / "fault"


def told(failed: RunFailed) -> str:
    """The message that a run ended with."""
    lines = failed.output.rstrip().splitlines()
    at = max(i for i, line in enumerate(lines) if line.startswith("openrlhf-sdpo: error: "))
    return "\n".join(lines[at:])


def shown(text: str, tmp_path: Path, openrlhf) -> str:
    """A message as the page has it: its first line and what to do, without this machine's directories."""
    lines = [line for line in text.splitlines() if line.startswith(("openrlhf-sdpo: error: ", "  fix:"))]
    said = "; fix: ".join(line.removeprefix("openrlhf-sdpo: error: ").removeprefix("  fix:").strip() for line in lines)
    for directory in (str(tmp_path), *(f"{openrlhf.directory}/run{n}" for n in range(openrlhf.runs, 0, -1))):
        said = said.replace(f"{directory}/", "")
    said = re.sub(r"127\.0\.0\.1:\d{4,}", "127.0.0.1:5000", said)
    said = re.sub(r"process \d+ on \S+, since [\d: -]+\d", "process 1234 on node1, since 2026-01-01 12:00", said)
    return said.replace("|", "\\|").replace("<", "&lt;")


def ends(openrlhf, case, tmp_path, fault, code, error, *args, **kwargs) -> RunFailed:
    """A run that ends with exit code and message, and leaves no process; the page is told."""
    began = time.time()
    with pytest.raises(RunFailed) as failed:
        openrlhf(*args, timeout=TIMEOUT, **kwargs)
    ended = time.time()
    mine = f"{openrlhf.directory}/run{openrlhf.runs}/"
    time.sleep(1)
    assert not [p for p in psutil.process_iter(["cmdline"]) if mine in " ".join(p.info["cmdline"] or [])]
    message = told(failed.value)
    assert failed.value.code == code and re.search(error, message), message
    assert "report it" not in message
    case.sees = f"exit code {code}: {shown(message, tmp_path, openrlhf)}"
    case.seconds = ended - (fault.stat().st_mtime if fault.exists() else began)
    return failed.value


def whole(directory: Path) -> str:
    """The checkpoint that a restart goes on from, which must be whole."""
    named = named_latest(str(directory / "_actor"))
    assert named and (directory / "_actor" / named / "whole").exists()
    assert not missing(str(directory / "_actor" / named))
    return named


# ── the reward service ──


def right(asked) -> bytes:
    return json.dumps({"rewards": [1.0] * len(asked["query"]), "feedback": ["as expected"]}).encode()


SERVICES = {
    "reward service down": ("http://127.0.0.1:9/reward", "Cannot connect to host 127.0.0.1:9"),
    "reward service answers after 10 minutes": (Service(right, 600.0), r"no answer within 4 s \(--reward.timeout\)"),
    "reward service answers with a web page": (Service(lambda _: b"<html>502</html>"), "Expecting value|json"),
    "reward service answers with JSON without rewards": (Service(lambda _: b'{"score": 1}'), "a dict with 'score'"),
    "reward service answers with two rewards for one": (
        Service(lambda _: b'{"rewards": [1, 0]}'), r"rewards is \[1, 0\]; expected one number per query"),
    "reward service answers NaN": (
        Service(lambda _: b'{"rewards": [NaN]}'), "rewards is nan; expected a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVICES)
def test_a_reward_service(openrlhf, model, case, tmp_path, fault, name):
    service, error = SERVICES[name]
    url = service if isinstance(service, str) else service.url
    flags = (*SDPO, "--reward.timeout", "4" if "minutes" in name else "60")
    ends(openrlhf, case, tmp_path, fault, REWARD, error, model, ROWS, url, *flags)
    case.kept = "checkpoints so far; with `--reward.on_error skip` the run goes on without the sample"


def test_a_slow_reward_service(openrlhf, model, case):
    """All 16 answers come after 3 s, and at the same time."""
    service = Service(right, 3.0)
    run = openrlhf(model, ROWS, service.url, *SDPO, timeout=TIMEOUT)
    assert run.metrics["train/reward"] == [[1, 1.0]]
    assert run.metrics["train/self_distillation/reprompt_sample_fraction"][0][1] > 0
    ((_, waited),) = run.metrics["train/timing/generation"]
    case.sees, case.kept, case.seconds = "the run goes on", "everything", waited


REWARDS = {
    "NaN for a reward": ("torch.full((1,), float('nan'))", "{}", "rewards is nan; expected a finite number"),
    "text among extra_logs": ("torch.zeros(1)", "{'kind': 'wrong'}", r"extra_logs\['kind'\] is 'wrong'"),
}
REWARD_FUNCTION = """
import torch

def reward_func(queries, prompts, labels):
    return {{"rewards": {reward}, "scores": torch.zeros(1), "extra_logs": {logs}, "feedback": [{feedback}]}}
"""


def reward_file(tmp_path, reward="torch.zeros(1)", logs="{}", feedback="'no'") -> Path:
    (tmp_path / "reward.py").write_text(REWARD_FUNCTION.format(reward=reward, logs=logs, feedback=feedback))
    return tmp_path / "reward.py"


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward(openrlhf, model, case, tmp_path, fault, name):
    reward, logs, error = REWARDS[name]
    ends(openrlhf, case, tmp_path, fault, REWARD, error, model, ROWS, reward_file(tmp_path, reward, logs), *SDPO)
    case.kept = "checkpoints so far; with `--reward.on_error skip` the run goes on without the sample"


def test_feedback_of_100000_tokens(openrlhf, model, case, tmp_path):
    """A token is a character."""
    short = openrlhf(model, ROWS, reward_file(tmp_path), *SDPO, timeout=TIMEOUT)
    run = openrlhf(model, ROWS, reward_file(tmp_path, feedback="'no ' * 33_334"), *SDPO, timeout=TIMEOUT)
    assert run.metrics["train/self_distillation/truncated_fraction"] == [[1, 1.0]]
    assert run.metrics["train/self_distillation/feedback_used_fraction"] == [[1, 1.0]]
    assert run.metrics["train/self_distillation/loss"][0][1] > 0
    case.sees = "the run goes on; `truncated_fraction` is 1, the feedback's end is cut to fit"
    case.kept, case.seconds = "everything", run.seconds - short.seconds


EMPTY = """
import torch
from openrlhf.utils.agent import AgentExecutorBase

class AgentExecutor(AgentExecutorBase):
    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
        ids = hf_tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if label in ("2", "3"):  # all samples of two prompts have not a single token of the policy's
            tokens, ranges = ids, []
        else:
            output = (await llm_engine.generate(ids, sampling_params)).outputs[0]
            tokens, ranges = ids + list(output.token_ids), [(len(ids), len(ids) + len(output.token_ids))]
        return {"prompt": prompt, "label": label, "images": None, "mm_train_inputs": None, "reward": 0.0, "scores": 0.0,
                "observation_tokens": tokens, "action_ranges": ranges, "rollout_log_probs": [0.0] * len(tokens),
                "truncated": False, "extra_logs": {"feedback": "no"}}
"""


def test_a_group_without_a_response(openrlhf, model, case, tmp_path):
    (tmp_path / "agent.py").write_text(EMPTY)
    flags = ("--train.agent_func_path", f"{tmp_path}/agent.py", "--distill.weight", "0.5")
    run = openrlhf(model, ROWS, "", *SDPO, *flags, timeout=TIMEOUT)
    assert run.metrics["train/self_distillation/reprompt_sample_fraction"] == [[1, 12 / 16]]
    assert run.metrics["train/self_distillation/inactive_group_fraction"] == [[1, 2 / 8]]
    assert all(value.isfinite().all() for value in run.weights.values())
    case.sees, case.kept = "the run goes on; `inactive_group_fraction` counts the group", "everything"


def test_a_padded_vocabulary(openrlhf, model, reward, case, tmp_path):
    """Half of the ids that the untrained model samples are no tokens of the tokenizer."""
    padded = tmp_path / "padded"
    subprocess.run(["cp", "-r", model, padded], check=True)
    config = json.loads((padded / "config.json").read_text())
    weights, size = load_file(padded / "model.safetensors"), 2 * config["vocab_size"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name].repeat(2, 1)
    save_file(weights, padded / "model.safetensors", {"format": "pt"})
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    run = openrlhf(padded, ROWS, reward_file(tmp_path), *SDPO, timeout=TIMEOUT)
    assert run.metrics["train/self_distillation/loss"][0][1] > 0
    assert run.weights["lm_head.weight"].shape[0] == size
    assert any((sample.sequences >= size // 2).any() for sample in run.samples[0])
    case.sees, case.kept = "the run goes on", "everything, the padding included"


# ── processes ──


@pytest.fixture
def training(recorded, tmp_path, fault):
    """Flags of a run of two recorded steps on two ranks with a checkpoint after each; where something goes wrong."""
    return lambda at=None: (
        *SDPO, *TWO_RANKS, "--ckpt.save_steps", "1", "--ckpt.path", f"{tmp_path}/ckpt",
        "--plugins", "fault", "--fault.marker", str(fault), *(("--fault.at", at) if at else ()),
    )  # fmt: skip


FAULTS = {
    "a policy worker is killed": ("worker", MACHINE, "PolicyWorker died"),
    "the controller is killed": ("controller", MACHINE, "Controller died"),
    "the loss is NaN on one rank": ("loss", SETTINGS, "on rank 1 the loss is nan"),
    "one rank's gradient is NaN": ("gradient", SETTINGS, "the gradient.*; the last checkpoint is "),
}


@pytest.mark.parametrize("name", FAULTS)
def test_in_training(openrlhf, model, reward, recorded, case, tmp_path, fault, training, name):
    at, code, error = FAULTS[name]
    ends(openrlhf, case, tmp_path, fault, code, error, model, ROWS, reward, *training(at), replay=recorded)
    assert fault.exists() and whole(tmp_path / "ckpt") == "global_step1"
    again = openrlhf(model, ROWS, reward, *training(), "--ckpt.load_enable", replay=recorded, timeout=TIMEOUT)
    assert [step for step, _ in again.metrics["train/policy_loss"]] == [2, 3]  # a replay begins with its first step
    case.kept = "the checkpoint before, from which the run went on"


@pytest.mark.parametrize("flags", ["0", "1", "3", "1 --ds.adam_offload", "2 --ds.adam_offload", "3 --ds.adam_offload"])
def test_a_gradient_that_is_not_finite_at_every_stage(openrlhf, model, reward, recorded, fault, training, flags):
    flags = (*training("gradient"), "--ds.zero_stage", *flags.split())
    with pytest.raises(RunFailed, match="the gradient.*; the last checkpoint is .*global_step1"):
        openrlhf(model, ROWS, reward, *flags, replay=recorded, timeout=TIMEOUT)
    assert fault.exists()


KILLED = """
import pathlib, psutil, signal, torch

def reward_func(queries, prompts, labels):
    pathlib.Path("{fault}").touch()
    psutil.Process().send_signal(signal.SIGKILL)
"""


def test_a_killed_engine(openrlhf, model, case, tmp_path, fault):
    (tmp_path / "reward.py").write_text(KILLED.format(fault=fault))
    ends(openrlhf, case, tmp_path, fault, MACHINE, "Engine died", model, ROWS, tmp_path / "reward.py", *SDPO)
    case.kept = "checkpoints so far"


# ── disk and directories ──


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for one checkpoint and a half."""
    disk = tmp_path / "ckpt"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=13m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk(openrlhf, model, reward, recorded, case, tmp_path, fault, training, small_disk):
    error = "could not be written|No space left"
    ends(openrlhf, case, tmp_path, fault, MACHINE, error, model, ROWS, reward, *training(), replay=recorded)
    assert whole(small_disk) == "global_step1" and (small_disk / "_actor" / "global_step2").exists()
    subprocess.run(["mount", "-o", "remount,size=40m", small_disk], check=True)
    again = openrlhf(model, ROWS, reward, *training(), "--ckpt.load_enable", replay=recorded, timeout=TIMEOUT)
    assert whole(small_disk) == "global_step3" and len(again.metrics["train/policy_loss"]) == 2
    case.kept = "the checkpoint before, from which the run went on once there was room"


@pytest.fixture
def trained(openrlhf, model, reward, recorded, training, tmp_path) -> Path:
    """The checkpoints of a run that ended well."""
    openrlhf(model, ROWS, reward, *training(), replay=recorded)
    return tmp_path / "ckpt"


def test_a_truncated_checkpoint(openrlhf, model, reward, recorded, case, tmp_path, fault, training, trained):
    states = trained / "_actor" / "global_step2" / "mp_rank_00_model_states.pt"
    os.truncate(states, states.stat().st_size // 2)
    error = r"mp_rank_00_model_states.pt has .* bytes of .*; to go on from global_step1: echo global_step1 >"
    flags = (*training(), "--ckpt.load_enable")
    ends(openrlhf, case, tmp_path, fault, SETTINGS, error, model, ROWS, reward, *flags, replay=recorded)
    (trained / "_actor" / "latest").write_text("global_step1")
    again = openrlhf(model, ROWS, reward, *flags, replay=recorded, timeout=TIMEOUT)
    assert [step for step, _ in again.metrics["train/policy_loss"]] == [2, 3]  # a replay begins with its first step
    case.kept = "the checkpoint before, from which the run went on as told"


OTHER_FLAGS = {
    "a checkpoint of another model": ("--actor.model_name_or_path", "OTHER"),
    "a checkpoint of another ZeRO stage": ("--ds.zero_stage", "3"),
    "a checkpoint of other ranks": ("--actor.num_gpus_per_node", "1"),
    "a checkpoint of all weights, for LoRA": LORA,
    "a checkpoint of another optimizer": ("--actor.optim", "muon"),
}


@pytest.mark.parametrize("name", OTHER_FLAGS)
def test_a_checkpoint_of_other_flags(openrlhf, model, reward, recorded, case, tmp_path, fault, training, trained, name):
    from sdpo_plugin.testing import tiny_model

    flags = [str(tiny_model(tmp_path / "other", hidden=192)) if f == "OTHER" else f for f in OTHER_FLAGS[name]]
    flags = (*training(), "--ckpt.load_enable", *flags)
    ends(openrlhf, case, tmp_path, fault, SETTINGS, "--", model, ROWS, reward, *flags, replay=recorded)
    assert whole(trained) == "global_step2"
    case.kept = "the checkpoints"


def test_a_checkpoint_without_the_average(openrlhf, model, reward, recorded, case, tmp_path, fault, training):
    openrlhf(model, ROWS, reward, *training(), "--teacher.kind", "base", replay=recorded)
    flags, error = (*training(), "--ckpt.load_enable"), "--teacher.kind ema: no teacher in .*global_step2"
    ends(openrlhf, case, tmp_path, fault, SETTINGS, error, model, ROWS, reward, *flags, replay=recorded)
    case.kept = "the checkpoints"


def test_two_runs_in_one_directory(openrlhf, model, reward, recorded, case, tmp_path, fault, training):
    """This process is the other run."""
    from sdpo_plugin.openrlhf_adapter.launcher import preflight

    (tmp_path / "ckpt").mkdir()
    preflight.alone("--ckpt.path", str(tmp_path / "ckpt"))
    error = r"--ckpt.path .*: another run writes there \(process \d+ on "
    ends(openrlhf, case, tmp_path, fault, SETTINGS, error, model, ROWS, reward, *training(), replay=recorded)
    case.kept = "all that the other run writes"


def test_a_second_run_after_the_first(openrlhf, model, reward, recorded, case, tmp_path, fault, training, trained):
    error = "an earlier run has left global_step2 there"
    ends(openrlhf, case, tmp_path, fault, SETTINGS, error, model, ROWS, reward, *training(), replay=recorded)
    assert whole(trained) == "global_step2"
    case.kept = "the earlier run's checkpoints"


JUMP = """
import pathlib, torch

calls = 0

def reward_func(queries, prompts, labels):
    global calls
    calls += 1
    pathlib.Path("{clock}").write_text("+3d" if (calls + 8) % 32 < 16 else "-3d")  # amid each step
    rewards = torch.ones(len(queries))
    return {{"rewards": rewards, "scores": rewards}}
"""


def test_the_clock_jumps(openrlhf, model, case, tmp_path, monkeypatch):
    """By six days, in all processes of a run, between its steps."""
    library = pytest.importorskip("libfaketime", reason="needs libfaketime: pip install 'openrlhf-sdpo[robustness]'")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    (tmp_path / "reward.py").write_text(JUMP.format(clock=clock))
    for name, value in {
        "LD_PRELOAD": str(next(Path(library.__file__).parent.rglob("libfaketime*.so.1"))), "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    flags = (*SDPO, "--train.num_episodes", "4", "--ckpt.save_steps", "1", "--ckpt.max_num", "2")
    run = openrlhf(model, ROWS, tmp_path / "reward.py", *flags, fresh=True, timeout=TIMEOUT)
    assert [step for step, _ in run.metrics["train/policy_loss"]] == [1, 2, 3, 4]
    assert min(seconds for _, seconds in run.metrics["train/timing/generation"]) < -86400  # it did jump
    assert {path.name for path in (run.directory / "ckpt/_actor").glob("global*")} == {"global_step3", "global_step4"}
    case.sees = "the run goes on; OpenRLHF's `timing/` metrics of the step are wrong by the jump"
    case.kept = "everything; the newest checkpoints are known by their steps"


# The order of the page; a test without parameters is one case.
NAMES_OF = {
    "test_a_slow_reward_service": "reward service answers after 3 s",
    "test_feedback_of_100000_tokens": "feedback of 100,000 tokens",
    "test_a_group_without_a_response": "a group without a single response token",
    "test_a_padded_vocabulary": "a vocabulary that is padded to twice its size",
    "test_a_killed_engine": "an engine is killed",
    "test_a_full_disk": "the disk is full at a checkpoint",
    "test_a_truncated_checkpoint": "the checkpoint to resume from is truncated",
    "test_a_checkpoint_without_the_average": "a checkpoint of another teacher",
    "test_two_runs_in_one_directory": "two runs in one directory at the same time",
    "test_a_second_run_after_the_first": "a new run in the directory of an earlier one",
    "test_the_clock_jumps": "the clock jumps by six days",
}
OF = list(NAMES_OF.values())
NAMES = [*SERVICES, *REWARDS, *OF[:4], *FAULTS, *OF[4:7], *OTHER_FLAGS, *OF[7:]]
