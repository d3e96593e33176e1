"""What bounds a program in the sandbox, in each way to start one that works here: programs that try to get more."""

import itertools
import os
import subprocess
import sys
import time

import psutil
import pytest

from sdpo_plugin.environments import isolation, sandbox
from sdpo_plugin.environments.seccomp import machine_filter

WAYS = {way.own_user: way for way in isolation.candidates() if way.counted and sandbox._works(way)}
pytestmark = pytest.mark.skipif(not WAYS, reason="needs a kernel that allows namespaces")
LIMITS = sandbox.Limits(seconds=3, memory=256 * sandbox.MIB)
LIBC = "import ctypes, os, sys\nlibc = ctypes.CDLL(None, use_errno=True)\n"


@pytest.fixture(params=[pytest.param(own, id="a user of its own" if own else "a user namespace") for own in WAYS])
def way(request, monkeypatch):
    """Root has both ways."""
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda: WAYS[request.param])
    return WAYS[request.param]


def output(program: str, limits=LIMITS) -> str:
    (outcome,) = sandbox.run(program, [""], limits=limits)
    assert outcome.end == "ok", outcome
    return outcome.output.strip()


def test_files_take_no_more_memory_than_tmp_has(way):
    program = """
import os
written = {}
for folder, _, _ in [*os.walk('/dev'), *((d, 0, 0) for d in ('/', '/run', '/var', '/root', '/usr', '/proc', '/tmp'))]:
    written[folder] = 0
    try:
        for i in range(20):
            with open(f'{folder}/f{i}', 'wb') as file:
                for _ in range(8):
                    written[folder] += file.write(b'x' * 2**20)
    except OSError:
        pass
print({folder: size >> 20 for folder, size in written.items() if size})"""
    assert output(program) == "{'/tmp': 64}"


def test_files_are_counted(way):
    for made in ("open(f'/tmp/{i}', 'x')", "os.symlink('x' * 99, f'/tmp/{i:0250}')"):
        (outcome,) = sandbox.run(f"import itertools, os\nfor i in itertools.count(): {made}", [""], limits=LIMITS)
        assert outcome.end == "memory"
    assert output("for i in range(1000): open(f'/tmp/{i}', 'x').close()\nprint(1)") == "1"


def test_a_program_has_one_process(way):
    starts = [
        "os.fork()", "subprocess.run(['true'])", "os.posix_spawn('/bin/true', ['true'], {})",
        "os.system('true') and 1 / 0", "multiprocessing.Process(target=print).start()",
        "concurrent.futures.ProcessPoolExecutor().submit(print)",
    ]  # fmt: skip
    program = "import os, subprocess, multiprocessing, concurrent.futures\n" + "".join(
        f"try:\n    {start}\n    print({start!r})\nexcept (OSError, ZeroDivisionError): pass\n" for start in starts
    )
    assert output(program) == ""
    calls = """
NEW_USER, NEW_FILES, SIGCHLD = 0x10000000, 0x20000, 17
args = (ctypes.c_uint64 * 11)(NEW_USER, 0, 0, 0, SIGCHLD)
for name, failed in [
    ('clone', libc.syscall(56 if os.uname().machine == 'x86_64' else 220, NEW_USER | SIGCHLD, 0, 0, 0, 0)),
    ('clone3', libc.syscall(435, args, 88)), ('unshare', libc.unshare(NEW_USER | NEW_FILES)),
    ('setns', libc.setns(os.open('/proc/self/ns/user', 0), 0)), ('mount', libc.mount(b'x', b'/tmp', b'tmpfs', 0, b'')),
]: print(name, failed)"""
    assert output(LIBC + calls) == "clone -1\nclone3 -1\nunshare -1\nsetns -1\nmount -1"


def test_memory_that_is_not_in_the_address_space_is_rejected(way):
    program = """
import socket, fcntl
def tried(call):
    try: return call()
    except OSError as error: return error.errno
pair = socket.socketpair()
print(tried(lambda: os.memfd_create('x')), tried(socket.socket), tried(lambda: pair[0].setsockopt(1, 7, 9)))
print(libc.shmget(0, 2**20, 0o1600), libc.semget(0, 9, 0o1600), libc.msgget(0, 0o1600), libc.inotify_init())
numbers = {'x86_64': (425, 321, 248, 298, 323, 447, 278)}.get(os.uname().machine, (425, 280, 217, 241, 282, 447, 75))
print(*(libc.syscall(number, 1, ctypes.create_string_buffer(200), 1, 0, 0) for number in numbers))"""
    assert output(LIBC + program) == "1 1 1\n-1 -1 -1 -1\n" + "-1 " * 6 + "-1"


def test_what_pipes_and_sockets_hold(way):
    program = """
import fcntl, os, socket
held, ends = 0, []
def fill(end):
    global held
    os.set_blocking(end, False)
    try:
        while True: held += os.write(end, bytes(65536))
    except BlockingIOError: pass
try:
    while True:
        ends.append(os.pipe())
        try: fcntl.fcntl(ends[-1][1], 1031, 2**20)
        except OSError: pass
        fill(ends[-1][1])
except OSError: pass
for pair in ends: os.close(pair[0]), os.close(pair[1])
try:
    while True:
        ends.append(socket.socketpair())
        for end in ends[-1]: fill(end.fileno())
except OSError: pass
print(held >> 20)"""
    assert 10 < int(output(program)) < 64


def test_memory_and_threads(way):
    fills = "x = bytearray({} * 2**20)\nprint(1)"
    assert output(fills.format(150)) == "1"
    assert sandbox.run(fills.format(300), [""], limits=LIMITS)[0].end == "memory"
    threads = "import threading, time\nfor i in range(99): threading.Thread(target=time.sleep, args=[9]).start()"
    (outcome,) = sandbox.run(threads, [""], limits=LIMITS)
    assert outcome.error.endswith("RuntimeError: can't start new thread") or not way.own_user and os.geteuid() == 0


def test_the_driver_is_out_of_reach(way):
    program = """
import ctypes, os
for signal in (9, 19):
    os.kill(os.getppid(), signal)
for path in ('mem', 'environ', 'fd/0'):
    try: print(path, open(f'/proc/1/{path}', 'rb').read(1))
    except OSError: pass
print(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0), os.getppid())"""
    assert output(program) == "-1 1"


def test_the_sandbox_ends_with_who_started_it():
    program = "import time\ntime.sleep(99)  # alone"
    starts = f"from sdpo_plugin.environments import sandbox\nsandbox.run({program!r}, [''], limits=sandbox.Limits(99))"

    def sandboxes() -> set[int]:
        return {p.pid for p in psutil.process_iter(["cmdline"]) if sandbox.START in (p.info["cmdline"] or [])}

    before = sandboxes()
    trainer = subprocess.Popen([sys.executable, "-c", starts])
    while len(sandboxes() - before) < 3:  # bubblewrap, the driver and the program
        time.sleep(0.02)
    begun = sandboxes() - before
    trainer.kill()
    trainer.wait()
    until = time.monotonic() + 5
    while begun & sandboxes() and time.monotonic() < until:
        time.sleep(0.02)
    assert not begun & sandboxes()


def test_threads_of_the_user_elsewhere_do_not_keep_programs_from_running(monkeypatch):
    """Before Linux 5.14 RLIMIT_NPROC counts all threads of an ordinary user; here a user of root's has other ones."""
    monkeypatch.setattr(sandbox, "_uids", itertools.repeat(7))
    root = os.geteuid() == 0
    uid = 100_000 + (os.getpid() * 64 + 7) % 900_000 if root else None
    others = [subprocess.Popen(["sleep", "60"], user=uid) for _ in range(20)]
    try:
        # Without namespaces an ordinary user's threads are counted together on every kernel.
        counted = WAYS[True] if root else isolation.Isolation(None, counted=True)
        assert not sandbox._works(counted)
        found = next(way for way in (counted, isolation.Isolation(counted.bubblewrap, root)) if sandbox._works(way))
        monkeypatch.setattr(sandbox, "_bubblewrap", lambda: found)
        assert output("import threading\nthreading.Thread(target=print, args=[1]).start()") == "1"
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_a_program_that_does_nothing_is_no_proof(monkeypatch):
    monkeypatch.setattr(sandbox, "TRIAL", "1 / 0")
    assert not any(map(sandbox._works, WAYS.values()))
    assert not sandbox._works(isolation.Isolation("/nowhere/bwrap"))


def test_without_namespaces_calls_are_rejected_as_well(monkeypatch):
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda: None)
    monkeypatch.setenv(sandbox.WEAK, "weak")
    for call in ("os.fork()", "os.memfd_create('x')", "socket.socket()"):
        (outcome,) = sandbox.run(f"import os, socket\n{call}", [""], limits=LIMITS)
        assert outcome.error.endswith("PermissionError: [Errno 1] Operation not permitted")


def test_machines_whose_calls_are_known():
    assert len(machine_filter("x86_64")) % 8 == len(machine_filter("aarch64")) % 8 == 0
    with pytest.raises(sandbox.SandboxError, match="no system calls are listed for s390x, only for x86_64, aarch64"):
        machine_filter("s390x")


def test_sandboxes_at_a_time(monkeypatch):
    monkeypatch.setattr(sandbox, "_free_memory", lambda: 2 * 3 * (sandbox.MIB + isolation.TMP) + 5)
    monkeypatch.setattr(sandbox, "_places", sandbox._places.__wrapped__)
    places = sandbox._places(sandbox.MIB)
    assert [places.acquire(blocking=False) for _ in range(4)] == [True, True, True, False]
    assert sandbox._places(2**60).acquire(blocking=False)
    monkeypatch.undo()
    assert 0 < sandbox._free_memory() <= psutil.virtual_memory().total
