"""`--rollout.deterministic`: the same samples in every run, whatever was resumed and however many engines there are.

Each request has a seed of its own, from `--train.seed`, the step, the prompt's row and the sample's number, and the
engine to itself: a request's own random numbers are not enough, because what is computed beside it changes the last
bits of its logits, and now and then the token they select.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Any

from sdpo_plugin.config import ConfigError

_seed: ContextVar[tuple[int, ...] | None] = ContextVar("seed", default=None)  # of the request, per asyncio task


def add_argument(group: Any) -> None:
    group.add_argument(
        "--rollout.deterministic", action="store_true",
        help="the same samples in every run, whatever was resumed and however many engines there are: each request "
        "has a seed of its own, from --train.seed, step, prompt and sample, and the engine to itself (slow)",
    )


def reject(args: Any) -> None:
    if args.rollout.deterministic and args.train.async_enable:
        raise ConfigError(
            "--rollout.deterministic True: --train.async_enable samples while the weights change, which no seed "
            "repeats; leave one of them out"
        )


class Order:
    """On the controller: numbers the requests as they are sent, and puts the samples back into that order.

    Attributes:
        step: the global step that the next requests are for.
    """

    def __init__(self, args: Any) -> None:
        self.args, self.step, self.sent = args, 0, 0

    def stamp(self, requests: Sequence[Any]) -> None:
        if self.args.rollout.deterministic:
            for request in requests:
                self.sent += 1
                request.order, request.seed = self.sent, (self.args.train.seed, self.step, request.row)

    def restore(self, samples: list[Any]) -> None:
        """OpenRLHF keeps the order in which the engines finish."""
        if self.args.rollout.deterministic:
            samples.sort(key=lambda sample: sample.order)


async def one_by_one(
    generate: Callable[[], Awaitable[list[Any]]], seed: tuple[int, ...], num_samples: int
) -> list[Any]:
    """A request's samples, each from a call of `generate` under its own seed."""

    async def sample(number: int) -> Any:
        _seed.set((*seed, number))
        (response,) = await generate()
        return response

    return await asyncio.gather(*map(sample, range(num_samples)))


def seed_of_turn(prompt_token_ids: list[int]) -> int | None:
    """The seed to sample with after these tokens, whose number distinguishes an agent's turns; None: any."""
    seed = _seed.get()
    return None if seed is None else number_of(*seed, len(prompt_token_ids))


def number_of(*parts: int) -> int:
    """A 63-bit seed from numbers, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
