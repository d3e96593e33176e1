"""Multiple choice: the ways people and models name an option, and what names none."""

import pytest
from common import asked

from sdpo_plugin.environments import choice

NAMES = [
    ("The answer is: B", "B"), ("**B.**", "B"), ("(b)", "B"), ("Option B is correct", "B"),
    ("Final answer: B) Paris", "B"), ("\\boxed{\\textbf{B}}", "B"), ("I choose B", "B"), ("Answer: **(B)**", "B"),
    ("So...\n\nB", "B"), ("The correct answers are A and C.", "AC"), ("AC", "AC"), ("Answer: AC", "AC"),
    ("\\boxed{A, C}", "AC"), ("<answer>A, C</answer>", "AC"), ("<answer>C, A</answer>", "AC"),
    ("\\boxed{\\text{(B)}}", "B"), ("$\\boxed{\\mathrm{B}}$", "B"), ("\\boxed{\\textbf{(B) }\\frac{1}{2}}", "B"),
    ("\\boxed{B. Paris}", "B"), ("\\boxed{\\text{B) Paris}}", "B"), ("\\[\\boxed{B}\\]", "B"),
    ("The correct option is (b).", "B"), ("The correct choice is **B**: Paris.", "B"),
    ("The best answer is B because it is.", "B"), ("answer: b", "B"), ("the answer is b.", "B"),
    ("The answer is (A).", "A"), ("The answer is A.", "A"), ("The answer is **A**", "A"),
    ("The answer is A because of it", "A"), ("the answer is a.", "A"), ("Answer: a", "A"), ("Answer: A", "A"),
    ("option a", "A"), ("(A)", "A"), ("a)", "A"), ("A", "A"), ("**Answer:** B", "B"), ("**Answer: B**", "B"),
    ("### Answer\n\nB", "B"), ("**Final Answer**\n\nB", "B"), ("Final Answer: \\boxed{C}", "C"), ("ANSWER: D", "D"),
    ("#### D", "D"), ("The answer is option C.", "C"), ("The correct answer is option (C)", "C"),
    ("Therefore, the answer is C", "C"), ("Thus the correct answer to this question is D.", "D"),
    ("(B) is the correct answer.", "B"), ("B is the correct answer", "B"), ("Therefore, B is correct.", "B"),
    ("I would go with option D.", "D"), ("I'd pick (D).", "D"), ("My choice: D", "D"), ("So B.", "B"),
    ("Hence, (C)", "C"), ("B) Paris", "B"), ("B. Paris", "B"), ("(B) Paris", "B"), ("B: Paris", "B"), ("- B", "B"),
    ("> **B**", "B"), ("Option B", "B"), ("Choice (B).", "B"), ("答案是B。", "B"), ("故选C", "C"), ("正确答案：D", "D"),
    ('The answer is "B".', "B"), ("The answer is `B`", "B"), ("The answer is\nB", "B"),
    ("The answer is:\n\n**B**", "B"), ("The answer is A. No: the answer is D", "D"),
    ("A is tempting.\n\\boxed{C}", "C"), ("<answer>d</answer>", "D"), ("<answer>\nC: iron\n</answer>", "C"),
    ("<answer>B", "B"), ("<think>the answer is A</think>B", "B"), ("The answer is A and C.", "AC"),
    ("\\boxed{A} and the rest", "A"), ("The answer is [B]", "B"), ("The answer is {B}", "B"), ("Answer - B", "B"),
    ("answer = B", "B"), ("The answer would be E.", "E"), ("Statement I is false. The answer is C.", "C"),
    ("The answer must be C since a is b", "C"), ("A and C are correct.", "AC"), ("Options A and C are correct", "AC"),
    ("The answer is A, C", "AC"), ("A, B and D", "ABD"), ("A,B,D", "ABD"), ("**(C)** 42", "C"),
    ("The answer is $\\boxed{\\text{D}}$.", "D"), ("The answer is $B$.", "B"), ("The answer is \\( B \\).", "B"),
    ("\\boxed{ B }", "B"), ("\\boxed{b}", "B"), ("\\boxed{a}", "A"), ("Answer:B", "B"), ("Answer: B, because", "B"),
    ("Answer: B\n\nExplanation: A is the first letter. C is wrong.", "B"),
    ("The answer is B.\n\nA is wrong because it is a dog.", "B"), ("Correct answer: C\nThanks", "C"),
    ("I select C", "C"), ("We select option C", "C"), ("The answer is C) 5", "C"),
    ("Let me think. Option A is wrong. Option D is the best choice.", "D"), ("The right answer is clearly D", "D"),
]  # fmt: skip
NAMES_NOTHING = [
    "I take C", "A or B", "", "<answer>Because</answer>", "the answer is Apple", "The answer is a dog",
    "The answer is a", "so it is a", "A dog is an animal.", "The answer is: A dog", "I do not know",
    "The answer is not B", "Option B is incorrect.", "Option B is not correct", "The answer is Paris",
    "The answer is DNA", "Answer: C++", "Vitamin C is good", "The answer is E = mc^2", "A. x\nB. y\nC. z\nD. w",
    "The options are A) x B) y", "Options: A) x, B) y", "The answer is A or B", "The answer is A/B", "\\boxed{42}",
    "\\boxed{x = 5}", "\\boxed{\\frac{1}{2}}", "Either A or C", "I think so", "A cell wall",
    "The answer is I do not know", "It is a B-cell.", "The answer is a b-cell", "Plan B failed.",
    "Answer: I think it is hard", "\\boxed{}", "<answer></answer>", "Answer:", "We choose a number",
    "We choose n objects", "I am", "Answer: A cell wall", "<answer>A cell wall</answer>", "D'Artagnan",
    "The answer is B-12", "In conclusion, A is like B", "None of them",
]  # fmt: skip
LABELS = [
    ("B", "B"), ("(B)", "B"), ("b", "B"), ("B.", "B"), ("B. Paris", "B"), ("B) Paris", "B"), ("AC", "AC"),
    ("CA", "AC"), ("A, C", "AC"), ("A,C", "AC"), ("A and C", "AC"), ("\\boxed{B}", "B"), ("$B$", "B"),
    ("\\text{(B)}", "B"), ("Answer: B", "B"), ("The answer is B", "B"), ("#### B", "B"), ("(A) Paris", "A"),
    ("A. a dog", "A"), ("a", "A"), ("[A, C]", "AC"), ('["A", "C"]', "AC"), (['A', 'C'], "AC"), ("B\n", "B"),
    ("B: Paris", "B"), ("Option B", "B"), ("(b)", "B"), ("A;C", "AC"), ("ABCD", "ABCD"), ("B - Paris", "B"),
]  # fmt: skip
NO_LABELS = ["1", 1, "Paris", "", None, "A dog", "DNA1", "A or B", "AA", True, "The cat", "apple", []]


@pytest.mark.parametrize("response, letters", NAMES)
def test_the_choice_of_a_response(response, letters):
    assert choice.choice(response) == letters


@pytest.mark.parametrize("response", NAMES_NOTHING)
def test_a_response_without_a_choice(response):
    assert choice.choice(response) is None


@pytest.mark.parametrize("label, letters", LABELS)
def test_the_letters_of_a_label(label, letters):
    assert choice.letters_of(label) == letters
    choice.check_label(label)


@pytest.mark.parametrize("label", NO_LABELS)
def test_a_label_that_names_no_option(label):
    with pytest.raises(ValueError, match="a label must be the letter of an option, such as B, or letters, not "):
        choice.check_label(label)


def test_several_letters_are_all_to_be_named():
    assert asked(choice, "The correct options are C and A.", "A, C") == (1.0, None)
    assert asked(choice, "The answer is A.", "AC") == (0.0, "The choice A is wrong.")
    assert asked(choice, "\\boxed{ABC}", "AC", detail="expected")[1] == "The choice ABC is wrong. Right is AC."


def test_a_label_that_names_no_option_is_named_where_it_is_met():
    with pytest.raises(ValueError, match="a label must be the letter of an option, such as B, or letters, not '1'"):
        choice.reward_func(["Q\\boxed{B}"], ["Q"], ["1"])
