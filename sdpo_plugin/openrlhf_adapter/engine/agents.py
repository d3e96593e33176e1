"""The trajectories of an engine's agents: whose code runs where, for how long, and in how many turns.

OpenRLHF runs an agent's code in the event loop that serves the engine. Here it runs in a loop of its own, so that code
that blocks (`time.sleep`, a computation) stalls no engine, and so that it can be left behind when it never returns.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from sdpo_plugin.distillation.context import joined
from sdpo_plugin.distillation.images import placeholders
from sdpo_plugin.openrlhf_adapter.engine.calls import (
    FEEDBACK,
    LIMIT,
    TURN_FEEDBACK,
    NoAnswer,
    Threads,
    Uncarried,
    carried,
    no_answer,
    number,
    printable,
    reward_config,
)
from sdpo_plugin.openrlhf_adapter.patch_points import patch_point

PROMPT_S = 1.0  # a loop in which nothing takes its time answers sooner
HELD_S = 10.0  # a loop is given up when a call that is overdue has not let go of it for so long
CHARACTERS = 128  # of a token: more than the longest that vocabularies have
MAX_TURNS, MAX_TOKENS = "--reward.max_turns", "--data.max_len"
BLOCKS = "; it blocks the event loop of the agents: await what takes time, as with asyncio.to_thread"

patch_point("openrlhf.utils.agent:AgentInstanceBase.reset")
patch_point("openrlhf.utils.agent:AgentInstanceBase.step")
Execute = Callable[..., Awaitable[dict[str, Any]]]  # of an agent's executor


class Step(NamedTuple):
    """A step's feedback on the whole trajectory and on its own turn, and the limit that ended the trajectory."""

    feedback: Any
    turn_feedback: Any
    limit: str


@dataclass
class Trajectory:
    """One that is being played; `max_length` is `--data.max_len`, and `placeholders` stand for an image in a text."""

    max_length: int
    placeholders: Sequence[str] = ()
    steps: list[Step] = field(default_factory=list)


_trajectory: ContextVar[Trajectory] = ContextVar("trajectory")  # per asyncio task of the engine
_agent: ContextVar[Agent | None] = ContextVar("agent", default=None)  # per asyncio task of an `AgentLoop`


class Displaced(Exception):
    """The agent of another trajectory has blocked the loop that this one's lives in: it is to be played again."""


class AgentLoop:
    """An event loop in a thread, in which agents live until one of them blocks it.

    Attributes:
        lost: a future of the engine's loop; once it is given up, the agent that blocks it (or None, where nobody
            knows) and the message.
    """

    def __init__(self) -> None:
        self.lost: asyncio.Future[tuple[Agent | None, str]] = asyncio.get_running_loop().create_future()
        self.holding: tuple[asyncio.Task[Any] | None, float] | None = None  # the task that has not let go, since when
        self.agents: weakref.WeakKeyDictionary[asyncio.Task[Any], Agent | None] = weakref.WeakKeyDictionary()
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(Threads())
        self.loop.set_task_factory(self._task)
        self.thread = threading.Thread(target=self._run, name="agents", daemon=True)
        self.thread.start()

    async def call(self, agent: Agent, seconds: float, method: str, *args: Any, **kwargs: Any) -> Any:
        """What the agent's method returns or raises.

        Raises NoAnswer where it takes longer than `seconds`, and Displaced where the loop is lost through another.
        """
        _agent.set(agent)
        running = asyncio.run_coroutine_threadsafe(carried(agent.timed(method, *args, **kwargs)), self.loop)
        answer, wait = asyncio.wrap_future(running), seconds
        try:
            while True:
                await asyncio.wait({answer, self.lost}, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                if answer.cancelled():  # by itself
                    raise Uncarried from asyncio.CancelledError()
                if answer.done():
                    return answer.result()
                if not self.lost.done():
                    wait = await self._more_time(agent, seconds)
                if self.lost.done():
                    blocking, message = self.lost.result()
                    raise NoAnswer(message) if blocking in (agent, None) else Displaced
        finally:
            running.cancel()

    async def _more_time(self, agent: Agent, seconds: float) -> float:
        """How long to wait on for an agent that has been waited for.

        Raises NoAnswer where the agent has had its time. Gives the loop up where a task does not let go of it; many
        that hold it for a while, one after the other, make all of them wait.
        """
        pong: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.loop.call_soon_threadsafe(pong.set_result, None)
        if (await asyncio.wait({asyncio.wrap_future(pong)}, timeout=PROMPT_S))[0]:
            # First come, first served: the call that is waited for has had its turn, and may be over.
            self.holding = None
            left = seconds - agent.seconds()
            if left > 0:
                return left
            raise NoAnswer(no_answer(seconds))
        task = asyncio.current_task(self.loop)
        if self.holding is None or self.holding[0] is not task:
            self.holding = task, time.monotonic()
        held = time.monotonic() - self.holding[1]
        blocking = self.agents.get(task) if task is not None else None
        overdue = blocking is not None and blocking.seconds() >= seconds
        if held >= seconds or overdue and held >= HELD_S:
            frame = sys._current_frames().get(self.thread.ident or 0)
            stack = "".join(traceback.format_stack(frame)) if frame else ""
            if not self.lost.done():
                self.lost.set_result((blocking, f"{no_answer(seconds)}{BLOCKS}\n{stack}"))
            self.loop.call_soon_threadsafe(self.loop.stop)  # should it ever come back
        return 0.0  # it was waited for here

    def _task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        """The loop's task factory, which notes whose the task is: that of the agent, and what it starts."""
        task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
        self.agents[task] = _agent.get()
        return task

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        while not self.lost.done():
            # A task that an agent has started may raise these; the code that awaits it gets them.
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self.loop.run_forever()


class Agent:
    """Stands for an instance of a user's class, which is made by `make` and called in an `AgentLoop`.

    Attributes:
        began: when the running call was given its first turn, else None.
    """

    def __init__(self, make: Callable[[], Any], home: AgentLoop) -> None:
        self.make, self.home = make, home
        self.agent: Any = None
        self.began: float | None = None

    def seconds(self) -> float:
        """How long its call has been going on."""
        return 0.0 if self.began is None else time.monotonic() - self.began

    async def timed(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """In its `AgentLoop`: what the instance's method returns."""
        self.began = time.monotonic()
        try:
            if self.agent is None:
                self.agent = self.make()
            return await getattr(self.agent, method)(*args, **kwargs)
        finally:
            self.began = None

    async def reset(self, *args: Any, **kwargs: Any) -> Any:
        return await self.home.call(self, reward_config.get().timeout, "reset", *args, **kwargs)

    async def step(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Notes the step's feedback: OpenRLHF keeps the last one's `extra_logs` only. Ends at `--reward.max_turns`."""
        trajectory, config = _trajectory.get(), reward_config.get()
        result = _checked(await self.home.call(self, config.timeout, "step", *args, **kwargs))
        extra_logs = dict(result.get("extra_logs") or {})
        limit = "" if result["done"] else f"{MAX_TOKENS} {trajectory.max_length}"  # unless another turn follows
        if limit and len(trajectory.steps) + 1 == config.max_turns:
            limit = f"{MAX_TURNS} {config.max_turns}"
        feedback, of_turn = (printable(extra_logs.pop(name, None)) for name in (FEEDBACK, TURN_FEEDBACK))
        trajectory.steps.append(Step(feedback, of_turn, limit))
        # OpenRLHF truncates what does not fit, but only after the engine's event loop has tokenized all of it.
        observation = printable(result["environment_feedback"][: CHARACTERS * trajectory.max_length])
        if not result.get("environment_images"):
            for placeholder in trajectory.placeholders:  # mark-up without an image would end the training step
                observation = observation.replace(placeholder, f"{placeholder[0]} {placeholder[1:]}")
        done = result["done"] or limit.startswith(MAX_TURNS)
        return {**result, "environment_feedback": observation, "extra_logs": extra_logs, "done": done}


def _checked(result: Any) -> dict[str, Any]:
    """A step's result, with its reward as a tensor. Raises TypeError or ValueError for what OpenRLHF cannot read."""
    needed = ("rewards", "environment_feedback", "done")
    if not isinstance(result, dict) or "done" not in result or any(result.get(name) is None for name in needed[:2]):
        given = f"a dict with {', '.join(map(repr, result))}" if isinstance(result, dict) else type(result).__name__
        raise TypeError(f"expected a dict with {', '.join(map(repr, needed))}, but step() returned {given}")
    if not isinstance(result["environment_feedback"], str):
        raise TypeError(f"environment_feedback is {result['environment_feedback']!r:.200}; expected text")
    if not isinstance(result.get("extra_logs") or {}, dict):
        raise TypeError(f"extra_logs is {result['extra_logs']!r:.200}; expected a dict")
    return {**result, "rewards": torch.tensor(number("rewards", result["rewards"]), dtype=torch.float64)}


def hosted(agent: type[Any]) -> Callable[..., Agent]:
    """What makes instances of an agent's class, all of them in one `AgentLoop` until it is lost."""
    home: AgentLoop | None = None

    def make(*args: Any, **kwargs: Any) -> Agent:
        nonlocal home
        if home is None or home.lost.done():
            home = AgentLoop()
        return Agent(lambda: agent(*args, **kwargs), home)

    return make


def played(execute: Execute) -> Execute:
    """An agent's `execute`, whose response has the feedback of all steps: one text, and of each turn its own.

    `LIMIT` is the flag at whose limit the trajectory ended, "" where its agent ended it.
    """

    async def call(**given: Any) -> dict[str, Any]:
        while True:
            _trajectory.set(trajectory := Trajectory(given["max_length"], placeholders(given["hf_tokenizer"])))
            try:
                # OpenRLHF counts down the tokens that are left in the one object of all trajectories of a prompt.
                response = await execute(**{**given, "sampling_params": copy.deepcopy(given["sampling_params"])})
            except Displaced:
                continue
            return {**response, **_noted(response, trajectory.steps)} if trajectory.steps else response

    return call


def _noted(response: dict[str, Any], steps: list[Step]) -> dict[str, Any]:
    said = [step.feedback for step in steps if step.feedback is not None]
    no_text = [feedback for feedback in said if not isinstance(feedback, str)]  # which the controller rejects
    collected = {
        FEEDBACK: no_text[0] if no_text else joined(said) or None,
        TURN_FEEDBACK: [step.turn_feedback for step in steps],
        LIMIT: steps[-1].limit,
    }
    truncated = response.get("truncated") or steps[-1].limit.startswith(MAX_TURNS)
    return {"truncated": truncated, "extra_logs": collected | (response.get("extra_logs") or {})}
