"""The rollout engine's side: where a sample came from and its reward function's words find the way back."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from sdpo_plugin.config import ConfigError, RewardConfig
from sdpo_plugin.distillation.images import media_tokens
from sdpo_plugin.distillation.prompts import text_tokenizer
from sdpo_plugin.environments.feedback import know
from sdpo_plugin.openrlhf_adapter.engine import deterministic, scoring
from sdpo_plugin.openrlhf_adapter.engine.agents import Execute, hosted, played
from sdpo_plugin.openrlhf_adapter.engine.calls import (
    FAILURE,
    FEEDBACK,
    LIMIT,
    TURN_FEEDBACK,
    described,
    number,
    numbers,
    printable,
    tried,
    use_threads,
    within,
)
from sdpo_plugin.openrlhf_adapter.engine.calls import reward_config as _reward
from sdpo_plugin.openrlhf_adapter.failures import RewardError
from sdpo_plugin.openrlhf_adapter.patch_points import overrides, patch_point

REQUEST = "request"  # key of a response: the `Request` it answers

Fetch = Callable[..., Awaitable[list[dict[str, Any]]]]

# Of the request being served, per asyncio task: the tokens to sample after, the prompt they replace, and the length of
# what OpenRLHF left of the prompt.
_shown: ContextVar[list[int] | None] = ContextVar("shown", default=None)
_own: ContextVar[list[int]] = ContextVar("own")
_replaced: ContextVar[int | None] = ContextVar("replaced", default=None)
# Of a call of a reward server, per asyncio task: what OpenRLHF logged about its requests, each of which it swallows.
_said: ContextVar[list[str] | None] = ContextVar("said", default=None)


@dataclass
class Request:
    """What the controller gets back with a sample, and how an engine is to sample it.

    Attributes:
        dataset, row: `id` of the dataset in the controller's process, and the row of the prompt in it.
        shown: token ids to sample after in place of the prompt's own, or None.
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
    """A prompt's text on its way to an engine, with its `Request`: OpenRLHF passes nothing else on from a dataset.

    Reward functions and agents are given the text alone, a plain `str`.
    """

    request: Request


_AGENT = "openrlhf.utils.agent:SingleTurnAgentExecutor"
_FETCHES = ("_fetch_rewards_via_func", "_fetch_rewards_via_http")
SingleTurnAgentExecutor = patch_point(_AGENT)
for _name in _FETCHES:
    patch_point(f"{_AGENT}.{_name}", "queries_list", "prompts_list", "labels_list")
MultiTurnAgentExecutor = patch_point("openrlhf.utils.agent:MultiTurnAgentExecutor")
patch_point("openrlhf.utils.agent:MultiTurnAgentExecutor.__init__", "agent_instance_cls")
_agent_logger = patch_point("openrlhf.utils.agent:logger")
RolloutRayActor: Any = patch_point("openrlhf.trainer.ray.vllm_engine:RolloutRayActor")


class Engine(RolloutRayActor):
    """vllm_engine.py: `RolloutRayActor`."""

    async def __init__(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[misc]  # Ray awaits it
        kwargs["max_logprobs"] = -1  # a bound on requests alone; OpenRLHF's is 1, and a live teacher's top-k are more
        try:
            await super().__init__(*args, **kwargs)
        except SystemExit as error:  # of the user's file: Ray would take it for the engine's wish
            file = kwargs.get("agent_func_path") or kwargs.get("remote_rm_url")
            raise RewardError(f"{file}: {described(error)}") from error
        if isinstance(self.executor, SingleTurnAgentExecutor):
            _agent_logger.addFilter(_overheard)
            rewards_kept(self.executor)
        else:
            self.executor.execute = failures_kept(played(self.executor.execute))
            if isinstance(self.executor, MultiTurnAgentExecutor):
                self.executor.agent_instance_cls = hosted(self.executor.agent_instance_cls)
        self.alone = asyncio.Lock()
        self.never: dict[int, float] = {}  # the logit bias of tokens that must not be sampled

    @overrides("prompt", "num_samples")
    async def generate_responses(self, prompt: Prompt, num_samples: int = 1, **kwargs: Any) -> list[dict[str, Any]]:
        text, request = str(prompt), prompt.request
        know(text_tokenizer(kwargs["hf_tokenizer"]))
        # A sampled image token would stand for an image that is not there, which ends the training step.
        self.never = {token: -100.0 for token in media_tokens(kwargs["hf_tokenizer"])}
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
                        "prompt was to be sampled after; let it return the prompt, or leave out "
                        "--distill.generate_from_teacher (or the plugin's openrlhf_generation_prompt)"
                    )
                _replaced.set(len(prompt_token_ids))  # an agent's later turns follow the same prompt
            prompt_token_ids = [*shown, *prompt_token_ids[_replaced.get() :]]
        if self.never:
            sampling_params = sampling_params.clone()
            sampling_params.logit_bias = {**(sampling_params.logit_bias or {}), **self.never}
        if (seed := deterministic.seed_of_turn(prompt_token_ids)) is None:
            return await super().generate(prompt_token_ids, sampling_params, **kwargs)
        sampling_params = sampling_params.clone()
        sampling_params.seed = seed
        async with self.alone:
            return await super().generate(prompt_token_ids, sampling_params, **kwargs)

    async def score(self, *request: Any) -> Any:
        """A live teacher's scores, see `scoring.score`."""
        return await scoring.score(self, *request)


def rewards_kept(executor: Any) -> None:
    """Let OpenRLHF's single-turn executor fetch rewards through `feedback_and_failures_kept`."""
    at_a_time = asyncio.Semaphore(min(32, (os.cpu_count() or 1) + 4))  # as many as asyncio has threads, as OpenRLHF
    func, http = (getattr(executor, name) for name in _FETCHES)
    executor._fetch_rewards_via_func = feedback_and_failures_kept(func, at_a_time)
    executor._fetch_rewards_via_http = feedback_and_failures_kept(http)  # waiting for a server takes no thread


def feedback_and_failures_kept(fetch: Fetch, at_a_time: asyncio.Semaphore | None = None) -> Fetch:
    """`fetch` with `feedback` moved to `extra_logs`, with the attempts and the timeout of the request.

    What it raises, OpenRLHF swallows: here it becomes data, one line and the traceback. `at_a_time` bounds how many
    calls are made at once.
    """

    async def results(*query: list[Any]) -> list[dict[str, Any]]:
        return [_with_feedback(result) for result in await fetch(*query)]

    async def call(queries: list[str], prompts: list[str], labels: list[Any]) -> list[dict[str, Any]]:
        config, failure = _reward.get(RewardConfig()), ""
        use_threads()
        async for _ in tried(config):
            said: list[str] = []
            _said.set(said)
            try:
                async with at_a_time or nullcontext():
                    return await within(config.timeout, results(queries, prompts, labels))
            except Exception as error:
                failure = described(error, _last(said))
        return [{"extra_logs": {FAILURE: failure}} for _ in queries]

    return call


def _overheard(record: logging.LogRecord) -> bool:
    """A filter that lets everything pass, and notes it for the call that it is about."""
    if (said := _said.get()) is not None:
        said.append(record.getMessage())
    return True


def _last(said: list[str]) -> str:
    return f" ({said[-1]})" if said else ""


def failures_kept(execute: Execute) -> Execute:
    """An agent's `execute`, with the attempts of the request. Its exceptions become a response without an action.

    The whole trajectory is tried again, with another instance of the agent: of a failed step it is unknown how much of
    it the environment has done.
    """

    async def call(**given: Any) -> dict[str, Any]:
        config, failure = _reward.get(RewardConfig()), ""
        async for _ in tried(config):
            try:
                response = await within(None, execute(**given))
                return {**response, **_outcome(response)}
            except ConfigError:
                raise
            except Exception as error:
                if type(error).__name__.startswith("Engine"):  # vLLM's, not the agent's
                    raise
                failure = described(error)
        encoded = text_tokenizer(given["hf_tokenizer"])(given["prompt"], add_special_tokens=False)
        ids = encoded["input_ids"][-given["max_length"] :]
        return {
            "prompt": given["prompt"], "label": given["label"], "images": None, "mm_train_inputs": None,
            "reward": None, "scores": None, "observation_tokens": ids, "action_ranges": [], "truncated": False,
            "rollout_log_probs": None if given["sampling_params"].logprobs is None else [0.0] * len(ids),
            "extra_logs": {FAILURE: failure},
        }  # fmt: skip

    return call


def _outcome(response: dict[str, Any]) -> dict[str, Any]:
    """Rewards and `extra_logs` of an agent's response, in OpenRLHF's terms. Raises as `number` and `numbers` do."""
    extra_logs = response.get("extra_logs") or {}
    texts = {name: extra_logs[name] for name in (FEEDBACK, TURN_FEEDBACK, LIMIT) if name in extra_logs}
    logs = numbers({name: value for name, value in extra_logs.items() if name not in texts})
    return {"extra_logs": logs | texts, **{name: number(name, response.get(name)) for name in ("reward", "scores")}}


def _with_feedback(result: Any) -> dict[str, Any]:
    """What a reward function returned for one query, in OpenRLHF's terms.

    Raises TypeError or ValueError where it is not: OpenRLHF would continue without a reward, or with one that is NaN.
    """
    if not isinstance(result, dict) or result.get("rewards") is None:
        given = f"a dict with {', '.join(map(repr, result))}" if isinstance(result, dict) else type(result).__name__
        raise TypeError(f"expected a dict with 'rewards', one number per query, but {given} was returned")
    extra_logs: dict[str, Any] = {**numbers(result.get("extra_logs"))}
    if FEEDBACK in result:
        feedback = result[FEEDBACK]
        if isinstance(feedback, (list, tuple)) and len(feedback) == 1:  # one entry per query, like `rewards`
            feedback = feedback[0]
        extra_logs[FEEDBACK] = printable(feedback)
    found: dict[str, Any] = {name: number(name, result[name]) for name in ("rewards", "scores") if name in result}
    return {**found, "extra_logs": extra_logs} if extra_logs else found
