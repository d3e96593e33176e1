"""What a model may write: it takes linear time to read, and no judge raises, stalls or is wrong over it."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
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
PIECES = (
    " ", "\n", "\t", "a", "A", "I ", "1", "1 ", "1,", ".", "-", "<", ">", "[", "]", "{", "}", "(", ")", "$", "*",
    "_", "`", "#", "\\", "\\boxed{", "\\boxed", "\\text{", "\\(", "\\[", "\\left(", "\\frac{", "<answer>",
    "</answer>", "</think>", "<pad>", "<|im_end|>", "answer", "answer is ", "Answer: ", "the answer is A ",
    "and ", " or ", "A, ", "A and ", "(A) ", "Option ", "is correct", "\0", "\ud800", "\u200b", "｜", "选", "9^",
    "!", "~", "\r\n", "e", "\\%", "x = ",
)  # fmt: skip
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


NESTED = 400
HOSTILE = [
    *(piece * (10_000 // len(piece)) for piece in PIECES),
    *(f"\\boxed{{{piece * (1_900 // len(piece))}}}" for piece in PIECES),
    *(f"\\boxed{{{begin * NESTED}1{end * NESTED}}}" for begin, end in ("()", "[]", "{}", ("\\{", "\\}"), ("|", "|"))),
    *(f"\\boxed{{{begin * 200}1{'}' * 200}}}" for begin in ("\\sqrt{", "\\frac{1}{", "2^{", "\\text{", "\\boxed{")),
    "\\boxed{9^{9^{9}}}", "\\boxed{2^{10000000000}}", "\\boxed{10^{-10^{10}}}", "\\boxed{100000000!}", "\\boxed{9!!!!!}",
    "\\boxed{\\binom{10^{9}}{10^{8}}}", "\\boxed{\\prod_{i=1}^{10^9} i}", "\\boxed{\\int_0^1 x^x dx}", "\\boxed{1e999}",
    f"\\boxed{{{'9' * 1_900}}}", f"\\boxed{{0.{'3' * 1_900}}}", f"\\boxed{{{'7,' * 900}}}", "\\boxed{NaN}", "\\boxed{\\infty}",
    "\\boxed{\ud800}", "\\boxed{\0}", "\ud800" * 50, "\0" * 50, "\\boxed{" + "x" * 100 + "}", "\\boxed{__import__('os')}",
    "x" * 1_000_000, "\\boxed{" * 100_000, "\n" * 1_000_000, "9" * 1_000_000, "\u202e7", "\\boxed{０}", "",
]  # fmt: skip


@pytest.mark.parametrize("environment, label", [("choice", "AC"), ("maths", "\\frac{\\pi}{7}")])
def test_a_hostile_response_gets_no_reward_and_a_word(environment, label):
    """Takes half a second for each of the few that never end, and as long to start a process after it."""
    pool = Pool(2, seconds=0.5)
    with ThreadPoolExecutor(2) as threads:
        for response, (reward, told) in zip(
            HOSTILE, threads.map(lambda response: pool.judge(environment, {}, response, label), HOSTILE), strict=True
        ):
            assert reward == 0.0 and told, response[:80]
    assert pool.judge(environment, {}, f"\\boxed{{{label}}}", label) == (1.0, None)
    for worker in pool.idle:
        worker.end()
