"""Labels that no response can satisfy, found before a run by the environment's own `check_label`.

A label is as little to be trusted as a response, and reading one may take for ever (`9^{9^{9}}`). So they are read in a
process of their own, which can be killed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sdpo_plugin.environments.feedback import dates_as_text

DIRECTORY = Path(__file__).parent
SECONDS = 10.0  # for a label
START = 120.0  # for the first one of a process, with which an environment imports its libraries
TOTAL = 120.0  # for a dataset; the rest of it is then not checked
NOTE = 10.0  # between two notes of how far it is
MEMORY = 4 * 2**30  # bytes of address space
LENGTH = 200  # characters of a reason, and of a label that is remembered
SHOWN = 3  # labels


class CannotCheck(RuntimeError):
    """The environment cannot be used here, for example because a library is missing."""


def environment(path: str) -> Path | None:
    """The file of an environment of this package that `path` is, or None."""
    file = Path(path).resolve()
    return file if file.parent == DIRECTORY.resolve() and file.suffix == ".py" and file.exists() else None


@dataclass
class Faults:
    """What is wrong with the labels of a dataset.

    Attributes:
        rows: how many were read. number: how many of them no response can satisfy.
        first: of the first `SHOWN` of these, the row, the label and the reason.
    """

    rows: int = 0
    number: int = 0
    first: list[tuple[int, Any, str]] = field(default_factory=list)


def faults(file: Path, labels: Iterable[Any], note: Callable[[int], None]) -> Faults:
    """Read labels with the `check_label` of an environment's file, if it has one.

    Args:
        note: called now and then with the number of labels that were read.

    Raises:
        CannotCheck: no label can be read here.
    """
    found = Faults()
    if "def check_label(" not in file.read_text():
        return found
    began = noted = time.monotonic()
    reader = _Reader(file)
    try:
        for row, label in enumerate(labels):
            now = time.monotonic()
            if now - began > TOTAL:
                break
            if now - noted > NOTE:
                note(row)
                noted = now
            reason = reader.fault(dates_as_text(label))
            found.rows += 1
            if reason is not None:
                found.number += 1
                if found.number <= SHOWN:
                    found.first.append((row, label, reason[:LENGTH]))
    finally:
        reader.end()
    return found


class _Reader:
    """A process that reads one label after the other; one that was killed is replaced."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.process: subprocess.Popen[bytes] | None = None
        self.known: dict[str, str | None] = {}  # data sets repeat their labels

    def fault(self, label: Any) -> str | None:
        """Why no response can satisfy the label, or None."""
        if not isinstance(label, str) or len(label) > LENGTH:
            return self._fault(label)
        if label not in self.known:
            self.known[label] = self._fault(label)
        return self.known[label]

    def _fault(self, label: Any) -> str | None:
        seconds = SECONDS
        if self.process is None:
            self._start()
            seconds = START
        try:
            self.connection.send(label)
            if not self.connection.poll(seconds):
                self.end()
                return f"it takes more than {seconds:g} s to read"
            answer = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return f"reading it ended the process (exit code {self.end()})"
        if "missing" in answer:
            raise CannotCheck(answer["missing"])
        return answer["reason"]

    def _start(self) -> None:
        self.connection, end = Pipe()
        command = [sys.executable, "-W", "ignore", "-m", "sdpo_plugin.environments.label_check", str(end.fileno())]
        self.process = subprocess.Popen(
            [*command, str(self.file)], pass_fds=[end.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        end.close()

    def end(self) -> int | None:
        """Kill the process, if it lives; its exit code."""
        if self.process is None:
            return None
        process, self.process = self.process, None
        process.kill()
        self.connection.close()
        return process.wait()


# ── in the process ──


def serve(descriptor: int, file: str) -> None:
    """Answer each label with what is wrong with it, until the other end is closed."""
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, most))
    connection = Connection(descriptor)
    while True:
        try:
            label = connection.recv()
        except EOFError:
            return
        connection.send_bytes(json.dumps(_answer(file, label)).encode())


def _answer(file: str, label: Any) -> dict[str, Any]:
    try:
        _loaded(file).check_label(label)
    except ImportError as error:
        return {"missing": str(error)}
    except ValueError as error:
        return {"reason": str(error)}
    except Exception as error:  # of libraries
        return {"reason": f"{type(error).__name__}: {error}"}
    return {"reason": None}


@cache
def _loaded(file: str) -> Any:
    spec: Any = importlib.util.spec_from_file_location("environment", file)  # as OpenRLHF loads it
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
