"""Generated reasoning tasks: rewards, what is said of wrong answers, data sets, and answers that mean harm."""

import inspect
import itertools
import json
import re
import subprocess
import sys
import time

import pytest
from common import asked

pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'openrlhf-sdpo[reasoning]'")

from reasoning_gym.factory import CURRICULA, DATASETS  # noqa: E402

from sdpo_plugin.environments import reasoning  # noqa: E402


def label_of(name, answer, metadata=None, **parameters):
    entry = {"question": "?", "answer": answer, "metadata": metadata or {}}
    return json.dumps({"name": name, "parameters": parameters, "entry": reasoning._packed(entry)})


SUM = label_of("chain_sum", "42")
COUNTDOWN = label_of("countdown", "82 + 20 + 67 - 50", {"numbers": [67, 50, 20, 82], "target": 119})
MINI = label_of("mini_sudoku", "2 4 1 3\n3 1 4 2\n4 2 3 1\n1 3 2 4", {
    "puzzle": [[0, 0, 1, 0], [0, 0, 4, 2], [4, 0, 0, 0], [0, 3, 2, 4]],
    "solution": [[2, 4, 1, 3], [3, 1, 4, 2], [4, 2, 3, 1], [1, 3, 2, 4]],
})  # fmt: skip
GRAPH = label_of("graph_color", None, {"puzzle": {"vertices": [0, 1], "edges": [(0, 1)], "color_options": [1, 2]}})


@pytest.mark.parametrize(
    "label, answer, told",
    [
        (SUM, "43", "The answer 43 is wrong. It is too large."),
        (SUM, "-4", "The answer -4 is wrong. It is too small."),
        (SUM, "many", "The answer many is wrong. It is not a number."),
        (SUM, "so 42", "The answer so 42 is wrong. It scores 0.40 of 1. It is not a number."),
        (label_of("spell_backward", "olleh"), "hello", "The answer hello is wrong."),
        (label_of("aiw", "b c d"), "b x d", "The answer b x d is wrong. The first wrong word is number 2."),
        (label_of("aiw", "b c d"), "b", "The answer b is wrong. It has 1 word; it takes 3."),
        (label_of("aiw", "b\nc"), "b\nd", "The answer is wrong. The first wrong line is number 2."),
        (COUNTDOWN, "82 + 20", "It scores 0.05 of 1. It uses 20, 82; given are 20, 50, 67, 82."),
        (COUNTDOWN, "82 + 20 + 67 + 50",
         "The answer 82 + 20 + 67 + 50 is wrong. It scores 0.05 of 1. Its value is 219, not 119."),
        (MINI, "2 4 1 3\n3 1 4 2\n4 2 3 1\n1 3 2 2", "Row 4, column 4 was given as 4."),
        (MINI, "2 4 1 3\n3 1 4 2\n4 1 3 1\n1 3 2 4", "The number 1 stands 2 times in row 3."),
        (MINI, "2 4 1 3\n1 3 4 2\n4 1 3 2\n1 3 2 4", "The number 1 stands 2 times in column 1."),
        (MINI, "2 4 1", "It is not a grid of 4 lines with 4 numbers each."),
        (MINI, "two", "It is not of the form that the question asks for."),
        (GRAPH, '{"0": 1, "1": 1}', "Adjacent vertices 0 and 1 both have color 1."),
        (GRAPH, '{"0": 1}', "missing vertex 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_reported_and_the_answer_is_not(label, answer, told):
    reward, feedback = asked(reasoning, f"I think.\n<answer>{answer}</answer>", label)
    assert reward < 1 and told in feedback
    right = json.loads(label)["entry"]["answer"]
    if right is not None:
        assert right not in feedback.replace(answer, "")
        assert right in asked(reasoning, f"<answer>{answer}</answer>", label, detail="expected")[1]
    shortest = asked(reasoning, f"<answer>{answer}</answer>", label, detail="outcome")[1]
    assert re.fullmatch(r"The answer .*is wrong\.( It scores 0\.\d\d of 1\.)?", shortest, re.DOTALL)


def test_the_reward_is_the_scorers():
    assert asked(reasoning, "<answer>1</answer> no, <answer> 42 </answer>", SUM) == (1.0, None)
    assert asked(reasoning, "<answer>so 42</answer>", SUM)[0] == pytest.approx(0.4)
    raises = label_of("prime_factorization", "2 × 3")  # the scorer, for what is no number
    assert asked(reasoning, "<answer>nonsense</answer>", raises) == (0.0, "The answer nonsense is wrong.")
    for response in ("42", "<answer></answer>", "<answer>42"):
        assert asked(reasoning, response, SUM) == (
            0.0, "The response has no answer: end it with <answer>, the answer alone, and </answer>."
        )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "chain_sum", "arc_1d", "rearc", "arc_agi", "countdown", "word_ladder", "knights_knaves", "simple_integration",
        "polynomial_multiplication", "time_intervals",
    ],
)  # fmt: skip
def test_right_answers_of_a_data_set_are_right(name):
    """Also where the scorer compares tuples, which JSON does not have, reads its configuration, or evaluates."""
    for level in (None, 1):
        made = list(reasoning.rows(name, size=3, seed=5, level=level))
        assert made == list(reasoning.rows(name, size=3, seed=5, level=level))
        for row in made:
            assert [m["role"] for m in row["prompt"]] == ["system", "user"]
            assert "<answer>" in row["prompt"][0]["content"]
            answer = json.loads(row["label"])["entry"]["answer"]
            assert asked(reasoning, f"<answer>{answer}</answer>", row["label"]) == (1.0, None)


def test_levels_and_parameters():
    def terms(**options):
        made = [json.loads(row["label"])["entry"] for row in reasoning.rows("chain_sum", 20, **options)]
        return max(entry["metadata"]["num_terms"] for entry in made)

    without = next(name for name in DATASETS if name not in CURRICULA and name != "composite")
    assert terms(level=0) < terms(level=3) and terms(min_terms=9, max_terms=9) == 9
    assert terms(level=3, min_terms=2, max_terms=2) == 2
    for name, options, told in (
        ("nope", {}, "reasoning-gym has no task nope; it has ab, acre, "),
        ("chain_sum", {"terms": 3}, "chain_sum has no parameter terms; it has min_terms, "),
        ("chain_sum", {"min_terms": -1}, "chain_sum cannot be made with {'min_terms': -1}: "),
        (without, {"level": 1}, f"{without} has no curriculum"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            list(reasoning.rows(name, 1, **options))


def test_the_command(capsys):
    reasoning.main(["chain_sum", "min_terms=2", "max_terms=2", "gcd", "--size", "2", "--level", "0", "1"])
    made = [json.loads(json.loads(line)["label"]) for line in capsys.readouterr().out.splitlines()]
    assert [m["name"] for m in made] == ["chain_sum", "chain_sum", "gcd", "gcd"] * 2
    assert all(m["entry"]["metadata"]["num_terms"] == 2 for m in made if m["name"] == "chain_sum")
    with pytest.raises(SystemExit):
        reasoning.main(["min_terms=2", "chain_sum"])
    assert "min_terms=2 stands before the name of a task" in capsys.readouterr().err


# ── labels and odd answers ──


@pytest.mark.parametrize("name", ["chain_sum", "graph_color", "intermediate_integration", "rubiks_cube"])
def test_labels_of_a_data_set_can_be_met(name):
    for row in reasoning.rows(name, 5):
        reasoning.check_label(row["label"])


@pytest.mark.parametrize(
    "label, told",
    [
        (3, "a label must be JSON"), ("3", "a label must be JSON"), ("{}", "'name'"), ("[" * 5000, "a label must be"),
        (SUM.replace("chain_sum", "nope"), "Dataset 'nope' not registered"), (SUM.replace('"42"', "42"), "be text"),
        (SUM.replace("{}", '{"terms": 3}', 1), "unexpected keyword argument 'terms'"),
        (SUM.replace('"parameters": {}', '"parameters": {"min_terms": -1}'), "a label must be JSON"),
        (label_of("countdown", "1 + 1", {"numbers": [1, 2], "target": 3}),
         "the answer of the label itself, '1 + 1', scores 0.05 of 1 in countdown"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_met(label, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        reasoning.check_label(label)


@pytest.mark.parametrize(
    "label, answer, told",
    [
        (GRAPH, "[" * 5000, "It is not of the form that the question asks for."),
        (GRAPH, '{"0": NaN, "1": 1e999}', "The answer"), (SUM, "1e999999999", "It is too large."),
        (SUM, "NaN", "not a number"),
        (COUNTDOWN, "9" * 5000, "The answer is wrong."), (MINI, "9" * 5000, "It is not of the form"),
        (SUM, "1 " * 10_000, "The answer is wrong. It is too long: it has 19999 characters."),
    ],
)  # fmt: skip
def test_odd_answers(label, answer, told):
    reward, feedback = asked(reasoning, f"<answer>{answer}</answer>", label)
    assert reward <= 0.01 and told in feedback


def test_where_the_answer_is():
    from reasoning_gym.utils import extract_answer

    tags = ["<answer>", "</answer>", "a", " ", "\n"]
    for parts in itertools.product(tags, repeat=5):
        text = "".join(parts)
        assert reasoning.answer_of(text) == (extract_answer(text) or ""), text


# ── answers that mean harm: some scorers evaluate them ──


def test_every_scorer_that_evaluates_answers_is_known():
    questions_only = {"codeio", "number_sorting"}  # or right answers
    for name, (kind, _) in DATASETS.items():
        if re.search(r"\b(eval|exec|parse_expr|sympify)\(", inspect.getsource(kind)):
            assert name in reasoning.EVALUATED.keys() | questions_only, name


HARM = "__import__('pathlib').Path({!r}).write_text('x')"


@pytest.mark.parametrize("name", sorted(reasoning.EVALUATED))
def test_no_answer_is_executed(name, tmp_path):
    row = next(reasoning.rows(name, 1))
    planted = tmp_path / "planted"
    for answer in (HARM.format(str(planted)), f"[{HARM.format(str(planted))}]", f"5 + {HARM.format(str(planted))}"):
        reward, told = asked(reasoning, f"<answer>{answer}</answer>", row["label"])
        assert reward < 0.1 and told and not planted.exists()


@pytest.mark.parametrize("answer", ["entry['answer']", "oracle_answer", "answer", "[c for c in oracle_answer]"])
@pytest.mark.parametrize("name", ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens"])
def test_no_answer_names_the_right_one(name, answer):
    row = next(reasoning.rows(name, 1))
    assert asked(reasoning, f"<answer>{answer}</answer>", row["label"])[0] == 0.0


def test_no_answer_takes_for_ever():
    bombs = {
        "countdown": "9**9**9**9", "puzzle24": "(9**99)**99**9", "polynomial_multiplication": "(a+b+c+d+e+f)**99",
        "simple_integration": "99999999!", "spiral_matrix": "[0]*9**9**9", "rubiks_cube": "R999999999",
    }  # fmt: skip
    for name, bomb in bombs.items():
        row = next(reasoning.rows(name, 1))
        began = time.monotonic()
        assert asked(reasoning, f"<answer>{bomb}</answer>", row["label"])[0] < 0.1 and time.monotonic() - began < 5


@pytest.mark.parametrize(
    "answer, allowed",
    [
        ("-9*x**8/10 + 3*x**4/2 + C", True), ("2*(-10*x - 10)**(3/2)/3 + C", True), ("exp(3 - 10*x)*sin(x) + pi", True),
        ("E**(x) + C", True), ("f(x)", False), ("x.real", False), ("'a'*3", False), ("x if x else 1", False),
        ("x**'a'", False), ("lambda: 1", False), ("open", False), ("2x", False), ("x**2**2", False),
        ("(x**40)**40", False),
    ],
)  # fmt: skip
def test_what_is_an_expression(answer, allowed):
    assert reasoning.EVALUATED["simple_integration"](answer) == allowed


def test_the_module_runs_as_a_command():
    command = [sys.executable, "-m", "sdpo_plugin.environments.reasoning", "gcd", "--size", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(json.loads(ran.stdout)["label"])["name"] == "gcd"


def test_the_first_calls_may_come_together():
    """As in an engine: each in a thread, before anything of reasoning-gym is imported."""
    code = f"""if True:
        import threading, time
        import torch
        from sdpo_plugin.environments.reasoning import reward_func

        def ask(i):
            time.sleep(i / 100)
            print(reward_func(["<answer>43</answer>"], [""], [{SUM!r}])["feedback"][0] + "\\n", end="")

        threads = [threading.Thread(target=ask, args=[i]) for i in range(30)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["The answer 43 is wrong. It is too large."] * 30, done.stderr[-2000:]
