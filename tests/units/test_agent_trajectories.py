"""Agents that raise, hang, block or never end, played by OpenRLHF's own executor; the engine says one token a turn."""

import asyncio
import time
from types import SimpleNamespace

import pytest
import torch

from sdpo_plugin.config import ConfigError, RewardConfig
from sdpo_plugin.openrlhf_adapter.platform import cpu

PROMPT = "abcd"


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    cpu.enable()
    import sdpo_plugin.openrlhf_adapter.controller.rollout  # noqa: F401  # which takes its time


class Letters:
    """A tokenizer with a token for each letter, which counts those it was given."""

    most = 0

    def __call__(self, text, add_special_tokens=False, return_tensors=None):
        Letters.most = max(Letters.most, len(text))
        ids = [ord(letter) for letter in text]
        return {"input_ids": torch.tensor([ids], dtype=torch.long) if return_tensors else ids}


class LLM:
    """Says `z`."""

    async def generate(self, tokens, sampling_params, multi_modal_data=None):
        await asyncio.sleep(0)
        assert 0 < sampling_params.max_tokens == 40 - len(tokens)
        output = SimpleNamespace(token_ids=[ord("z")], text="z", finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[output])


def result(done=True, **more):
    return {"rewards": torch.tensor(1.0), "environment_feedback": "ok", "done": done, **more}


def play(agent, number=1, **config):
    """The responses of `number` trajectories of a prompt, labels "0", "1", ..., and the engine's longest pause, s."""
    from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

    from sdpo_plugin.openrlhf_adapter.engine import agents, engine

    agent = type(agent.__name__, (agent, AgentInstanceBase), {})
    pauses = []

    async def ticks():
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            pauses.append(time.monotonic() - began)

    async def run():
        executor = MultiTurnAgentExecutor(agent)
        executor.agent_instance_cls = agents.hosted(agent)
        execute = engine.failures_kept(agents.played(executor.execute))
        engine._reward.set(RewardConfig(**config))
        ticking = asyncio.ensure_future(ticks())
        params = SimpleNamespace(max_tokens=8, logprobs=None)
        given = {"prompt": PROMPT, "max_length": 40, "hf_tokenizer": Letters(), "llm_engine": LLM()}
        found = [execute(label=str(i), sampling_params=params, **given) for i in range(number)]
        responses = await asyncio.gather(*found)
        ticking.cancel()
        assert params.max_tokens == 8
        return responses

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(run()), max(pauses, default=0.0)
    finally:
        loop.close()


def failures(responses):
    """The first line of each response's failure, None where there is none."""
    said = [response["extra_logs"].get("reward_failure") for response in responses]
    for response, failure in zip(responses, said, strict=True):
        assert response["reward"] == (None if failure else 1.0) and bool(response["action_ranges"]) == (not failure)
    return [failure and failure.splitlines()[0] for failure in said]


class Plain:
    def __init__(self):
        self.turns = 0

    async def step(self, states, **kwargs):
        self.turns += 1
        return await self.answer(states)


async def for_ever():
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass


@pytest.mark.parametrize("hang", [lambda: asyncio.sleep(3600), for_ever, lambda: asyncio.to_thread(time.sleep, 3)])
@pytest.mark.parametrize("where", ["reset", "step"])
def test_a_call_that_never_returns_costs_its_sample(hang, where):
    class Hangs(Plain):
        async def reset(self, states):
            if where == "reset" and states["label"] == "1":
                await hang()
            return states

        async def answer(self, states):
            if where == "step" and states["label"] == "1":
                await hang()
            return result()

    began = time.monotonic()
    responses, _ = play(Hangs, 4, timeout=0.3)
    assert failures(responses) == [None, "no answer within 0.3 s (--reward.timeout)", None, None]
    assert time.monotonic() - began < 2


async def blocks():
    time.sleep(4)


async def computes():
    end = time.monotonic() + 4
    while time.monotonic() < end:
        pass


@pytest.mark.parametrize("block", [blocks, computes, lambda: asyncio.wait_for(blocks(), 0.1)])
def test_a_step_that_blocks_the_event_loop_costs_its_sample(block, monkeypatch):
    """It is given up when it has held the loop for the time limit. The others are played again."""
    from sdpo_plugin.openrlhf_adapter.engine import agents

    monkeypatch.setattr(agents, "PROMPT_S", 0.2)
    made = []

    class Blocks(Plain):
        def __init__(self):
            super().__init__()
            made.append(self)

        async def answer(self, states):
            await asyncio.sleep(0.1)
            if states["label"] == "1":
                await block()
            await asyncio.sleep(0.1)
            return result()

    responses, pause = play(Blocks, 4, timeout=0.5)
    first = "no answer within 0.5 s (--reward.timeout); it blocks the event loop of the agents: await what takes time"
    found = failures(responses)
    assert found[1].startswith(first) and [found[i] for i in (0, 2, 3)] == [None] * 3
    assert "test_agent_trajectories.py" in responses[1]["extra_logs"]["reward_failure"].rpartition("File ")[2]
    assert len(made) == 4 + 3 and pause < 2  # of the 4 s for which the step blocks


def test_an_agent_that_blocks_for_a_while_makes_others_wait_and_no_more(monkeypatch):
    """The loop does not answer for all of the time, but it is another one's each time."""
    from sdpo_plugin.openrlhf_adapter.engine import agents

    monkeypatch.setattr(agents, "PROMPT_S", 0.1)

    class Slow(Plain):
        async def answer(self, states):
            time.sleep(0.2)
            return result()

    assert failures(play(Slow, 8, timeout=0.3)[0]) == [None] * 8  # the last one has its turn after 1.4 s


async def in_a_task(error):
    async def raises():
        raise error

    await asyncio.gather(raises())


async def in_a_thread(error):
    def raises():
        raise error

    await asyncio.to_thread(raises)


async def at_once(error):
    raise error


@pytest.mark.parametrize("how", [at_once, in_a_task, in_a_thread])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SystemExit(1), "SystemExit: 1"), (KeyboardInterrupt(), "KeyboardInterrupt"),
        (StopIteration(), "StopIteration"), (asyncio.CancelledError(), "CancelledError"),
        (TimeoutError("its own"), "TimeoutError: its own"),
    ],
)  # fmt: skip
def test_whatever_a_step_raises_is_named_and_is_tried_again_from_the_start(how, error, said):
    """Also where Python makes another exception of it, which names it. The next trajectory has an agent of its own."""

    class Raises(Plain):
        made = 0

        def __init__(self):
            super().__init__()
            Raises.made += 1
            self.number = Raises.made

        async def answer(self, states):
            if self.turns == 2 and self.number <= Raises.raising:
                await how(error)
            return result(done=self.turns == 2, rewards=torch.tensor(0.5))

    Raises.raising = 9
    began = time.monotonic()
    (response,), _ = play(Raises, timeout=60.0)
    assert said.split(":")[0] in failures([response])[0] and time.monotonic() - began < 1 and Raises.made == 1
    if how is at_once and not isinstance(error, StopIteration):
        assert failures([response]) == [said]
    Raises.made, Raises.raising = 0, 1
    (response,), _ = play(Raises, max_attempts=2)
    assert failures([response]) == [None] and Raises.made == 2
    assert response["observation_tokens"] == [ord(letter) for letter in PROMPT + "zokzok"]


def test_a_mistake_in_the_settings_ends_the_run():
    class Refuses(Plain):
        async def answer(self, states):
            raise ConfigError("--flag: no")

    with pytest.raises(ConfigError, match="--flag: no"):
        play(Refuses, max_attempts=3)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "expected a dict with 'rewards', 'environment_feedback', 'done', but step() returned NoneType"),
        ({"rewards": 1.0}, "but step() returned a dict with 'rewards'"),
        (result(rewards=torch.tensor(float("nan"))), "ValueError: rewards is nan; expected a finite number"),
        (result(rewards=torch.ones(2)), "TypeError: rewards is tensor([1., 1.]); expected one number"),
        (result(environment_feedback=3), "TypeError: environment_feedback is 3; expected text"),
        (result(extra_logs=[1]), "TypeError: extra_logs is [1]; expected a dict"),
        (result(extra_logs={"kind": "good"}), "TypeError: extra_logs['kind'] is 'good'; expected one number"),
        (result(scores=torch.tensor(float("inf"))), "ValueError: scores is inf; expected a finite number"),
    ],
)
def test_what_is_no_result_is_a_failure(returned, said):
    class Returns(Plain):
        async def answer(self, states):
            return returned

    assert said in failures(play(Returns)[0])[0]


def test_numbers_of_a_step_may_have_any_form():
    class Returns(Plain):
        async def answer(self, states):
            return result(rewards=[1], extra_logs={"a": torch.tensor([2]), "b": None, "feedback": "\ud800"})

    ((response,), _) = play(Returns)
    logs = {"a": 2.0, "feedback": "\\ud800", "turn_feedback": [None], "trajectory_limit": ""}
    assert failures([response]) == [None] and response["extra_logs"] == logs


class Endless(Plain):
    async def answer(self, states):
        return result(done=False, rewards=torch.tensor(1.0 if self.turns == 1 else 0.0), environment_feedback="?")


def test_a_trajectory_that_its_agent_does_not_end_names_the_limit_at_which_it_ends():
    ((response,), _) = play(Endless, max_turns=3)
    assert response["extra_logs"]["trajectory_limit"] == "--reward.max_turns 3" and response["truncated"]
    assert len(response["action_ranges"]) == 3 and failures([response]) == [None]
    ((response,), _) = play(Endless)
    assert response["extra_logs"]["trajectory_limit"] == "--data.max_len 40" and not response["truncated"]
    assert len(response["observation_tokens"]) == 40 and failures([response]) == [None]

    class Ends(Plain):
        async def answer(self, states):
            return result(done=self.turns == 3, rewards=torch.tensor(1 / 3))

    ((response,), _) = play(Ends, max_turns=3)
    assert response["extra_logs"]["trajectory_limit"] == "" and not response["truncated"]


def test_limits_are_counted_and_named(caplog):
    from sdpo_plugin.openrlhf_adapter.controller.rollout import MAX_TOKENS, MAX_TURNS, ended_at

    limits = ["", "--reward.max_turns 3", "--reward.max_turns 3", "--data.max_len 40", None]
    samples = [SimpleNamespace(limit=limit) for limit in limits]
    assert ended_at(MAX_TURNS, samples) == 0.5 and ended_at(MAX_TOKENS, samples) == 0.25
    assert "--reward.max_turns 3: 2 of 4 trajectories ended there, not by their agent" in caplog.text
    assert "--data.max_len 40: 1 of 4 trajectories" in caplog.text
    assert ended_at(MAX_TURNS, samples[:1]) == 0.0 and ended_at(MAX_TURNS, [samples[4], SimpleNamespace()]) is None


def test_an_observation_is_tokenized_as_far_as_it_can_be_shown():
    class Talks(Plain):
        async def answer(self, states):
            return result(environment_feedback="x" * 10**7)

    Letters.most = 0
    assert failures(play(Talks)[0]) == [None] and Letters.most == 128 * 40
