"""Runs inside the sandbox, as its first process: starts the program once for each input, and writes what came of it.

It meets the program and its inputs, never an expected output. It is sent as code, without this package, and imports for
itself what costs little: signal and traceback would take longer than most programs.
"""

import atexit
import ctypes
import os
import resource
import select
import sys
import time

SIGKILL, SIGXCPU, OUT_OF_MEMORY = 9, 24, 77
DIE_WITH_PARENT, SET_DUMPABLE, NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 1, 4, 38, 22, 2
SHOWN = 4000  # bytes of an error
FILES = 10_000  # in /tmp: each takes memory, the empty ones too, and its size does not bound their number


def main(job: dict) -> None:
    """Writes `END LENGTH LENGTH\\n`, output and error for each input. job: see `sandbox.run`."""
    try:  # where memory runs out, it is not the trainer that the kernel ends
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass
    if job["uid"]:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    prctl(SET_DUMPABLE, 0)  # its memory and files are closed to the program, which has the same user
    result = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.setrecursionlimit(50_000)  # as LiveCodeBench does; Python 3.10 needs the larger stack for it
    getattr(sys, "set_int_max_str_digits", int)(50_000)  # as LiveCodeBench does
    modules = {name: __import__(module) for name, module in job["prelude"]}
    space = {name: module if name == module.__name__ else getattr(module, name) for name, module in modules.items()}
    if job["function"]:
        import json  # noqa: F401  here, so that not every process does it
    for text in job["inputs"]:
        end, output, error = perform(job, space, text)
        data = b"%s %d %d\n%s%s" % (end.encode(), len(output), len(error), output, error)
        while data:
            data = data[os.write(result, data) :]
        if end != "ok" and job["stop"]:
            break


def perform(job: dict, space: dict, text: bytes) -> tuple[str, bytes, bytes]:
    """How the program ended for this input, what it printed or returned, and its error, the last two as bytes."""
    given = os.memfd_create("in")
    left = memoryview(text)
    while left:
        left = left[os.write(given, left) :]
    os.lseek(given, 0, 0)
    pipes = [os.pipe() for _ in range(3)]  # stdout, stderr, and one for the result of a function or an exception
    pid = os.fork()
    if pid == 0:
        child(job, space, text, [given, *(write for _, write in pipes)])
    for fd in (given, *(write for _, write in pipes)):
        os.close(fd)
    (stdout, stderr, returned), end, code = watch(pid, [read for read, _ in pipes], job["limits"], job["isolated"])
    for read, _ in pipes:
        os.close(read)
    if end is None:
        end = "ok" if code == 0 else "memory" if code == OUT_OF_MEMORY or b"MemoryError" in stderr else (
            "time" if code == -SIGXCPU else "error" if code > 0 else "died")  # fmt: skip
    if end == "ok":
        return end, returned if job["function"] else stdout, b""
    error = returned or b"".join(line for line in stderr.splitlines(keepends=True) if b"<driver>" not in line)
    return end, b"" if job["function"] else stdout[: job["limits"]["output"]], error[-SHOWN:]


def watch(pid: int, fds: list[int], limits: dict, isolated: bool) -> tuple[list[bytes], str | None, int]:
    """What was written to each of `fds` until the process ended or met a limit, that limit or None, the exit code.

    Of the second, stderr, only the end is kept. When our stdin ends, who started us has gone, and so do we.
    """
    parts, open_, end = {fd: bytearray() for fd in fds}, set(fds), None
    deadline, status = time.monotonic() + limits["seconds"], None
    while open_ and end is None:
        for fd in select.select([0, *open_], [], [], max(0.0, min(0.05, deadline - time.monotonic())))[0]:
            if fd == 0:
                os._exit(1)
            data = os.read(fd, 65536)
            parts[fd] += data
            if not data:
                open_.discard(fd)
            elif fd == fds[1]:
                del parts[fd][:-SHOWN]
            elif len(parts[fd]) > limits["output"]:
                end = "output"
        if isolated and files() > FILES:
            end = "memory"
        if time.monotonic() >= deadline:
            end = end or "time"
    while status is None and end is None:  # it has ended, or closed its output and continues
        ended, found = os.waitpid(pid, os.WNOHANG)
        status = found if ended else None
        if status is None and time.monotonic() >= deadline:
            end = "time"
        elif status is None:
            time.sleep(0.0005)
    if status is None:
        os.kill(pid, SIGKILL)
        status = os.waitpid(pid, 0)[1]
    return [bytes(parts[fd]) for fd in fds], end, os.waitstatus_to_exitcode(status)


def files() -> int:
    """How many there are in /tmp, a file system of the sandbox."""
    found = os.statvfs("/tmp")
    return found.f_files - found.f_ffree


def child(job: dict, space: dict, text: bytes, fds: list[int], leave=os._exit, write=os.write) -> None:
    """The program's own process: `fds` become its stdin, stdout, stderr and 3. Never returns."""
    code = 1
    try:
        os.setsid()
        high = [os.dup2(fd, 100 + i) for i, fd in enumerate(fds)]
        for new, old in enumerate(high):
            os.dup2(old, new)
        os.closerange(4, 128)
        if job["function"]:  # what it prints does not count
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        prctl(DIE_WITH_PARENT, SIGKILL)
        prctl(SET_DUMPABLE, 1)
        limit(job)
        refuse_calls(job["filter"])
        code, returned = attempt(job, space, text)
        while returned:
            returned = returned[write(3, returned) :]
    except MemoryError:
        code = OUT_OF_MEMORY
    finally:
        leave(code)


def limit(job: dict) -> None:
    """The limits of this process. Inputs count on top: they were in its memory before it began."""
    limits = job["limits"]
    memory = limits["memory"] + sum(map(len, job["inputs"]))
    values = [("AS", memory), ("FSIZE", limits["file"]), ("NOFILE", 64), ("CORE", 0), ("STACK", 1 << 27),
              ("CPU", int(limits["seconds"]) + 2)]  # fmt: skip
    if job["count"]:
        values.append(("NPROC", limits["processes"]))
    for name, value in values:
        kind = getattr(resource, "RLIMIT_" + name)
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))


def refuse_calls(steps: bytes) -> None:
    """Install the filter of system calls, for this process and its threads."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]

    program = Program(len(steps) // 8, steps)
    prctl(NO_NEW_PRIVILEGES, 1)
    prctl(SET_SECCOMP, FILTER, ctypes.addressof(program))


def prctl(*numbers: int) -> None:
    """Raises OSError where the kernel does not allow it."""
    words = [ctypes.c_ulong(number) for number in (*numbers, 0, 0, 0, 0)[:5]]
    if ctypes.CDLL(None).prctl(*words):
        raise OSError(f"prctl{numbers} failed")


def attempt(job: dict, space: dict, text: bytes) -> tuple[int, bytes]:
    """Run the program and, if one is given, its function; its exit code, and its result or exception as text."""
    name = job["function"]
    # A function's module is not the main one: code below `if __name__ == "__main__"` is not run.
    module = type(sys)("program" if name else "__main__")
    vars(module).update(space, exit=sys.exit, quit=sys.exit)  # these are of site, which is not loaded
    sys.modules[module.__name__] = module
    try:
        exec(compile(job["program"], "<program>", "exec"), vars(module))
        if name:
            return 0, call(name, vars(module), text)
        finish()
        return 0, b""
    except MemoryError:
        raise
    except BaseException as error:
        if not name and isinstance(error, SystemExit) and error.code in (None, 0):
            finish()
            return 0, b""
        return 1, describe(error, job["program"]).encode(errors="replace")


def call(name: str, space: dict, text: bytes) -> bytes:
    """The JSON of what the function returns for the arguments in `text`, one a line."""
    import json

    dumps = json.dumps
    arguments = [json.loads(line) for line in text.splitlines() if line.strip()]
    if hasattr(space.get("Solution"), name):
        found = getattr(space["Solution"](), name)
    elif name in space:
        found = space[name]
    else:
        raise NameError(f"the program defines no function {name}")
    return dumps(found(*arguments)).encode()


def finish() -> None:
    """What Python does at the end of a program: wait for threads, call what was registered, write what is buffered."""
    threading = sys.modules.get("threading")
    if threading:
        threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.__stdout__):
        try:
            if stream is not None:
                stream.flush()
        except Exception:  # it was closed, or is another thing by now
            pass


def describe(error: BaseException, program: str) -> str:
    """The exception, with its lines in the program. Its class is the program's, which may run code here."""
    try:
        if isinstance(error, SyntaxError) and error.lineno:
            line = (error.text or "").strip()[:300]
            return f"line {error.lineno}: {line}\n{type(error).__name__}: {error.msg}"
        lines, numbers, trace = program.splitlines(), [], error.__traceback__
        while trace:
            if trace.tb_frame.f_code.co_filename == "<program>":
                numbers.append(trace.tb_lineno)
            trace = trace.tb_next
        shown = [f"line {n}: {lines[n - 1].strip()[:300]}" for n in numbers[-3:] if 0 < n <= len(lines)]
        words = str(error)[:2000].strip()
        return "\n".join([*shown, type(error).__qualname__ + (words and f": {words}")])
    except BaseException:
        return "An exception that has no text."
