"""Warm processes for tests: Ray's processes and vLLM engines forked from one that has imported them already.

Importing torch, DeepSpeed and vLLM takes 11 s of CPU in each of a run's processes, far more than training a tiny model
does, and Ray's own helpers another 4 s. `open_nursery` forks a server off the launcher, and makes a script that Ray and
multiprocessing take for the Python executable. What they start with it (this file, run as a script) asks the server for
a fork with its own arguments, environment and files, and ends when the fork does.
"""

import array
import contextlib
import json
import os
import shlex
import signal
import socket
import sys

EXECUTABLE = "SDPO_PLUGIN_NURSERY"  # the script
MAX_FILES = 64
IDS_PER_FORK = 200  # far more than a worker draws, and drawn in a millisecond


def open_nursery(directory: str) -> str:
    """Fork the server, which ends with its parent. Call before any thread exists. Returns the script's path."""
    script, address = os.path.join(directory, "python"), f"sdpo-plugin-{os.getpid()}"
    client = shlex.join([sys.executable, "-S", "-E", os.path.abspath(__file__), address])
    with open(script, "w") as file:
        file.write(f'#!/bin/sh\nexec {client} "$@"\n')
    os.chmod(script, 0o755)
    os.environ[EXECUTABLE] = script
    server = socket.socket(socket.AF_UNIX)
    server.bind("\0" + address)  # an abstract name: a path may be too long for a socket
    server.listen()
    parent = os.getpid()
    if os.fork() == 0:
        _serve(server, parent)
    server.close()
    return script


def fork_ray() -> None:
    """Let `ray.init` in this process make its helpers and workers with the script."""
    from sdpo_plugin.openrlhf_adapter.launcher.install import ray

    init = ray.init

    def call(*args, **kwargs):
        environment = {**(kwargs.get("runtime_env") or {}), "py_executable": os.environ[EXECUTABLE]}
        # A cluster that was there before does not have this process's environment.
        environment["env_vars"] = {**environment.get("env_vars", {}), EXECUTABLE: os.environ[EXECUTABLE]}
        python, sys.executable = sys.executable, os.environ[EXECUTABLE]
        try:
            return init(*args, **{**kwargs, "runtime_env": environment})
        finally:
            sys.executable = python

    ray.init = call


def _serve(server: socket.socket, parent: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server.settimeout(1.0)
    forks = 0
    while os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            client, _ = server.accept()
            client.settimeout(None)
            forks += 1
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _draw_other_ids(forks)
                _become(client)
            client.close()
    os._exit(0)


def _draw_other_ids(forks: int) -> None:
    """Ray draws the ids of objects from a generator that all forks inherit; two workers with one id end the run."""
    from sdpo_plugin.openrlhf_adapter.launcher.install import ray

    for _ in range(IDS_PER_FORK * forks):
        ray.ObjectRef.from_random()


def _become(client: socket.socket) -> None:
    """The body of a fork: take over what the client was started with, and run it."""
    received, numbers = b"", array.array("i")
    while not received.endswith(b"\n"):
        data, ancillary, _, _ = client.recvmsg(65536, socket.CMSG_SPACE(MAX_FILES * numbers.itemsize))
        received += data
        for _, _, descriptors in ancillary:
            numbers.frombytes(descriptors)
    request = json.loads(received)
    os.dup2(client.fileno(), 200)  # out of the way of the numbers that the client needs
    client.detach()
    client = socket.socket(fileno=200)
    copies = [os.dup(n) for n in numbers]
    for copy, wanted in zip(copies, request["files"], strict=True):
        os.dup2(copy, wanted)
    sys.stdin = open(0, closefd=False)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])

    import multiprocessing.spawn
    import runpy
    import threading
    import traceback

    import torch

    threading.Thread(target=lambda: client.recv(1) or os._exit(1), daemon=True).start()  # the client was killed
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    multiprocessing.spawn.set_executable(os.environ[EXECUTABLE])
    code, sys.argv = 0, request["arguments"]
    try:
        if sys.argv[0] == "-c":
            exec(sys.argv.pop(1), {"__name__": "__main__"})
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    client.sendall(b"%d" % code)
    os._exit(code)


def _worker_set_up(arguments: list[str]) -> list[str]:
    """Ray's `setup_worker.py`, which imports Ray to set a worker's environment. Returns what it would execute."""
    prefix = "--serialized-runtime-env-context="
    contexts = [json.loads(argument.removeprefix(prefix)) for argument in arguments if argument.startswith(prefix)]
    for context in contexts:
        os.environ.update(context["env_vars"])
    return [argument for argument in arguments if not argument.startswith((prefix, "--language="))]


def _ask(address: str, arguments: list[str]) -> int:
    """The client: send everything this process has, and stay until the fork ends."""
    while arguments[0].startswith("-") and arguments[0] != "-c":
        del arguments[0]  # flags of an interpreter that runs already
    if os.path.basename(arguments[0]) == "setup_worker.py":
        arguments = _worker_set_up(arguments[1:])
    with socket.socket(socket.AF_UNIX) as server:
        files = []
        for number in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):
                os.fstat(number)
                if number != server.fileno():
                    files.append(number)
        server.connect("\0" + address)
        request = {"arguments": arguments, "files": files, "environment": dict(os.environ), "directory": os.getcwd()}
        socket.send_fds(server, [json.dumps(request).encode() + b"\n"], files)
        answer = server.recv(16)
    return int(answer) if answer else 1  # killed


if __name__ == "__main__":
    sys.exit(_ask(sys.argv[1], sys.argv[2:]))
