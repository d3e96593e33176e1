"""Calls of a user's code in an engine, reward functions and agents: how often, how long, what they raise and return."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import traceback
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

from sdpo_plugin.config import RewardConfig

# Keys of a response's `extra_logs`, the one dictionary that OpenRLHF passes on as it is.
FEEDBACK = "feedback"
TURN_FEEDBACK = "turn_feedback"
FAILURE = "reward_failure"
LIMIT = "trajectory_limit"

MAX_THREADS = 4096
MAX_MESSAGE, MAX_TRACE = 2_000, 20_000  # characters


# Of the request being served, per asyncio task: what to do when its reward function or agent fails.
reward_config: ContextVar[RewardConfig] = ContextVar("reward")


class NoAnswer(Exception):
    """A call took longer than `--reward.timeout`; a second line and all further ones are where it stands."""


class Uncarried(Exception):
    """Raised from an exception that asyncio does not pass on to the code that awaits it.

    A future rejects StopIteration, so code that awaits it would wait forever. SystemExit and KeyboardInterrupt end the
    event loop, and with it the engine. CancelledError cancels the waiting code. A timeout of `concurrent.futures` is
    replaced by asyncio's own, which has no traceback.
    """


UNCARRIED = (StopIteration, concurrent.futures.CancelledError, concurrent.futures.TimeoutError)


class Threads(ThreadPoolExecutor):
    """Threads for an event loop's `asyncio.to_thread`, which report every exception."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        return super().submit(_carried, fn, *args, **kwargs)


def _carried(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    try:
        return fn(*args, **kwargs)
    except BaseException as error:
        if isinstance(error, UNCARRIED) or not isinstance(error, Exception):
            raise Uncarried from error
        raise


_with_threads: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


def use_threads() -> None:
    """Let the running event loop use `Threads`, for good.

    A thread that never returns is abandoned, so there are more of them than may work at a time.
    """
    loop = asyncio.get_running_loop()
    if loop not in _with_threads:
        loop.set_default_executor(Threads(MAX_THREADS))
        _with_threads.add(loop)


async def tried(config: RewardConfig) -> AsyncIterator[int]:
    """0, 1, ... up to `--reward.max_attempts` times, with 1, 2, 4, ... s between them."""
    for attempt in range(config.max_attempts):
        if attempt:
            await asyncio.sleep(2.0 ** (attempt - 1))
        yield attempt


async def within(seconds: float | None, call: Awaitable[Any]) -> Any:
    """What `call` returns or raises. One that is not done in time is cancelled, and abandoned if it continues.

    Raises NoAnswer then.
    """
    task = asyncio.ensure_future(carried(call))
    try:
        # Not `asyncio.wait_for`: it waits for as long as the call disregards that it is cancelled.
        if not (await asyncio.wait({task}, timeout=seconds))[0]:
            raise NoAnswer(no_answer(seconds or 0.0))
        if task.cancelled():  # by itself
            raise Uncarried from asyncio.CancelledError()
        return task.result()
    finally:
        task.cancel()


async def carried(call: Awaitable[Any]) -> Any:
    """`call`, for a task. Cancellation passes through to the code that cancelled the task."""
    try:
        return await call
    except (SystemExit, KeyboardInterrupt) as error:
        raise Uncarried from error


def no_answer(seconds: float) -> str:
    return f"no answer within {seconds:g} s (--reward.timeout)"


def described(error: BaseException, said: str = "") -> str:
    """An exception as name and message, further information `said`, and on further lines the traceback."""
    if isinstance(error, NoAnswer):
        first, _, rest = str(error).partition("\n")
        return str(printable(f"{first}{said}" + (f"\n{rest}" if rest else "")))
    if isinstance(error, Uncarried) and error.__cause__ is not None:
        error = error.__cause__
    try:
        message = f": {error!s:.{MAX_MESSAGE}}" if str(error) else ""
    except Exception:
        message = ": (its message cannot be read)"
    trace = traceback.format_exception(type(error), error, error.__traceback__)
    lines = "\n".join(part[:MAX_MESSAGE].rstrip() for part in trace)
    return str(printable(f"{type(error).__name__}{message}{said}\n{lines[-MAX_TRACE:]}\n"))


def printable(text: Any) -> Any:
    """A text without lone surrogates, which neither a file nor a tokenizer takes; anything else as it is."""
    return text.encode("utf-8", "backslashreplace").decode() if isinstance(text, str) else text


def number(name: str, value: Any) -> float | None:
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


def numbers(extra_logs: Any) -> dict[str, float]:
    """The entries of `extra_logs` that have a number. Raises as `number` does; TypeError for anything but a dict."""
    if extra_logs is not None and not isinstance(extra_logs, dict):
        raise TypeError(f"extra_logs is {extra_logs!r:.200}; expected a dict with a number, or None, for each name")
    found = {str(name): number(f"extra_logs[{name!r}]", value) for name, value in (extra_logs or {}).items()}
    return {name: value for name, value in found.items() if value is not None}
