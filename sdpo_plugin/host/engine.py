"""The rollout engine's side: a reward function's words and failures survive the way back to the controller."""

from __future__ import annotations

import asyncio
import hashlib
import traceback
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from openrlhf.trainer.ray import vllm_engine
from openrlhf.utils.agent import SingleTurnAgentExecutor

from sdpo_plugin.host.seams import plain_class

# Keys of a response's `extra_logs`, the one dictionary that the host passes on as it is.
FEEDBACK = "feedback"
FAILURE = "reward_failure"

Fetch = Callable[..., Awaitable[list[dict[str, Any]]]]


# Of the request being served, per asyncio task: what to sample behind, and the length of the prompt it stands for.
_shown: ContextVar[list[int] | None] = ContextVar("shown", default=None)
_replaced: ContextVar[int | None] = ContextVar("replaced", default=None)
_seed: ContextVar[tuple[int, ...] | None] = ContextVar("seed", default=None)


def number_of(*parts: int) -> int:
    """A 63-bit seed from numbers, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class Prompt(str):
    """A prompt's text that remembers its data-set row. The engines pass prompts through and echo them.

    Attributes:
        split, row: where the row is.
        shown: token ids to sample behind in place of this prompt's own, or None.
        seed: numbers that a sample's own seed is made of, or None (`--rollout.deterministic`).
        order: position among the prompts sent out so far.
    """

    split: int
    row: int
    shown: list[int] | None = None
    seed: tuple[int, ...] | None = None
    order: int = 0


RolloutRayActor = plain_class(vllm_engine.RolloutRayActor)


class Engine(RolloutRayActor):
    """vllm_engine.py: `RolloutRayActor`. Agents give feedback as `extra_logs["feedback"]` themselves."""

    async def __init__(self, *args: Any, **kwargs: Any) -> None:
        await super().__init__(*args, **kwargs)
        if isinstance(self.executor, SingleTurnAgentExecutor):
            for name in ("_fetch_rewards_via_func", "_fetch_rewards_via_http"):
                setattr(self.executor, name, keep_words(getattr(self.executor, name)))
        self.alone = asyncio.Lock()

    async def generate_responses(self, prompt: str, num_samples: int = 1, **kwargs: Any) -> list[dict[str, Any]]:
        _shown.set(getattr(prompt, "shown", None))
        seed = getattr(prompt, "seed", None)
        if seed is None:
            return await super().generate_responses(prompt=prompt, num_samples=num_samples, **kwargs)

        async def one(sample: int) -> dict[str, Any]:
            _seed.set((*seed, sample))
            (response,) = await RolloutRayActor.generate_responses(self, prompt=prompt, num_samples=1, **kwargs)
            return response

        return await asyncio.gather(*map(one, range(num_samples)))

    async def generate(self, prompt_token_ids: list[int], sampling_params: Any, **kwargs: Any) -> Any:
        if (shown := _shown.get()) is not None:
            if _replaced.get() is None:
                _replaced.set(len(prompt_token_ids))  # an agent's later turns come behind the same prompt
            prompt_token_ids = [*shown, *prompt_token_ids[_replaced.get() :]]
        if (seed := _seed.get()) is None:
            return await super().generate(prompt_token_ids, sampling_params, **kwargs)
        # A request's own random numbers are not enough: what is computed beside it changes the last bits of its
        # logits, and now and then the token they select.
        sampling_params = sampling_params.clone()
        sampling_params.seed = number_of(*seed, len(prompt_token_ids))  # the length tells an agent's turns apart
        async with self.alone:
            return await super().generate(prompt_token_ids, sampling_params, **kwargs)


def keep_words(fetch: Fetch) -> Fetch:
    """`fetch` with `feedback` moved to `extra_logs`, and an exception, which the host swallows, turned into data."""

    async def call(queries: list[str], prompts: list[str], labels: list[Any]) -> list[dict[str, Any]]:
        try:
            results = await fetch(queries, prompts, labels)
            return [_with_feedback(result) for result in results]
        except Exception:
            return [{"extra_logs": {FAILURE: traceback.format_exc()}} for _ in queries]

    return call


def _with_feedback(result: dict[str, Any]) -> dict[str, Any]:
    if FEEDBACK not in result:
        return result
    feedback = result[FEEDBACK]
    if isinstance(feedback, (list, tuple)) and len(feedback) == 1:  # one entry per query, like `rewards`
        feedback = feedback[0]
    extra_logs = {**(result.get("extra_logs") or {}), FEEDBACK: feedback}
    return {**{k: v for k, v in result.items() if k != FEEDBACK}, "extra_logs": extra_logs}
