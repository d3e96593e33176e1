"""What `make study` rewards, tells and counts."""

import sys
from math import inf
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "slow")]
import study  # noqa: E402
import vault_rewards  # noqa: E402


def judged(answers, **settings):
    queries = [f"<|assistant|>{answer}<|end|>" for answer in answers]
    found = vault_rewards.make(**settings)(queries, ["<|assistant|>"] * len(answers), ["4821"] * len(answers))
    return found["rewards"].tolist(), found["feedback"]


def test_rewards_are_for_the_whole_code_its_first_digit_or_each_right_digit():
    answers = ["4821", "4120", "1821", ""]
    assert judged(answers, reward=vault_rewards.whole)[0] == [1, 0, 0, 0]
    assert judged(answers, reward=vault_rewards.first_digit)[0] == [1, 1, 0, 0]
    assert judged(answers)[0] == [1, 0.5, 0.75, 0]


def test_feedback_gives_the_code_or_only_which_digits_are_right():
    assert judged(["4821", "4120"])[1] == [None, "expected 4821, got 4120"]
    assert judged(["4120"], told=vault_rewards.marks)[1] == ["expected 4?2?, got 4120"]
    assert judged(["4120"], told=None)[1] == [None]
    drawn = [feedback.split()[1].rstrip(",") for feedback in judged(["4120"] * 300, told=vault_rewards.other_digits)[1]]
    assert {(code[0], code[2]) for code in drawn} == {("4", "2")}
    assert {code[1] for code in drawn} == set("023456789") and {code[3] for code in drawn} == set("123456789")


def test_a_share_of_the_feedback_is_wrong():
    told = judged(["0000"] * 400, wrong=0.5)[1]
    assert 120 < sum("expected 4821" in feedback for feedback in told) < 280 and len(set(told)) > 50
    assert set(judged(["0000"] * 100, wrong=0.5, stubborn=True)[1]) == {
        "expected 4821, got 0000", "expected 9376, got 0000",
    }  # fmt: skip


def test_generations_are_counted_as_far_as_the_mean_of_grpo_at_its_end():
    def run(name, seed, *values):
        accuracy = [[step, value] for step, value in zip(range(10, 70, 10), values, strict=True)]
        return {"name": name, "seed": seed, "wall_s": 60.0, "accuracy": accuracy}

    task = "partial reward"
    grpo, sdpo = f"grpo, {task}", f"sdpo, {task}"
    found = {
        grpo: [run(grpo, 1, 0, 0, 0, 0.1, 0.4, 0.4), run(grpo, 2, 0, 0, 0, 0, 0, 0.2)],
        sdpo: [run(sdpo, 1, 0.3, 0.4, 0.6, 1, 1, 1), run(sdpo, 2, 0, 0, 0.3, 1, 1, 1)],
    }
    assert study.generations_to(found[grpo][1], 0.3) == inf
    table = study.core_table(found, task)
    assert "GRPO ends at 30%" in table
    # Seed 1: 4,800 against 960; seed 2: never, so all of 5,760, against 2,880.
    assert "| 1,920 (960–2,880) | 3.5 (2.0–5.0) |" in table.splitlines()[-1]
