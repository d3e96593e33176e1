"""The system calls that a program in the sandbox may not make, as a filter for the kernel (seccomp, classic BPF).

One process per program is what bounds its memory: RLIMIT_AS is of one process. So a program may start threads, but no
process, and it may not allocate memory that RLIMIT_AS does not count. Rejected calls fail with EPERM: an `OSError`.
"""

from __future__ import annotations

import platform
import struct

from sdpo_plugin.environments.isolation import SandboxError

# Numbers on x86_64 and on aarch64; None: the call is not there.
CALLS: dict[str, tuple[int, int | None]] = {
    "fork": (57, None), "vfork": (58, None),  # clone, below, is looked at more closely
    "unshare": (272, 97), "setns": (308, 268),  # namespaces of its own, with file systems in memory
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),  # another process does it
    # Memory that is not in the address space.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "vmsplice": (278, 75), "userfaultfd": (323, 282),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "io_uring_setup": (425, 425),
    "bpf": (321, 280), "perf_event_open": (298, 241), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "inotify_init": (253, None), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    "setsockopt": (54, 208),  # larger buffers; asyncio's socketpair() needs neither this nor the next
    "socket": (41, 198),  # also without a namespace of the network: SDPO_SANDBOX=weak
}  # fmt: skip
MACHINES = {"x86_64": (0xC000003E, 0, 56), "aarch64": (0xC00000B7, 1, 220)}  # architecture, column, number of clone
CLONE3, CLONE_THREAD, X32 = 435, 0x10000, 0x40000000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000  # refuse: with an error number
EPERM, ENOSYS = 1, 38
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # where they are in what the filter reads


def machine_filter(machine: str | None = None) -> bytes:
    """The filter for this machine, 8 bytes an instruction.

    Raises:
        SandboxError: for a machine whose numbers are not here.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise SandboxError(f"no system calls are listed for {machine}, only for {', '.join(MACHINES)}")
    architecture, column, clone = MACHINES[machine]
    numbers = [number for number in (call[column] for call in CALLS.values()) if number is not None]
    steps = [
        (LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL),
        *(step for n in numbers for step in ((EQUAL, 0, 1, n), (RETURN, 0, 0, REFUSE | EPERM))),
        # clone3's flags are not in reach of a filter. Where it is not there, the C library uses clone.
        (EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, REFUSE | ENOSYS),
        (EQUAL, 0, 3, clone), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 1, 0, CLONE_THREAD),
        (RETURN, 0, 0, REFUSE | EPERM), (RETURN, 0, 0, ALLOW),
    ]  # fmt: skip
    return b"".join(struct.pack("=HBBI", code, yes, no, value) for code, yes, no, value in steps)
