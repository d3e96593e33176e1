"""What stands for the reward of a skipped sample, and reward functions that raise, hang, or return nothing."""

import asyncio
import concurrent.futures
import logging
import math
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy
import pytest
import torch

from sdpo_plugin.config import RewardConfig
from sdpo_plugin.openrlhf_adapter.platform import cpu


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    cpu.enable()
    import sdpo_plugin.openrlhf_adapter.controller.rollout  # noqa: F401  # which takes its time


def sample(reward):
    info = {"length": torch.tensor([3.0])}
    if reward is None:
        return SimpleNamespace(skipped="it raised", rewards=None, scores=None, info=info)
    value = torch.tensor([reward])
    return SimpleNamespace(skipped=None, rewards=value, scores=value, info=info | {"reward": value, "score": value})


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([1.0, 0.0, None, 2.0], [1.0, 0.0, 2.0, 2.0]),  # its prompt's other sample's
        ([None, None, 1.0, 2.0], [1.5, 1.5, 1.0, 2.0]),  # the batch's, where the prompt has none
        ([1.0, 0.0, 3.0, 2.0], [1.0, 0.0, 3.0, 2.0]),
    ],
)
def test_the_mean_of_the_others_stands_for_a_reward(rewards, expected):
    from sdpo_plugin.openrlhf_adapter.controller.rollout import rewarded

    samples = [sample(reward) for reward in rewards]
    share = rewarded(samples, per_prompt=2, config=RewardConfig(on_error="skip", max_skipped_fraction=0.5))
    assert share == rewards.count(None) / 4
    assert [s.rewards.item() for s in samples] == [s.info["score"].item() for s in samples] == expected
    assert len({tuple(sorted(s.info)) for s in samples}) == 1  # OpenRLHF logs what all of them have


def test_a_batch_without_a_reward_is_an_error():
    from sdpo_plugin.openrlhf_adapter.controller.rollout import rewarded
    from sdpo_plugin.openrlhf_adapter.failures import RewardError

    with pytest.raises(RewardError, match="max_skipped_fraction 0.1: 2 of 2 samples have no reward, the last one"):
        rewarded([sample(None), sample(None)], per_prompt=2, config=RewardConfig(on_error="skip"))
    with pytest.raises(RewardError, match="--reward.max_skipped_fraction 1: 2 of 2 samples have no reward"):
        config = RewardConfig(on_error="skip", max_skipped_fraction=1.0)
        rewarded([sample(None), sample(None)], per_prompt=2, config=config)


def fetched(reward_func, **config):
    from sdpo_plugin.openrlhf_adapter.engine import engine

    async def fetch(queries, prompts, labels):
        return [await asyncio.to_thread(reward_func)]

    async def call():
        engine._reward.set(RewardConfig(**config))
        return await engine.feedback_and_failures_kept(fetch, asyncio.Semaphore())(["q"], ["p"], ["l"])

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(call())[0]  # not asyncio.run, which would wait for the thread
    finally:
        loop.close()


def test_a_call_that_failed_is_made_again():
    answers = [KeyError("first"), {"rewards": 1.0}]

    def reward_func():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert fetched(reward_func, max_attempts=2)["rewards"] == 1.0 and not answers


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError


def raises(error):
    raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (StopIteration(), "StopIteration"), (SystemExit(2), "SystemExit: 2"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (asyncio.CancelledError(), "CancelledError"), (concurrent.futures.CancelledError(), "CancelledError"),
        (TimeoutError("the judge's"), "TimeoutError: the judge's"), (GeneratorExit(), "GeneratorExit"),
        (StopAsyncIteration("x"), "StopAsyncIteration: x"), (RecursionError("deep"), "RecursionError: deep"),
        (Unreadable(), "Unreadable: (its message cannot be read)"), (ValueError("\ud800"), "ValueError: \\ud800"),
        (ValueError("x" * 10**6), "ValueError: " + "x" * 2000),
    ],
)  # fmt: skip
def test_whatever_a_function_raises_is_named_at_once(error, said):
    """The future that asyncio waits on refuses some, others end or cancel what runs the engine."""
    began = time.monotonic()
    failure = fetched(lambda: raises(error), timeout=60.0)["extra_logs"]["reward_failure"]
    first, _, trace = failure.partition("\n")
    assert first == said and time.monotonic() - began < 5
    assert "in raises" in trace and len(trace) < 21_000 and failure.encode()


@pytest.mark.parametrize("given", ["remote_rm_url", "agent_func_path"])
def test_a_file_that_exits_when_it_is_imported_is_named(tmp_path, monkeypatch, given):
    from sdpo_plugin.openrlhf_adapter.engine.engine import Engine
    from sdpo_plugin.openrlhf_adapter.failures import RewardError

    (tmp_path / "user.py").write_text("import sys\nsys.exit('usage: user.py FILE')\n")
    monkeypatch.setattr(os, "environ", {**os.environ, "RAY_ADDRESS": "none"})  # which the constructor changes
    engine = Engine.__new__(Engine)
    with pytest.raises(RewardError, match=r"user.py: SystemExit: usage: user.py FILE\n(.|\n)*line 2, in <module>"):
        options = {"num_gpus": 0, "distributed_executor_backend": "ray", given: f"{tmp_path}/user.py"}
        asyncio.run(engine.__init__("model", **options))


def test_functions_are_called_so_many_at_a_time_and_servers_all_at_once(tmp_path):
    """OpenRLHF bounds functions by asyncio's threads, and servers by nothing."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    from sdpo_plugin.openrlhf_adapter.engine import engine

    (tmp_path / "reward.py").write_text(
        "import threading, time\n"
        "now, most, lock = 0, 0, threading.Lock()\n"
        "def reward_func(queries, prompts, labels):\n"
        "    global now, most\n"
        "    with lock: now += 1; most = max(most, now)\n"
        "    time.sleep(0.02)\n"
        "    with lock: now -= 1\n"
        "    return {'rewards': most}\n"
    )
    everyone = threading.Barrier(100)

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            everyone.wait(60)  # nobody is answered before all have asked
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"rewards": 1.0}')

        def log_message(self, *args):
            pass

    class Listens(ThreadingHTTPServer):
        request_queue_size = 200

    server = Listens(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    async def rewards(source, name):
        executor = SingleTurnAgentExecutor([source])
        engine.rewards_kept(executor)
        engine._reward.set(RewardConfig(timeout=60.0))
        calls = [getattr(executor, name)(["q"], ["p"], ["l"]) for _ in range(100)]
        return [found["rewards"] for (found,) in await asyncio.gather(*calls)]

    at_a_time = min(32, os.cpu_count() + 4)
    assert max(asyncio.run(rewards(str(tmp_path / "reward.py"), "_fetch_rewards_via_func"))) == at_a_time
    address = f"http://127.0.0.1:{server.server_port}/reward"
    assert asyncio.run(rewards(address, "_fetch_rewards_via_http")) == [1.0] * 100
    server.shutdown()


def test_a_call_that_hangs_is_abandoned():
    began = time.monotonic()
    failure = fetched(lambda: time.sleep(3), timeout=0.2)["extra_logs"]["reward_failure"]
    assert failure == "no answer within 0.2 s (--reward.timeout)" and time.monotonic() - began < 2


@pytest.mark.parametrize(
    "returned, said", [(None, "NoneType"), ({"reward": 1.0}, "a dict with 'reward'"), ([1.0], "list")]
)
def test_what_is_no_reward_is_a_failure(returned, said):
    failure = fetched(lambda: returned)["extra_logs"]["reward_failure"]
    assert f"expected a dict with 'rewards', one number per query, but {said} was returned" in failure


@pytest.mark.parametrize(
    "returned, said",
    [
        ({"rewards": torch.tensor([0.0, 1.0])}, "rewards is tensor([0., 1.]); expected one number per query"),
        ({"rewards": []}, "TypeError: rewards is []; expected one number"),
        ({"rewards": "0.5"}, "TypeError: rewards is '0.5'; expected one number"),
        ({"rewards": [math.nan]}, "ValueError: rewards is nan; expected a finite number"),
        ({"rewards": 1.0, "scores": math.inf}, "ValueError: scores is inf; expected a finite number"),
        ({"rewards": 1.0, "extra_logs": {"kind": "good"}}, "extra_logs['kind'] is 'good'; expected one number"),
        ({"rewards": 1.0, "extra_logs": [1.0]}, "TypeError: extra_logs is [1.0]; expected a dict"),
    ],
)
def test_what_is_not_one_finite_number_is_a_failure(returned, said):
    """OpenRLHF takes NaN for a reward, and with it the whole group's advantages and the weights become NaN."""
    assert said in fetched(lambda: returned)["extra_logs"]["reward_failure"]


def test_one_number_in_any_form_is_a_reward():
    """A server sends lists, one entry per query."""
    for one in (1, True, [1.0], torch.tensor(1.0), torch.tensor([1]), numpy.float32(1.0)):
        found = fetched(lambda: {"rewards": one, "scores": one, "extra_logs": {"x": one}, "feedback": ["f"]})  # noqa: B023
        assert found == {"rewards": 1.0, "scores": 1.0, "extra_logs": {"x": 1.0, "feedback": "f"}}


def test_logs_without_a_number_are_left_out_and_feedback_can_be_written():
    found = fetched(lambda: {"rewards": 1, "extra_logs": {"x": None, "y": [None], 3: 2}, "feedback": "a \ud800"})
    assert found == {"rewards": 1.0, "extra_logs": {"3": 2.0, "feedback": "a \\ud800"}}


def test_logs_of_some_samples_are_filled_with_their_mean():
    """OpenRLHF merges and splits what all samples of a batch have; what it logs is the mean."""
    from openrlhf.trainer.ppo_utils.experience import Experience, make_experience_batch, split_experience_batch

    from sdpo_plugin.openrlhf_adapter.controller.rollout import fill_logs, rewarded

    logs = [{"a": 1.0}, {"b": 5.0, "a": 3.0}, {}, {"c": 7.0}]
    samples = []
    for given in logs:
        one = Experience(sequences=torch.ones(1, 4), rewards=torch.ones(1), scores=torch.ones(1), index=[len(samples)])
        one.info = {"reward": torch.ones(1), "score": torch.ones(1), **{k: torch.tensor([v]) for k, v in given.items()}}
        one.skipped = None
        samples.append(one)
    samples[2].skipped, samples[2].rewards, samples[2].scores, samples[2].info = "it raised", None, None, {}
    config = RewardConfig(on_error="skip", max_skipped_fraction=0.5)
    assert rewarded(samples, per_prompt=2, config=config) == 0.25
    fill_logs(samples)
    assert [list(sample.info) for sample in samples] == [["reward", "score", "a", "b", "c"]] * 4
    merged = make_experience_batch(split_experience_batch(Experience.concat_experiences(samples, 0))).info
    values = {name: torch.as_tensor(value).tolist() for name, value in merged.items()}
    assert values == {
        "reward": [1.0] * 4, "score": [1.0] * 4, "a": [1.0, 3.0, 2.0, 2.0], "b": [5.0] * 4, "c": [7.0] * 4,
    }  # fmt: skip


def test_why_a_server_could_not_be_reached_is_in_the_message():
    """OpenRLHF's own error says that there were five errors, and logs which."""
    from sdpo_plugin.openrlhf_adapter.engine import engine

    def reward_func():
        logging.getLogger("openrlhf.utils.agent").info("Request error, please check: Cannot connect to host x:80")
        raise RuntimeError("Request error for 5 times")

    logger = logging.getLogger("openrlhf.utils.agent")
    logger.addFilter(engine._overheard)
    try:
        failure = fetched(reward_func)["extra_logs"]["reward_failure"]
    finally:
        logger.removeFilter(engine._overheard)
    assert failure.startswith("RuntimeError: Request error for 5 times (Request error, please check: Cannot connect to")
