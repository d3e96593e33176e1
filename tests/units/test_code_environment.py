"""The code environment against programs that are wrong, and against programs that mean harm."""

import base64
import json
import os
import pickle
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from sdpo_plugin.environments import code, sandbox

pytestmark = pytest.mark.skipif(sandbox._bubblewrap() is None, reason="needs a kernel that allows namespaces")
LIMITS = sandbox.Limits(seconds=1.5, memory=512 * sandbox.MIB)
DOUBLE = json.dumps([{"input": f"{i}\n", "output": f"{2 * i}\n", "testtype": "stdin"} for i in (1, 2, 30)])
SECRET = "the expected answer is 60 and nobody prints it"


def judged(program, label=DOUBLE, **options):
    return code.judge(f"Here it is:\n```python\n{program}\n```\n", label, limits=LIMITS, **options)


# ── programs that try ──


def test_a_right_program_passes():
    assert judged("print(2 * int(input()))") == (True, "The program ended before all tests were run.")
    test = {"input": "1\n[2]", "output": "[1, 2]", "testtype": "functional"}
    label = json.dumps({"fn_name": "add", "tests": [test]})
    assert judged("class Solution:\n    def add(self, a, b):\n        return (a, *b)", label)[0]
    assert judged("def add(a, b):\n    return [a] + b", label)[0]
    assert judged("print(float(2 * int(input())))")[0]  # 2.0 is 2
    assert not judged("print(2 * int(input()), 'exactly')")[0]


@pytest.mark.parametrize(
    "program, printed",
    [
        ("print(pow(2, 10, 7), gcd(4, 6), [*accumulate([1, 2])], datetime.date(2026, 1, 2))", "2 2 [1, 3] 2026-01-02"),
        ("def f(x: List[int]) -> Optional[int]: return Counter(x)[1]\nprint(f([1, 1]), stdin.read())", "2 in"),
        ("import fractions, sqlite3\nprint(fractions.Fraction(2, 4))\nexit()\nprint(3)", "1/2"),
        ("def deep(n): return n and 1 + deep(n - 1)\nprint(deep(20_000))", "20000"),
    ],
)
def test_what_programs_may_use_without_importing_it_and_import(program, printed):
    (outcome,) = sandbox.run(program, ["in"])
    assert (outcome.end, outcome.output.strip()) == ("ok", printed)


@pytest.mark.parametrize(
    "program, expected",
    [
        ("print(2)", "Test 2 of 3 failed.\nInput:\n2\nExpected:\n4\nGot:\n2"),
        ("n = int(input())\nprint(10 // (n - 1))", "line 2: print(10 // (n - 1))\nZeroDivisionError: integer"),
        ("def f(): return f() + 1\nf()", "line 1: def f(): return f() + 1\nRecursionError: maximum recursion depth"),
        ("while True: pass", "While it ran, it did not end within 1.5 s."),
        ("x = [0] * 10**10", "it used more than 512 MB of memory"),
        ("print('a' * 10**7)", "it printed more than 256 KB"),
        ("def f(:\n  pass", "line 1: def f(:\nSyntaxError: invalid syntax"),
        ("import os; os.kill(os.getpid(), 9)", "it was killed, or ended itself without a result"),
    ],
)
def test_what_is_wrong_is_reported(program, expected):
    passed, told = judged(program)
    assert not passed and expected in told


def test_how_much_is_reported():
    label = json.dumps({"public_test_cases": [{"input": "1", "output": "2"}],
                        "private_test_cases": json.dumps([{"input": "7", "output": "14"}])})  # fmt: skip
    wrong = "print(2)"  # right for the public test
    assert judged(wrong, label) == (False, "Test 2 of 2 failed.\nIts output is wrong.")
    assert "Expected:\n14\nGot:\n2" in judged(wrong, label, show_private=True)[1]
    assert judged(wrong, label, detail="outcome") == (False, "Test 2 of 2 failed.")
    assert judged("1 / 0", label, detail="error")[1].endswith("line 1: 1 / 0\nZeroDivisionError: division by zero")


def test_as_openrlhf_calls_it():
    queries = ["ask```python\nprint(2 * int(input()))```", "ask no code"]
    result = code.reward_func(queries, ["ask", "ask"], [DOUBLE] * 2)
    assert result["rewards"].tolist() == [1.0, 0.0] and result["feedback"][0] is None
    assert result["feedback"][1].startswith("The response has no program")


def packed(tests) -> str:
    """As LiveCodeBench packs private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def test_a_file_of_livecodebench_becomes_a_data_set(tmp_path):
    stdin = {
        "question_content": "Double it.\n", "starter_code": "", "contest_date": "2025-02-01T00:00:00", "metadata": "{}",
        "public_test_cases": json.dumps([{"input": "1", "output": "2", "testtype": "stdin"}]),
        "private_test_cases": packed([{"input": str(i), "output": str(2 * i)} for i in range(2, 9)]),
    }  # fmt: skip
    function = stdin | {
        "starter_code": "class Solution:\n    def double(self, n: int) -> int:\n        ", "contest_date": "2025-03-09",
        "metadata": json.dumps({"func_name": "double"}),
        "public_test_cases": json.dumps([{"input": "1", "output": "2", "testtype": "functional"}]),
        "private_test_cases": json.dumps([{"input": "7", "output": "14", "testtype": "functional"}]),
    }  # fmt: skip
    old = stdin | {"contest_date": "2025-01-31T00:00:00"}
    late = stdin | {"contest_date": "2025-05-01T00:00:00"}
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (old, stdin, function, late)))
    assert len(list(code.rows(str(file)))) == 4
    first, second = code.rows(str(file), since="2025-02-01", until="2025-05-01", private=0.5)
    assert "standard input" in first["prompt"][0]["content"] and "Double it.\n\nThe" in first["prompt"][0]["content"]
    assert judged("print(2 * int(input()))", first["label"])[0]
    assert [case.public for case in code.parse(first["label"])[1]] == [True, False, False, False]
    assert "def double(self, n: int) -> int:\n```" in second["prompt"][0]["content"]
    assert judged("class Solution:\n    def double(self, n):\n        return 2 * n", second["label"])[0]
    assert judged("def double(n): return 2", second["label"]) == (False, "Test 2 of 2 failed.\nIts output is wrong.")


class Harm:
    def __reduce__(self):
        return os.system, ("touch /tmp/planted-by-a-pickle",)


def test_private_tests_that_are_more_than_text_are_not_unpickled(tmp_path):
    row = {"question_content": "?", "starter_code": "", "contest_date": "2025-02-01", "metadata": "",
           "public_test_cases": "[]",
           "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(Harm()))).decode()}  # fmt: skip
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    with pytest.raises(pickle.UnpicklingError, match="must be text, and name posix.system"):
        list(code.rows(str(tmp_path / "test.jsonl")))
    assert not os.path.exists("/tmp/planted-by-a-pickle")


# ── programs that mean harm ──


@pytest.fixture
def listener():
    """A server on this machine; what connected to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield server


def reads(path) -> str:
    return f"import sys\ntry:\n    print(open({path!r}).read()[:200])\nexcept OSError as e:\n    print('no', e)"


def test_no_files_and_no_environment_of_the_trainer(tmp_path, monkeypatch):
    monkeypatch.setenv("API_KEY", SECRET)
    (tmp_path / "secret").write_text(SECRET)
    home = os.path.expanduser("~/.bashrc")
    for path in map(str, (tmp_path / "secret", __file__, f"/proc/{os.getpid()}/environ", "/etc/shadow", home)):
        (outcome,) = sandbox.run(reads(path), [""], limits=LIMITS)
        assert outcome.output.startswith("no"), path
    (outcome,) = sandbox.run("import os\nprint(dict(os.environ), os.listdir('/'), os.listdir('/proc'))", [""])
    assert SECRET not in outcome.output and "work" not in outcome.output
    (outcome,) = sandbox.run("import glob\nfor f in glob.glob('/proc/*/environ'): print(open(f).read())", [""])
    assert SECRET not in outcome.output


def test_nothing_is_written_outside(tmp_path):
    program = f"""
import os
for d in ({str(tmp_path)!r}, '/usr', '/', '/work'):
    try:
        os.makedirs(d, exist_ok=True)
        open(d + '/planted', 'w').write('x')
    except OSError as e:
        print(e)"""
    sandbox.run(program, [""], limits=LIMITS)
    assert not (tmp_path / "planted").exists() and not os.path.exists("/usr/planted") and not os.path.exists("/planted")


def test_no_network(listener):
    port = listener.getsockname()[1]
    (outcome,) = sandbox.run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)", [""], limits=LIMITS)
    assert outcome.end == "error" and "Operation not permitted" in outcome.error
    with pytest.raises(TimeoutError):
        listener.accept()


HOSTILE = {
    "fork bomb": """
import os
while True:
    try: os.fork()
    except OSError: pass""",
    "threads": """
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(99,)).start()
    except RuntimeError: pass""",
    "10 GB": "x = bytearray(10 * 2**30)",
    "endless output": "while True: print('x' * 1000)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "endless file": "f = open('/tmp/x', 'w')\nwhile True: f.write('x' * 10**6)",
    "endless loop": "while True: pass",
    "ignores signals": """
import signal
for s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)
while True: pass""",
    "kills the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "kills everything": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "stops the parent": "import os, signal, time\nos.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(99)",
    "exit 0": "import os\nos._exit(0)",
    "exit": "import sys\nsys.exit(0)",
    "marker of a pass": "print('{\"end\": \"ok\", \"output\": \"2\"}')\nprint('PASSED')",
    "writes results": """
import os
for fd in range(64):
    try: os.write(fd, b'{"end": "ok", "output": "", "error": ""}\\n' * 9)
    except OSError: pass""",
    "the parent's pipe": """
import os
for p in filter(str.isdigit, os.listdir('/proc')):
    for fd in range(20):
        try: open(f'/proc/{p}/fd/{fd}', 'wb', buffering=0).write(b'x\\n' * 10**6)
        except OSError: pass""",
    "patches the checker": """
import builtins, json
json.dumps = json.loads = lambda *a, **k: 2
builtins.all = lambda x: True
print(json)""",
    "reads the frames": "import gc\nprint([o for o in gc.get_objects() if isinstance(o, dict) and 'expected' in o])",
    "closes everything": "import os\nos.closerange(0, 64)\nwhile True: pass",
    "connects": "import socket\nsocket.create_connection(('1.1.1.1', 53), 1)",
    "reads the environment": "import glob\nprint([open(f).read() for f in glob.glob('/proc/[0-9]*/environ')])",
    "writes outside": "open('/usr/planted', 'w').write('x')",
    "leaves a daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(99)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_none_gets_through_and_each_gets_a_messagemething(name):
    began = time.monotonic()
    passed, told = judged(HOSTILE[name])
    assert not passed and told and time.monotonic() - began < 15
    assert judged("print(2 * int(input()))")[0]  # and the next one runs


def test_one_program_does_not_see_another():
    slow = threading.Thread(target=sandbox.run, args=("import time\ntime.sleep(2)", [""]))
    slow.start()
    time.sleep(0.5)
    (outcome,) = sandbox.run("import os\nprint(len([p for p in os.listdir('/proc') if p.isdigit()]))", [""])
    slow.join()
    assert int(outcome.output) <= 4


def test_twenty_short_programs_a_second():
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda _: judged("print(2 * int(input()))"), range(4)))
        began = time.monotonic()
        results = list(threads.map(lambda _: judged("print(2 * int(input()))"), range(60)))
    rate = 60 / (time.monotonic() - began)
    print(f"{rate:.0f} programs of three tests a second on {os.cpu_count()} cores")
    assert all(passed for passed, _ in results) and rate > 5  # 20 on a quiet machine; CI's is not


def test_without_a_sandbox_it_is_rejected(monkeypatch):
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda: None)
    with pytest.raises(sandbox.SandboxError, match="there is no sandbox for untrusted programs on this machine"):
        judged("print(1)")
    monkeypatch.setenv(sandbox.WEAK, "weak")
    assert judged("print(2 * int(input()))")[0] and "did not end within" in judged("while True: pass")[1]
