"""The rollout engine's side: where a sample came from and its reward function's words find the way back."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from sdpo_plugin.config import ConfigError, RewardConfig
from sdpo_plugin.context import joined
from sdpo_plugin.host import deterministic
from sdpo_plugin.host.seams import overrides, seam
from sdpo_plugin.prompts import text_tokenizer

# Keys of a response's `extra_logs`, the one dictionary that OpenRLHF passes on as it is.
FEEDBACK = "feedback"
TURN_FEEDBACK = "turn_feedback"
FAILURE = "reward_failure"
REQUEST = "request"  # key of a response: the `Request` it answers

MAX_THREADS = 4096

Fetch = Callable[..., Awaitable[list[dict[str, Any]]]]
Execute = Callable[..., Awaitable[dict[str, Any]]]  # of an agent's executor


# Of the request being served, per asyncio task: what to sample behind, the prompt it stands for, what to do when its
# reward function fails, and the length of what OpenRLHF left of the prompt.
_shown: ContextVar[list[int] | None] = ContextVar("shown", default=None)
_own: ContextVar[list[int]] = ContextVar("own")
_reward: ContextVar[RewardConfig] = ContextVar("reward")
_replaced: ContextVar[int | None] = ContextVar("replaced", default=None)
# Of a call of a reward server, per asyncio task: what OpenRLHF logged about its requests, each of which it swallows.
_said: ContextVar[list[str] | None] = ContextVar("said", default=None)
# Of the trajectory of an agent, per asyncio task: what each step so far said, of the whole and of its own turn.
_steps: ContextVar[list[tuple[Any, Any]]] = ContextVar("steps")


@dataclass
class Request:
    """What the controller must know of a sample again, and how an engine is to sample it.

    Attributes:
        dataset, row: `id` of the data set in the controller's process, and the row of the prompt in it.
        shown: token ids to sample behind in place of the prompt's own, or None.
        reward: what to do when the reward function fails.
        seed: numbers that a sample's own seed is made of, or None (`--rollout.deterministic`).
        order: position among the prompts sent out so far.
    """

    dataset: int
    row: int
    reward: RewardConfig = RewardConfig()
    shown: list[int] | None = None
    seed: tuple[int, ...] | None = None
    order: int = 0


class Prompt(str):
    """A prompt's text on its way to an engine, with its `Request`: OpenRLHF passes nothing else on from a data set.

    Reward functions and agents are given the text alone, a plain `str`.
    """

    request: Request


_AGENT = "openrlhf.utils.agent:SingleTurnAgentExecutor"
_FETCHES = ("_fetch_rewards_via_func", "_fetch_rewards_via_http")
SingleTurnAgentExecutor = seam(_AGENT)
for _name in _FETCHES:
    seam(f"{_AGENT}.{_name}", "queries_list", "prompts_list", "labels_list")
MultiTurnAgentExecutor = seam("openrlhf.utils.agent:MultiTurnAgentExecutor")
seam("openrlhf.utils.agent:MultiTurnAgentExecutor.__init__", "agent_instance_cls")
seam("openrlhf.utils.agent:AgentInstanceBase.step")
_agent_logger = seam("openrlhf.utils.agent:logger")
RolloutRayActor: Any = seam("openrlhf.trainer.ray.vllm_engine:RolloutRayActor")


class Engine(RolloutRayActor):
    """vllm_engine.py: `RolloutRayActor`."""

    async def __init__(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[misc]  # Ray awaits it
        await super().__init__(*args, **kwargs)
        if isinstance(self.executor, SingleTurnAgentExecutor):
            # A thread that never returns is left behind, so there must be more threads than may work at a time.
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(MAX_THREADS))
            at_a_time = asyncio.Semaphore(min(32, (os.cpu_count() or 1) + 4))  # as many as asyncio's default
            _agent_logger.addFilter(_overheard)
            for name in _FETCHES:
                fetch = feedback_and_failures_kept(getattr(self.executor, name), at_a_time)
                setattr(self.executor, name, fetch)
        else:
            self.executor.execute = failures_kept(steps_collected(self.executor.execute))
            if isinstance(self.executor, MultiTurnAgentExecutor):
                self.executor.agent_instance_cls = steps_noted(self.executor.agent_instance_cls)
        self.alone = asyncio.Lock()

    @overrides("prompt", "num_samples")
    async def generate_responses(self, prompt: Prompt, num_samples: int = 1, **kwargs: Any) -> list[dict[str, Any]]:
        text, request = str(prompt), prompt.request
        _reward.set(request.reward)
        _shown.set(request.shown)
        if request.shown is not None:
            _own.set(text_tokenizer(kwargs["hf_tokenizer"])(text, add_special_tokens=False)["input_ids"])
        generate = partial(RolloutRayActor.generate_responses, self, prompt=text, **kwargs)
        if request.seed is None:
            responses = await generate(num_samples=num_samples)
        else:
            responses = await deterministic.one_by_one(partial(generate, num_samples=1), request.seed, num_samples)
        return [{**response, REQUEST: request} for response in responses]

    @overrides("prompt_token_ids", "sampling_params")
    async def generate(self, prompt_token_ids: list[int], sampling_params: Any, **kwargs: Any) -> Any:
        if (shown := _shown.get()) is not None:
            if _replaced.get() is None:
                if prompt_token_ids != _own.get()[-len(prompt_token_ids) :]:
                    raise ConfigError(
                        "the agent's reset() returned another observation than the prompt, in whose place another "
                        "prompt was to be sampled behind; let it return the prompt, or leave out "
                        "--distill.generate_from_teacher (or the plugin's openrlhf_generation_prompt)"
                    )
                _replaced.set(len(prompt_token_ids))  # an agent's later turns come behind the same prompt
            prompt_token_ids = [*shown, *prompt_token_ids[_replaced.get() :]]
        if (seed := deterministic.seed_of_turn(prompt_token_ids)) is None:
            return await super().generate(prompt_token_ids, sampling_params, **kwargs)
        sampling_params = sampling_params.clone()
        sampling_params.seed = seed
        async with self.alone:
            return await super().generate(prompt_token_ids, sampling_params, **kwargs)


def feedback_and_failures_kept(fetch: Fetch, at_a_time: asyncio.Semaphore) -> Fetch:
    """`fetch` with `feedback` moved to `extra_logs`, tried as often and waited for as long as the request says.

    What it raises, OpenRLHF swallows: here it becomes data, one line and the traceback.
    """

    async def call(queries: list[str], prompts: list[str], labels: list[Any]) -> list[dict[str, Any]]:
        config, failure = _reward.get(RewardConfig()), ""
        for attempt in range(config.attempts):
            if attempt:
                await asyncio.sleep(2.0 ** (attempt - 1))
            said: list[str] = []
            _said.set(said)
            try:
                async with at_a_time:
                    results = await asyncio.wait_for(fetch(queries, prompts, labels), config.timeout)
                return [_with_feedback(result) for result in results]
            except (TimeoutError, asyncio.TimeoutError):
                failure = f"no answer within {config.timeout:g} s (--reward.timeout){_last(said)}"
            except Exception as error:
                failure = f"{type(error).__name__}: {error}{_last(said)}\n{traceback.format_exc()}"
        return [{"extra_logs": {FAILURE: failure}} for _ in queries]

    return call


def _overheard(record: logging.LogRecord) -> bool:
    """A filter that lets everything pass, and notes it for the call that it is about."""
    if (said := _said.get()) is not None:
        said.append(record.getMessage())
    return True


def _last(said: list[str]) -> str:
    return f" ({said[-1]})" if said else ""


def steps_noted(agent: type[Any]) -> type[Any]:
    """An agent's class whose steps note their feedback: OpenRLHF keeps the last one's `extra_logs` only."""

    async def step(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        result = await agent.step(self, *args, **kwargs)
        extra_logs = dict(result.get("extra_logs") or {})
        _steps.get().append((extra_logs.pop(FEEDBACK, None), extra_logs.pop(TURN_FEEDBACK, None)))
        return {**result, "extra_logs": extra_logs}

    return type(agent.__name__, (agent,), {"step": step})


def steps_collected(execute: Execute) -> Execute:
    """An agent's `execute`, whose response has the feedback of all steps: one text, and of each turn its own."""

    async def call(**given: Any) -> dict[str, Any]:
        steps: list[tuple[Any, Any]] = []
        _steps.set(steps)
        response = await execute(**given)
        if not steps:
            return response
        said = [feedback for feedback, _ in steps if feedback is not None]
        no_text = [feedback for feedback in said if not isinstance(feedback, str)]  # which the controller refuses
        collected = {
            FEEDBACK: no_text[0] if no_text else joined(said) or None,
            TURN_FEEDBACK: [feedback for _, feedback in steps],
        }
        return {**response, "extra_logs": collected | (response.get("extra_logs") or {})}

    return call


def failures_kept(execute: Execute) -> Execute:
    """An agent's `execute`, whose exceptions become a response without an action."""

    async def call(**given: Any) -> dict[str, Any]:
        try:
            response = await execute(**given)
            return {**response, **{name: _number(name, response.get(name)) for name in ("reward", "scores")}}
        except ConfigError:
            raise
        except Exception as error:
            if type(error).__name__.startswith("Engine"):  # vLLM's, not the agent's
                raise
            encoded = text_tokenizer(given["hf_tokenizer"])(given["prompt"], add_special_tokens=False)
            ids = encoded["input_ids"][-given["max_length"] :]
            return {
                "prompt": given["prompt"], "label": given["label"], "images": None, "mm_train_inputs": None,
                "reward": None, "scores": None, "observation_tokens": ids, "action_ranges": [], "truncated": False,
                "rollout_log_probs": None if given["sampling_params"].logprobs is None else [0.0] * len(ids),
                "extra_logs": {FAILURE: f"{type(error).__name__}: {error}\n{traceback.format_exc()}"},
            }  # fmt: skip

    return call


def _with_feedback(result: Any) -> dict[str, Any]:
    """What a reward function returned for one query, in OpenRLHF's terms.

    Raises TypeError or ValueError where it is none: OpenRLHF would go on without a reward, or with one that is NaN.
    """
    if not isinstance(result, dict) or result.get("rewards") is None:
        given = f"a dict with {', '.join(map(repr, result))}" if isinstance(result, dict) else type(result).__name__
        raise TypeError(f"expected a dict with 'rewards', one number per query, but {given} was returned")
    extra_logs = dict(result.get("extra_logs") or {})
    extra_logs = {name: _number(f"extra_logs[{name!r}]", value) for name, value in extra_logs.items()}
    if FEEDBACK in result:
        feedback = result[FEEDBACK]
        if isinstance(feedback, (list, tuple)) and len(feedback) == 1:  # one entry per query, like `rewards`
            feedback = feedback[0]
        extra_logs[FEEDBACK] = feedback
    numbers: dict[str, Any] = {name: _number(name, result[name]) for name in ("rewards", "scores") if name in result}
    return {**numbers, "extra_logs": extra_logs} if extra_logs else numbers


def _number(name: str, value: Any) -> float | None:
    """The one number in a scalar, a tensor or a list; None stays.

    Raises TypeError where there is not exactly one, ValueError where it is infinite or NaN.
    """
    given, value = value, value.tolist() if hasattr(value, "tolist") else value
    while isinstance(value, (list, tuple)) and len(value) == 1:
        (value,) = value
    if value is None:
        return None
    if not isinstance(value, (bool, int, float)):
        raise TypeError(f"{name} is {given!r:.200}; expected one number per query, and there is one query a call")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; expected a finite number")
    return float(value)
