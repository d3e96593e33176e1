"""What the code environment rewards: right programs in the forms in which they come, and no odd answer or label."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpo_plugin.environments import code, sandbox

pytestmark = pytest.mark.skipif(sandbox._bubblewrap() is None, reason="needs a kernel that allows namespaces")
LIMITS = sandbox.Limits(seconds=1.5, memory=512 * sandbox.MIB)
DOUBLE = json.dumps([{"input": f"{i}\n", "output": f"{2 * i}\n", "testtype": "stdin"} for i in (1, 2, 30)])
FUNCTION = json.dumps({"fn_name": "double", "tests": [{"input": "2", "output": "4", "testtype": "functional"}]})
DOUBLES = "def double(n):\n    return 2 * n\n"


def judged(program, label=DOUBLE, **options):
    return code.judge(f"```python\n{program}\n```", label, limits=LIMITS, **options)


# ── right programs that had no reward ──

@pytest.mark.parametrize(
    "program",
    [
        "def double(n):\n    print('n is', n)\n    return 2 * n",
        "print('loaded')\nclass Solution:\n    def double(self, n): return print(n * 'x' * 10**6) or 2 * n",
        "import sys\ndef double(n):\n    sys.stdout.write('4')\n    sys.stderr.write('x' * 10**6)\n    return 2 * n",
        "import sys\nsys.stdout.close()\n" + DOUBLES,
        DOUBLES + "if __name__ == '__main__':\n    print(double(int(input())))",
        DOUBLES + "import unittest\nif __name__ == '__main__':\n    unittest.main()",
        DOUBLES + "import sys\ndef main(): return 1\nif __name__ == '__main__':\n    sys.exit(main())",
        "import sys\nseen = sys.stdin.read()\n" + DOUBLES,
        "from __future__ import annotations\nimport dataclasses as d\n@d.dataclass\nclass N:\n    n: int\n" + DOUBLES,
    ],
)
def test_what_a_function_prints_and_a_main_program_do_not_count(program):
    assert judged(program, FUNCTION)[0]


@pytest.mark.parametrize(
    "program, told",
    [
        ("def twice(n): return 2 * n", "NameError: the program defines no function double"),
        (DOUBLES + "exit()", "line 3: exit()\nSystemExit"),
        ("def double(n): return {2 * n}", "TypeError: Object of type set is not JSON serializable"),
        ("def double(n): print(4)", "Got:\nnull"),
        ("import os\ndef double(n):\n    os.write(3, b'4')\n    return 5", "Got:\n45"),
        ("import sys, os\ndef double(n): os._exit(0)", "Got:\n(nothing)"),
    ],
)
def test_functions_that_return_something_else(program, told):
    passed, said = judged(program, FUNCTION)
    assert not passed and told in said


@pytest.mark.parametrize(
    "program",
    [
        "import threading\nthreading.stack_size(2**26)\ndef main(): print(2 * int(input()))\n"
        "threading.Thread(target=main).start()",
        "import atexit, io, sys\nout = io.StringIO()\natexit.register(lambda: sys.__stdout__.write(out.getvalue()))\n"
        "print(2 * int(input()), file=out)",
        "import sys\nsys.stderr.write('x' * 10**6)\nprint(2 * int(input()))\nsys.stdout.close()",
        "if __name__ == '__main__':\n    import sys\n    print(2 * int(input()))\n    sys.exit()",
    ],
)
def test_programs_that_print_in_the_end(program):
    assert judged(program)[0]


def test_right_output_above_the_limit():
    n = 60_000
    label = json.dumps([{"input": f"{n}", "output": "\n".join(map(str, range(n)))}])
    assert len(json.loads(label)[0]["output"]) > LIMITS.output
    assert judged("n = int(input())\nprint(*range(n), sep='\\n')", label)[0]
    assert "it printed more than 798 KB" in judged("while True: print('x' * 999)", label)[1]
    function = {"fn_name": "f", "tests": [{"input": "90000", "output": json.dumps(["ä"] * 90_000, ensure_ascii=False)}]}
    assert judged("def f(n): return ['ä'] * n", json.dumps(function))[0]
    digits = json.dumps([{"input": "30000", "output": "7" * 30_000}])
    assert judged("print(7 * (10**int(input()) // 9))", digits)[0]  # Python's own limit is 4,300
    digits = json.dumps({"fn_name": "f", "tests": [{"input": "30000", "output": "7" * 30_000}]})
    assert judged("def f(n): return 7 * (10**n // 9)", digits)[0]


def test_inputs_are_whole():
    (outcome,) = sandbox.run("import sys\nprint(len(sys.stdin.read()))", ["x" * 20 * sandbox.MIB])
    assert outcome == sandbox.Outcome("ok", f"{20 * sandbox.MIB}\n")
    (outcome,) = sandbox.run("def f(text, n): return len(text), n", [f'"{"x" * 20 * sandbox.MIB}"\n5'], "f")
    assert outcome == sandbox.Outcome("ok", f"[{20 * sandbox.MIB}, 5]")
    (outcome,) = sandbox.run("def f(text): return text", ['"\u2028\x85"'], "f")
    assert json.loads(outcome.output) == "\u2028\x85"


@pytest.mark.parametrize(
    "program, told",
    [
        (r"raise ValueError('\ud800 is no text')", "ValueError: ? is no text"),
        (r"raise ValueError('first\0second')", "ValueError: first\0second"),
        ("import sys\nsys.exit('no \\ud800 answer')", "SystemExit: no ? answer"),
        ("class E(Exception):\n    def __str__(self): return 1 / 0\nraise E", "An exception that has no text."),
        ("class E(Exception):\n    def __str__(self): return 5\nraise E", "An exception that has no text."),
        ("class E(SystemExit): code = property(lambda self: 1 / 0)\nraise E", "It ended with an error."),
        ("import builtins\nbuiltins.str = builtins.type = None\n1 / 0", "An exception that has no text."),
        ("raise ValueError('x' * 10**7)", "ValueError: xxx"),
        ("print('\\ud800')", "UnicodeEncodeError: 'utf-8' codec can't encode character"),
        ("x = '\ud800'", "UnicodeEncodeError: 'utf-8' codec can't encode character"),
        ("x = '\0'", "source code string cannot contain null bytes"),
        ("import os, traceback\ntraceback.print_stack()\nos._exit(1)", 'File "<program>", line 2, in <module>'),
        ("import os\nos.abort()", "it was killed, or ended itself without a result"),
    ],
)
def test_what_is_reported_of_an_odd_exception(program, told):
    passed, said = judged(program, detail="error")
    assert not passed and told in said and "<driver>" not in said
    said.encode()


# ── answers and labels that are odd ──

DEEP = "[" * 100_000 + "]" * 100_000
ANSWERS = {
    "deep": "x = []\n    for _ in range(4999): x = [x]\n    return x",
    "in itself": "x = []\n    x.append(x)\n    return x",
    "no number": "return float('nan')", "no end": "return float('inf')", "bytes": "return b'4'",
    "half a pair": "return '\\ud800'", "keys": "return {(1, 2): 4}", "large": "return 10**49_999",
    "too large": "return 10**99_999", "a class": "return Solution",
    "patched": "json.dumps = lambda x: '4'\n    return 5",
    "wide": "return [0] * 10**6", "recursion": "return double(n)", "generator": "return (yield 4)",
    "a list that lies": "return type('L', (list,), {'__eq__': lambda *_: True, '__iter__': lambda s: iter([4])})([5])",
    "an integer that lies": "return type('I', (int,), {'__repr__': lambda s: '4', '__str__': lambda s: '4'})(5)",
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_hostile_answers_have_no_reward(name):
    for expected in ("4", DEEP, "[[[4]]]"):
        label = json.dumps({"fn_name": "double", "tests": [{"input": "2", "output": expected}]})
        passed, told = judged(f"class Solution: pass\ndef double(n):\n    {ANSWERS[name]}", label)
        assert not passed and told.encode()


TEXTS = st.text("0123456789+-.eE_ \n\tNaIinfty[]{},\":\\u\0\x1c\u2028\u0661", max_size=40)


@given(TEXTS, TEXTS)
def test_no_output_is_too_odd(printed, expected):
    assert code.equal_text(printed, printed)
    for a, b in ((printed, expected), (expected, printed), (printed, f"1 {printed}")):
        code.equal_text(a, b), code.equal_values(a, b)


@pytest.mark.parametrize("number", ["sNaN", "nan", "1e999999999999999999999", "-inf", "1_0", "9" * 10**5, "1e-9999"])
def test_numbers_that_are_odd(number):
    began = time.monotonic()
    for other in ("1", "1e99999999", "NaN", "8" * 10**5):
        assert not code.equal_text(number, other) and not code.equal_values(f"[{number}, 2]", f"[{other}, 1]")
    assert time.monotonic() - began < 1


def function(given="1", expected="1", name="f", **more):
    return json.dumps({"fn_name": name, "tests": [{"input": given, "output": expected, **more}]})


@pytest.mark.parametrize(
    "label, why",
    [
        ("no JSON", "must be JSON with tests"), (DEEP, "RecursionError"), (5, "not 5: AttributeError"),
        (None, "not None"),
        ("[]", "must have tests"), ("{}", "must have tests"), ('{"inputs": ["1"], "outputs": []}', "must have tests"),
        ('[{"input": "1"}]', "KeyError: 'output'"), ('[{"input": 1, "output": "1"}]', "input and output as text"),
        ('[{"input": "1", "output": ["1"]}]', "input and output as text"), ('["1"]', "input and output as text"),
        (r'[{"input": "1", "output": "\ud800"}]', "surrogates not allowed"), ('{"tests": "x"}', "JSONDecodeError"),
        ('[{"input": "1", "output": "1", "testtype": "functional"}]', "fn_name if they are of a function"),
        (function(name="a.b"), "fn_name must be a name"), (function(name="class"), "fn_name must be a name"),
        (function(name=["f"]), "fn_name must be a name"), (function("x"), "input of test 1 must be one JSON argument"),
        (function(DEEP), "input of test 1 must be"), (function(expected="x"), "output of test 1 must be a JSON value"),
        (function(expected="NaN"), "equals itself"), (function(expected=DEEP), "output of test 1 must be a JSON value"),
        ('[{"input": "1", "output": "1", "testtype": "stdin"}, {"input": "", "output": "", "testtype": "functional"}]',
         "fn_name if they are of a function"),
        (function().replace('}]', ', "testtype": "stdin"}, {"input": "1", "output": "1", "testtype": "functional"}]'),
         "one testtype"),
    ],
)  # fmt: skip
def test_labels_that_no_program_can_pass_are_found_before_the_run(label, why):
    with pytest.raises(ValueError, match=why):
        code.check_label(label)


def test_labels_that_can_be_passed():
    for label in (DOUBLE, FUNCTION, json.loads(DOUBLE), json.loads(FUNCTION), function("1\n\n[2]", "9" * 9000)):
        code.check_label(label)
    metadata = {"public_test_cases": json.dumps(json.loads(FUNCTION)["tests"]), "metadata": '{"func_name": "double"}'}
    code.check_label(json.dumps(metadata))
    assert judged(DOUBLES, json.dumps(metadata))[0] and judged(DOUBLES, json.loads(FUNCTION))[0]
