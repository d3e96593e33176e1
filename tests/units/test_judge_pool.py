"""Judges run in processes that can be killed; what a response does there ends neither the engine nor the run."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdpo_plugin.environments import judge_pool
from sdpo_plugin.environments.judge_pool import LENGTH, MEMORY, Pool

HOSTILE = "\\boxed{9^{9^{9^{9}}}}"


@pytest.fixture
def pool():
    made = Pool(2, seconds=0.5)
    yield made
    for worker in made.idle:
        worker.end()


def judged(pool, response, label="7"):
    return pool.judge("maths", {"detail": "outcome"}, response, label)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


def test_a_judgement_without_end_is_killed_and_the_next_is_right(pool):
    """Starts two processes that import sympy."""
    assert judged(pool, "\\boxed{7}") == (1.0, None)
    (first,) = pool.idle
    assert judged(pool, HOSTILE) == (0.0, "The response could not be judged: that takes more than 0.5 s.")
    assert not alive(first.process.pid)
    assert judged(pool, "\\boxed{7}") == (1.0, None)
    assert judged(pool, "\\boxed{8}") == (0.0, "The final answer 8 is wrong.")


def test_other_threads_go_on_meanwhile(pool):
    ticks = []
    thread = threading.Thread(target=judged, args=(pool, HOSTILE))
    thread.start()
    while thread.is_alive():
        ticks.append(time.monotonic())
        time.sleep(0.01)
    # One that held the interpreter would do so for seconds; a loaded machine pauses a thread for half of one.
    assert max(b - a for a, b in zip(ticks, ticks[1:], strict=False)) < 2.0


def test_a_process_is_reused_and_knows_neither_torch_nor_open_files(pool):
    with open(__file__) as kept:
        os.set_inheritable(kept.fileno(), True)
        with ThreadPoolExecutor(8) as threads:
            rewards = list(threads.map(lambda n: judged(pool, f"\\boxed{{{n}}}", "7")[0], range(20)))
        assert rewards == [float(n == 7) for n in range(20)]
        assert 1 <= len(pool.idle) <= 2
        for worker in pool.idle:
            proc = Path(f"/proc/{worker.process.pid}")
            assert "libtorch" not in (proc / "maps").read_text()
            assert len(os.listdir(proc / "fd")) == 4  # stdin, stdout, stderr, and the connection


def test_a_response_too_long_to_be_judged_gets_a_message(pool):
    told = f"The response is too long to be judged: {LENGTH + 1} characters; at most {LENGTH} are read."
    assert judged(pool, "1" * (LENGTH + 1)) == (0.0, told)
    assert not pool.idle


def test_memory_is_bounded(pool):
    pool.judge("choice", {}, "\\boxed{B}", "B")
    limits = Path(f"/proc/{pool.idle[0].process.pid}/limits").read_text()
    assert next(line for line in limits.splitlines() if "address space" in line).split()[3] == str(MEMORY)


PARENT = """
import sys, threading, time
from sdpo_plugin.environments.judge_pool import Pool
pool = Pool(2, seconds=1.5)
pool.judge("maths", {}, "\\\\boxed{7}", "7")
(worker,) = pool.idle
if sys.argv[1] == "busy":
    threading.Thread(target=pool.judge, args=("maths", {}, "\\\\boxed{9^{9^{9^{9}}}}", "7"), daemon=True).start()
    time.sleep(0.3)
print(worker.process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_a_process_ends_with_its_parent(state):
    """Also where the parent is killed; a busy one at the end of its time, here 1.5 s."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, state], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    assert alive(worker)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert gone(worker, 60.0)  # of wall time; on a busy machine its 1.5 s take longer


def test_a_fork_has_workers_of_its_own():
    from sdpo_plugin.environments.judge_pool import POOL

    assert POOL.judge("choice", {}, "\\boxed{B}", "B") == (1.0, None)
    before = [worker.process.pid for worker in POOL.idle]
    child = os.fork()
    if child == 0:
        own = not POOL.idle and POOL.judge("choice", {}, "\\boxed{C}", "B")[0] == 0.0
        for worker in POOL.idle:
            worker.end()
        os._exit(0 if own else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert POOL.judge("choice", {}, "\\boxed{B}", "B") == (1.0, None)
    assert [worker.process.pid for worker in POOL.idle] == before


def test_what_cannot_judge_raises(pool):
    with pytest.raises(RuntimeError, match="maths.py cannot judge: TypeError: make.. got an unexpected keyword"):
        pool.judge("maths", {"colour": "red"}, "\\boxed{7}", "7")
    with pytest.raises(RuntimeError, match="nowhere.py cannot judge: ModuleNotFoundError"):
        pool.judge("nowhere", {}, "", "")


def raising(error, of_label=False):
    def judge(response, label):
        if response or of_label:
            raise error
        return 0.0, "empty"

    return judge


@pytest.mark.parametrize("error", [RecursionError(), StopIteration(), KeyError("x"), ZeroDivisionError()])
def test_what_a_judge_raises_over_a_response_is_no_reward(error):
    feedback = f"The response could not be judged ({type(error).__name__})."
    assert judge_pool._judged(raising(error), "7", "7") == {"reward": 0.0, "feedback": feedback}


def test_what_a_judge_raises_over_a_label_names_it():
    assert judge_pool._judged(raising(ValueError("no label"), True), "7", "7") == {"label": "no label"}
    named = {"label": "StopIteration for the label '[{}]': "}
    assert judge_pool._judged(raising(StopIteration(), True), "7", "[{}]") == named
    with pytest.raises(ValueError, match=r"a label must be a JSON list of calls.*not '\[\{\}\]'"):
        Pool(1).judge("tools", {}, "[f()]", "[{}]")


def test_a_process_that_ran_out_of_memory_is_replaced(pool):
    answer = judge_pool._judged(raising(MemoryError()), "7", "7")
    assert answer["reward"] == 0.0 and "too much memory" in answer["feedback"] and answer["spent"]


def test_a_library_that_is_missing_is_an_error():
    assert judge_pool._judged(raising(ImportError("no sympy")), "7", "7") == {"environment": "ImportError: no sympy"}
