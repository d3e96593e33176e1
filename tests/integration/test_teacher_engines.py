"""Teachers that vLLM engines score, on the real host: the gradient of a teacher on the policy workers."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from common import LORA, ROWS, TWO_RANKS, cases, same
from test_gradients import distance

from sdpo_plugin.testing import RunFailed, tiny_model

SDPO = ("--algo", "sdpo", "--distill.topk", "20", "--distill.support", "teacher")
ENGINE = ("--teacher.scored_by", "engine", "--teacher.gpu_memory_utilization", "0.1")
BASE, EMA = ("--teacher.kind", "base"), ("--teacher.kind", "ema", "--teacher.update_rate", "0.9")
SETTINGS = {
    "base": (BASE,),
    "live": (("--teacher.kind", "live", "--vllm.num_engines", "1", "--data.max_len", "512"),),
    "renormalized": ((*BASE, "--no-distill.add_tail"),),
    "sampled": ((*BASE, "--distill.mode", "sampled", "--distill.alpha", "1"),),
    "temperature": ((*BASE, "--rollout.temperature", "0.5"),),
    "zero3": ((*BASE, *TWO_RANKS, "--ds.zero_stage", "3"),),
    "two": ((*BASE, "--teacher.num_engines", "2", "--distill.weight", "0.5"),),
}
# In bf16 a worker and an engine differ in the last digits of their logits.
ROUNDING = 0.03


@pytest.fixture(scope="session")
def first_step(openrlhf, model, reward, recorded, tmp_path_factory):
    """`first_step(*flags)`: the gradient of the first recorded step, and the run."""

    def run(*flags):
        out = tmp_path_factory.mktemp("gradient") / "gradient.pt"
        flags = (*SDPO, *flags, "--gradient.out", str(out), "--plugins", "first_gradient")
        run = openrlhf(model, ROWS, reward, *flags, replay=recorded)
        return torch.load(out), run

    return run


def losses(run):
    return [value for _, value in run.metrics["train/self_distillation/loss"]]


@pytest.mark.parametrize("flags", cases(SETTINGS, "base", "live", "temperature"))
def test_an_engine_gives_the_gradient_of_a_worker(first_step, flags):
    (engine, run), (worker, other) = first_step(*flags, *ENGINE), first_step(*flags)
    difference = distance(engine, worker)
    print(f"{flags}: relative difference {difference:.1e}; losses {losses(run)}, {losses(other)}")
    assert difference < ROUNDING
    assert all(seconds > 0 for _, seconds in run.metrics["train/timing/teacher_score"])
    assert "train/timing/teacher_score" not in other.metrics


PUBLISHED = {
    "whole": ((),), "zero3": ((*TWO_RANKS, "--ds.zero_stage", "3"),), "lora": (LORA,),
    "offload": (("--teacher.offload",),),
    "colocated": (("--train.colocate_all", "--vllm.enable_sleep", "--ds.enable_sleep", "--vllm.num_engines", "1"),),
}  # fmt: skip


@pytest.mark.parametrize("flags", cases(PUBLISHED, "whole"))
def test_an_ema_is_published_to_the_engines(replay, flags):
    """The second step's teacher has moved: without its new weights the engines would give the base teacher's loss."""
    own = ("--actor.adam.lr", "1e-2") if flags == LORA else ()
    engine, worker, base = (
        losses(replay(*SDPO, *flags, *own, *kind)) for kind in ((*EMA, *ENGINE), EMA, BASE)
    )
    print(f"{flags}: losses of the second step: engine {engine[1]:.6f}, worker {worker[1]:.6f}, base {base[1]:.6f}")
    assert abs(engine[1] - worker[1]) < 0.2 * abs(base[1] - worker[1])  # LoRA moves little, and bf16 rounds


def test_another_model_teaches(first_step, tmp_path):
    teacher = tiny_model(tmp_path / "teacher", hidden=192, seed=1)
    flags = ("--algo", "opd", "--teacher.model_name_or_path", str(teacher), "--distill.is_clip", "none")
    (engine, run), (worker, other) = first_step(*flags, *ENGINE), first_step(*flags)
    print(f"relative difference {distance(engine, worker):.1e}; losses {losses(run)}, {losses(other)}")
    assert distance(engine, worker) < ROUNDING


@pytest.mark.parametrize("flags", cases({"base": (BASE,), "live": (("--teacher.kind", "live"),),
    "ema": (EMA,), "async": ((*EMA, "--train.async_enable"),)}, "ema"))  # fmt: skip
def test_engines_score_while_others_still_sample(openrlhf, model, reward, flags):
    flags = (*SDPO, *ENGINE, *flags, "--data.max_len", "512", "--train.num_episodes", "2", "--plugins", "ahead")
    run = openrlhf(model, ROWS, reward, *flags)
    for (_, sent), (_, scored) in zip(run.metrics["train/ahead/sent"], run.metrics["train/ahead/scored"], strict=True):
        assert scored > 0 and (sent >= scored or "--train.async_enable" in flags)  # equal requests are sent once
    assert losses(run)[0] > 0


# ── a server ──


class Server:
    """vLLM's OpenAI-compatible server on this machine, as a user starts it."""

    def __init__(self, model, log, port=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = port or free.getsockname()[1]
        environment = {**os.environ, "SDPO_PLUGIN_CPU": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
                   "--port", str(self.port), "--max-logprobs", "20", "--enforce-eager"]  # fmt: skip
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True
            )
        self.url = f"http://127.0.0.1:{self.port}"
        for _ in range(120):
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/v1/models"):
                return
            assert self.process.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
        raise AssertionError(log.read_text()[-3000:])

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@pytest.mark.check
def test_a_server_scores_and_a_killed_one_costs_nothing(first_step, openrlhf, model, reward, recorded, tmp_path):
    teacher = tiny_model(tmp_path / "teacher", hidden=192, seed=1)
    server = Server(teacher, tmp_path / "server.log")
    try:
        flags = ("--algo", "opd", "--distill.is_clip", "none")
        by_url = (*SDPO, *flags, "--teacher.scored_by", "engine", "--teacher.url", server.url)
        engine, whole = first_step(*by_url)
        worker, other = first_step(*flags, "--teacher.model_name_or_path", str(teacher))
        print(f"relative difference {distance(engine, worker):.1e}; losses {losses(whole)}, {losses(other)}")
        assert distance(engine, worker) < ROUNDING

        wrong = [*by_url, "--distill.topk", "30"]
        with pytest.raises(RunFailed, match="--max-logprobs 30"):  # before a model loads
            openrlhf(model, ROWS, reward, *wrong, replay=recorded)

        kept = (*by_url, "--ckpt.path", str(tmp_path / "ckpt"), "--ckpt.save_steps", "1")
        killer = ("--server.pid", str(server.process.pid), "--plugins", "server_killer")
        with pytest.raises(RunFailed, match="the teacher's server gave no scores in 1 attempts") as killed:
            openrlhf(model, ROWS, reward, *kept, *killer, replay=recorded)
        assert killed.value.code == 4
        server = Server(teacher, tmp_path / "again.log", server.port)
        (tmp_path / "rest").mkdir()
        shutil.copy(recorded.directory / "samples" / "00001.pt", tmp_path / "rest" / "00000.pt")
        rest = ("--testing.replay", str(tmp_path / "rest"), "--ckpt.load_enable")
        resumed = openrlhf(model, ROWS, reward, *kept, *rest, replay=recorded)
        assert [step for step, _ in resumed.metrics["train/self_distillation/loss"]] == [2]
        assert same(resumed, openrlhf(model, ROWS, reward, *by_url, replay=recorded))
    finally:
        server.kill()
