"""What a model may write: it takes linear time to read, and no judge raises, stalls or is wrong over it."""

import time

import pytest
from hostile import HOSTILE, NEVER_END, PIECES
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo_plugin.environments import answers, choice, conclusion, feedback, maths
from sdpo_plugin.environments.judge_pool import Pool

READERS = {
    "response_of": lambda text: feedback.response_of(f"Q{text}", "Q"),
    "response_of, prompt cut": lambda text: feedback.response_of(text, "Which one? " * 20),
    "cut": lambda text: feedback.cut(text, 300),
    "choice": choice.choice,
    "boxes": conclusion.boxes, "tagged": conclusion.tagged, "announced": conclusion.announced,
    "end_of": conclusion.end_of, "last_line": conclusion.last_line, "answer": maths.answer,
    "cleaned": lambda text: answers.cleaned(text[:answers.LONGEST]),
    "equal to a word": lambda text: answers.equal("Evelyn", text),
}  # fmt: skip
LENGTH = 8_000  # half of it, and it whole, are below the part that is read


def seconds(reader, text):
    """The least of three, in the time of this process: other processes do not count."""
    taken = []
    for _ in range(3):
        began = time.process_time()
        reader(text)
        taken.append(time.process_time() - began)
    return min(taken)


@pytest.mark.parametrize("name", READERS)
def test_twice_the_text_takes_no_more_than_twice_the_time(name):
    """With three for two, and 10 ms for what a clock misses; quadratic readers took 5 to 30 s on 30,000 characters."""
    reader = READERS[name]

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join), st.sampled_from(PIECES))
    def check(piece, end):
        half, whole = (piece * (n // len(piece)) + end for n in (LENGTH // 2, LENGTH))
        assert seconds(reader, whole) <= 3 * seconds(reader, half) + 0.01

    for piece in PIECES:
        assert seconds(reader, piece * (4 * LENGTH // len(piece))) < 0.5
    check()


@pytest.mark.parametrize("environment, label", [("choice", "AC"), ("maths", "\\frac{\\pi}{7}")])
def test_a_hostile_response_gets_no_reward_and_a_word(environment, label):
    """Seconds: a response that never ends takes half a second, and a process is started after it."""
    pool = Pool(1, seconds=0.5)
    for response in (*HOSTILE, NEVER_END[0]):
        reward, told = pool.judge(environment, {}, response, label)
        assert reward == 0.0 and told, response[:80]
    assert pool.judge(environment, {}, f"\\boxed{{{label}}}", label) == (1.0, None)
    for worker in pool.idle:
        worker.end()
