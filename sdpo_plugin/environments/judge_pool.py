"""Judges of model output run in worker processes of their own, which can be killed.

A response may take for ever to evaluate (`9^{9^{9}}`), in one C call that holds the interpreter lock: in the engine's
process it would stop the engine, and no time limit could fire. A few workers serve a process; they start when they are
first needed, are reused, and import an environment but never torch. The limits of a judgement are below: a response
that meets one gets reward 0, and the feedback names it.

A worker that is idle ends with its parent: it reads the end of their connection. One that is busy ends with its time.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS = 3.0  # of CPU, so that a busy machine does not change a reward; most judgements take milliseconds
WALL = 60.0  # for what takes time without computing
START = 60.0  # of CPU, for the first judgement of an environment, which imports its libraries; not counted in SECONDS
MEMORY = 2 * 2**30  # bytes of address space
LENGTH = 1_000_000  # characters of a response; a part of a longer one would be another response
JUDGEMENTS = 5_000  # of a worker, which is then replaced: caches of parsers grow without bound
WORKERS = min(8, os.cpu_count() or 1)

COMMAND = (
    "import sys; sys.path[:] = sys.argv[2:]; from sdpo_plugin.environments.judge_pool import serve; "
    "serve(int(sys.argv[1]))"
)
Judge = Callable[[str, Any], tuple[float, str | None]]  # (response, label) -> reward, what was wrong or None
# Judgements must not depend on the order of a set's elements, and thread pools would reserve address space.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Worker:
    """A process that judges one response at a time."""

    def __init__(self) -> None:
        self.connection, end = Pipe()  # neither is inherited by any other process
        path = [*sys.path, str(Path(__file__).parents[2])]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", COMMAND, str(end.fileno()), *path], env=os.environ | ENVIRONMENT,
            pass_fds=[end.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        end.close()
        self.prepared: set[str] = set()
        self.left = JUDGEMENTS

    def ask(self, question: tuple[Any, ...], seconds: float) -> dict[str, Any] | None:
        """The answer to a question; None, and the process is gone, if there is none in this time."""
        with contextlib.suppress(EOFError, OSError):
            self.connection.send(question)
            if self.connection.poll(seconds):
                return json.loads(self.connection.recv_bytes())
        self.end()
        return None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.left = 0


class Pool:
    """Workers that judge for the threads of this process, at most `most` at a time."""

    def __init__(self, most: int, seconds: float = SECONDS) -> None:
        self.most, self.seconds = most, seconds
        self.forget()

    def forget(self) -> None:
        """In a fork, which has no part in the workers of its parent; nor may it keep their connections open."""
        for worker in getattr(self, "workers", ()):
            worker.connection.close()
        self.workers: set[Worker] = set()
        self.idle: list[Worker] = []
        self.free = threading.Semaphore(self.most)

    def judge(self, name: str, options: Mapping[str, Any], response: str, label: Any) -> tuple[float, str | None]:
        """What `make(**options)` of the environment `name` makes of a response: its reward, and what was wrong or None.

        Raises:
            ValueError: the label is none of the environment's.
            RuntimeError: the environment cannot judge anything here, for example because a library is missing.
        """
        if len(response) > LENGTH:
            return 0.0, f"The response is too long to be judged: {len(response)} characters; at most {LENGTH} are read."
        with self.free:
            with self._worker() as worker:
                answer = self._answer(worker, name, dict(options), response, label)
        if "label" in answer:
            raise ValueError(answer["label"])
        if "environment" in answer:
            raise RuntimeError(f"{name}.py cannot judge: {answer['environment']}")
        return answer["reward"], answer["feedback"]

    @contextlib.contextmanager
    def _worker(self) -> Iterator[Worker]:
        try:
            worker = self.idle.pop()
        except IndexError:
            worker = Worker()
            self.workers.add(worker)
        try:
            yield worker
        except BaseException:
            worker.left = 0
            raise
        finally:
            if worker.left > 0:
                self.idle.append(worker)
            else:
                worker.end()
                self.workers.discard(worker)

    def _answer(
        self, worker: Worker, name: str, options: dict[str, Any], response: str, label: Any
    ) -> dict[str, Any]:
        if (kind := f"{name} {options}") not in worker.prepared:
            if (ready := worker.ask((name, options, None, label, START), 2 * START)) is None:
                return {"environment": f"its process ended while it started, with code {worker.process.returncode}"}
            if ready:
                return ready
            worker.prepared.add(kind)
        answer = worker.ask((name, options, response, label, self.seconds), WALL)
        if answer is None:
            code = worker.process.returncode
            why = f"that takes more than {self.seconds:g} s" if code == -signal.SIGPROF else f"code {code}"
            return {"reward": 0.0, "feedback": f"The response could not be judged: {why}."}
        worker.left = 0 if answer.pop("spent", False) else worker.left - 1
        return answer


POOL = Pool(WORKERS)
os.register_at_fork(after_in_child=POOL.forget)


# ── in a worker ──


def serve(descriptor: int) -> None:
    """Answer questions until the other end is closed. A question without a response only prepares its environment."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the parent's
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, whatever it is doing
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    logging.disable()
    connection = Connection(descriptor)
    judges: dict[str, Judge] = {}
    with contextlib.suppress(EOFError):
        while True:
            name, options, response, label, seconds = connection.recv()
            kind = f"{name} {options}"
            signal.setitimer(signal.ITIMER_PROF, seconds)
            if response is None:
                answer = _prepared(judges, kind, name, options, label)
            else:
                answer = _judged(judges[kind], response, label)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(json.dumps(answer).encode())


def _prepared(judges: dict[str, Judge], kind: str, name: str, options: dict[str, Any], label: Any) -> dict[str, Any]:
    """Nothing, or why the environment cannot judge. Its libraries are imported: by `warm_up` and an empty response."""
    try:
        module = importlib.import_module(f"sdpo_plugin.environments.{name}")
        judges[kind] = module.make(**options).judge
        getattr(module, "warm_up", str)()
    except Exception as error:
        return {"environment": f"{type(error).__name__}: {error}"}
    answer = _judged(judges[kind], "", label)
    return answer if "environment" in answer else {}


def _judged(judge: Judge, response: str, label: Any) -> dict[str, Any]:
    try:
        reward, feedback = judge(response, label)
        return {"reward": float(reward), "feedback": feedback}
    except ImportError as error:
        return {"environment": f"{type(error).__name__}: {error}"}
    except MemoryError:
        feedback = "The response could not be judged: that takes too much memory."
        return {"reward": 0.0, "feedback": feedback, "spent": True}
    except Exception as error:
        if reason := _fault(judge, label):
            return {"label": reason}
        return {"reward": 0.0, "feedback": f"The response could not be judged ({type(error).__name__})."}


def _fault(judge: Judge, label: Any) -> str | None:
    """What is wrong with a label, or None: an empty response cannot be what makes a judge raise."""
    try:
        judge("", label)
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__} for the label {label!r:.200}: {error}"
    return None
