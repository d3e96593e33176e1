"""Maths: labels as real files have them, answers as models give them, and what neither may do."""

import pytest

from sdpo_plugin.environments import answers, conclusion, maths

judge = maths.make().judge  # in this process; the worker's start would be most of the time

# (label, response); labels as in GSM8K, AIME, AMC, MATH, Minerva, OlympiadBench, Gaokao, ASDiv and College Math.
RIGHT = [
    (r"$4 \frac{4}{9}$ days", r"**Final Answer:** $4 \frac{4}{9}$ days"), (r"\text{Evelyn}", "Final Answer: Evelyn"),
    ("Evelyn", r"The answer is $\text{Evelyn}$."), ("Evelyn", r"\boxed{evelyn}"),
    ("18", "The answer is 18 dollars per day."), ("18", "The answer is $18 per day."),
    ("18", "She makes $18. So the answer is: $18"), ("18", "#### 18"), ("Janet sells.\n#### 1,234", r"\boxed{1234}"),
    ("1,234", r"\boxed{1,234}"), ("1234", "the answer is 1,234."), ("1234", r"\boxed{1\,234}"),
    ("1234", r"\boxed{1{,}234}"), (r"10,\!080", r"\boxed{10080}"),
    (r"11,\! 111,\! 111,\! 100", r"\boxed{11111111100}"), (r"\$32,\!348", r"\boxed{\$32{,}348}"),
    (r"\$18.90", r"\boxed{18.9}"), (r"\$18.90", r"\boxed{18.90 \text{ dollars}}"), (r"58\%", r"\boxed{58\%}"),
    (r"58\%", r"\boxed{58}"), (r"58\%", r"\boxed{0.58}"), ("58%", "The answer is 58 percent."),
    ("58", r"\boxed{58\%}"), (r"90^\circ", r"\boxed{90}"), ("90", r"\boxed{90^{\circ}}"),
    ("90", "The answer is 90°."), (r"90^\circ", "The answer is 90 degrees."),
    (r"\frac{270}7\text{ degrees}", r"\boxed{\frac{270}{7}}"), (r"5.4 \text{ cents}", r"\boxed{5.4}"),
    (r"15\mbox{ cm}^2", r"\boxed{15}"), (r"864 \mbox{ inches}^2", r"\boxed{864 \text{ in}^2}"),
    (r"\frac{1}{2}", r"\boxed{0.5}"), ("0.5", r"\boxed{\frac12}"), (r"\frac{1}{2}", "The answer is 1/2."),
    ("1/2", r"\boxed{\dfrac{2}{4}}"), (r"\frac{1}{3}", r"\boxed{0.3333333}"),
    (r"1\frac{4}{5}", r"\boxed{\frac{9}{5}}"), (r"137 \frac{1}{2}", r"\boxed{137.5}"),
    (r"\{1\pm\sqrt{5},-2\}", r"\boxed{-2, 1+\sqrt{5}, 1-\sqrt{5}}"),
    (r"1 \pm \sqrt{19}", r"\boxed{1+\sqrt{19}, 1-\sqrt{19}}"), ("1,-2", r"\boxed{-2, 1}"),
    ("1,-2", r"\boxed{-2 \text{ and } 1}"), ("3, 5, 7", r"\boxed{7,3,5}"),
    ("1,-2", r"$x=\boxed{1}$ or $x=\boxed{-2}$."), ("x=5", r"\boxed{5}"), ("5", r"\boxed{x=5}"),
    ("y = 2x + 3", r"\boxed{y=3+2x}"), (r"(2,\infty)", r"\boxed{(2, +\infty)}"),
    ("(3,4]", r"\boxed{\left(3,4\right]}"), (r"(-\infty, 2) \cup (3, \infty)", r"\boxed{(3,\infty)\cup(-\infty,2)}"),
    (r"(2,\infty)", r"\boxed{x>2}"), ("x > 2", r"\boxed{(2,\infty)}"), (r"x \in [-2,7]", r"\boxed{[-2,7]}"),
    ("[-2,7]", r"\boxed{-2\le x\le 7}"), (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3,\pi/2)}"),
    ("(6,31,-1)", r"\boxed{(6, 31, -1)}"),
    (r"\begin{pmatrix} -2 \\ -14 \end{pmatrix}", r"\boxed{\begin{pmatrix}-2\\-14\end{pmatrix}}"),
    ("52_8", r"\boxed{52_8}"), ("52_8", r"\boxed{52_{8}}"), ("52_8", r"\boxed{52}"), (r"\text{(C)}", r"\boxed{C}"),
    ("C", r"\boxed{\text{(C)}}"), ("4.5e33", r"\boxed{4.5 \times 10^{33}}"), ("4.5e33", r"\boxed{4.5e33}"),
    ("2.7778e-6", r"\boxed{2.7778\times10^{-6}}"), ("1e-5", r"\boxed{0.00001}"), (".35625", r"\boxed{0.35625}"),
    ("-1./3", r"\boxed{-\frac13}"), ("2k", r"\boxed{2k}"), ("3ab", r"\boxed{3ba}"), ("6 - 5i", r"\boxed{-5i+6}"),
    ("023", r"\boxed{23}"), ("23", r"\boxed{023}"), (27.0, r"\boxed{27}"), (13.5, r"\boxed{\frac{27}{2}}"),
    (27, "27"), ([45], r"\boxed{45}"), (['45'], r"\boxed{45}"), ("$5$;$10$", r"\boxed{5}, \boxed{10}"),
    ("$5$;$10$", "The answers are $5$ and $10$."), ("$5$;$10$", r"\boxed{5;10}"), ("0;3", r"\boxed{0, 3}"),
    (r"1;$\frac{8}{9}$", r"\boxed{1,\frac{8}{9}}"),
    (r"$y=\frac{1}{\mathrm{e}}x$;$y=-\frac{1}{\mathrm{e}}x$", r"\boxed{y=\frac{x}{e}; y=-\frac{x}{e}}"),
    ("$(1,1), (3,2)$", r"\boxed{(3,2),(1,1)}"), ("9 (apples)", r"\boxed{9}"),
    ("9 (apples)", "The answer is 9 apples."), ("6:7", r"\boxed{6:7}"),
    (r"$18 \mathrm{~min}$", r"\boxed{18\text{ minutes}}"),
    (r"$145 \pi / 72 \mathrm{~m} / \mathrm{s}$", r"\boxed{\frac{145\pi}{72}}"),
    ("No solution", r"\boxed{\text{no solution}}"), (r"\infty", r"\boxed{\infty}"),
    (r"\emptyset", r"\boxed{\emptyset}"), (r"10\text{ cm}", r"\boxed{10cm}"), ("10", r"\boxed{10 \, \text{km/h}}"),
    ("10", r"\boxed{10 \; \mathrm{m/s^2}}"), ("10", r"\boxed{10\ \text{m}^2}"), ("7", r"\boxed{7}\text{ cm}"),
    ("7", "<answer>7</answer>"), ("7", "<answer>The result is 7</answer>"),
    ("7", r"<think>\boxed{8}</think> The answer is 7."), ("7", "It is 3. x = 7"), ("7", "so $7$"),
    ("7", r"\boxed{\boxed{7}}"), ("7", r"\boxed 7"), ("7", r"\fbox{7}"), ("7", r"\boxed{8} no, \boxed{7}"),
    ("7", "**Answer: 7**"), ("7", "**7**"), ("7", "Answer:\n7"),
    ("7", r"The final answer is: $\boxed{7}$. I hope it is correct."), ("7", "答案是7。"), (r"\sqrt{3}", r"\boxed{√3}"),
    ("x^2", r"\boxed{x²}"), (r"\pi/2", r"\boxed{π/2}"), (r"\frac{\sqrt{3}}{3}", r"\boxed{\frac{1}{\sqrt{3}}}"),
    ("2^{1009}", r"\boxed{2^{1009}}"), ("$3$ and $5$", r"\boxed{3,5}"), ("15 and $22.5$", r"\boxed{15, 22.5}"),
    (r"$90^{\circ}$,$60^{\circ}$", r"\boxed{60^\circ, 90^\circ}"),
    (r"$\{x|-2\leq x < 1\}$", r"\boxed{\{x \mid -2 \leq x < 1\}}"), (r"$\{x|-2\leq x < 1\}$", r"\boxed{[-2,1)}"),
    (r"0.1\overline{6}", r"\boxed{\frac16}"), ("e^{-t/R}\n", r"\boxed{e^{-\frac{t}{R}}}"),
    (r"\frac{1}{2} x^{2}+C", r"\boxed{\frac{x^2}{2}+C}"), (r"25\%", r"The answer is $25\%$."),
    (r"25\%", "The answer is $25$%."), ("-3", "The answer is -3."), ("-3", r"\boxed{−3}"),
    (r"$1.76 \times 10^{-10}$", r"\boxed{1.76\cdot10^{-10}}"), ("2.7×10^9", r"\boxed{2700000000}"),
]  # fmt: skip
WRONG = [
    ("Evelyn", r"\boxed{Navin}"), ("listen", r"\boxed{silent}"), ("18", "The answer is 16."),
    (r"58\%", r"\boxed{59\%}"), (r"90^\circ", r"\boxed{80^\circ}"), (r"\frac{1}{3}", r"\boxed{0.33}"),
    ("1,-2", r"\boxed{1}"), ("3, 5, 7", r"\boxed{3,5}"), ("x=5", r"\boxed{y=5}"), ("y = 2x + 3", r"\boxed{y=2x-3}"),
    (r"(2,\infty)", r"\boxed{[2,\infty)}"), ("(3,4)", r"\boxed{(4,3)}"),
    (r"\begin{pmatrix} -2 \\ -14 \end{pmatrix}", r"\boxed{\begin{pmatrix}-2\\14\end{pmatrix}}"),
    ("52_8", r"\boxed{52_7}"), (r"\text{(C)}", r"\boxed{\text{(B)}}"), ("4.5e33", r"\boxed{4.6e33}"),
    ("2.7778e-6", r"\boxed{2.9\times10^{-6}}"), ("3e-10", r"\boxed{2e-10}"), ("0.0000003", r"\boxed{0.0000001}"),
    ("2k", r"\boxed{2}"), ("2t", r"\boxed{2}"), ("3ab", r"\boxed{3}"), ("p - q", r"\boxed{q-p}"),
    ("$5$;$10$", r"\boxed{10; 5}"), ("$5$;$10$", r"\boxed{5}"), ("$(1,1), (3,2)$", r"\boxed{(3,2),(1,2)}"),
    ("6:7", r"\boxed{7:6}"), ("7", r"\boxed{7} no wait, it is \boxed{8}"), ("7", "The answer is seven"),
    ("7", r"\boxed{}"), ("7", "I do not know"), ("7", "The answer is not clear"), ("3", r"\boxed{-3}"),
    (r"$1.76 \times 10^{-10}$", r"\boxed{1.8\cdot10^{-10}}"),
]  # fmt: skip


@pytest.mark.parametrize("label, response", RIGHT)
def test_a_right_answer(label, response):
    assert judge(response, label) == (1.0, None)


@pytest.mark.parametrize("label, response", WRONG)
def test_a_wrong_answer(label, response):
    reward, told = judge(response, label)
    assert reward == 0.0 and ("is wrong" in told or "no final answer" in told)


@pytest.mark.parametrize(
    "label, reason",
    [
        (None, "text or a number, not None"), (True, "text or a number, not True"), ({"a": 1}, "text or a number"),
        (["1", "2"], "text or a number"), ([], "text or a number"), (float("nan"), "text or a number, not nan"),
        ("", "1 to 2000 characters"), (" \n$$", "1 to 2000 characters"), ("So 2.\n####", "1 to 2000 characters"),
        ("7" * 2001, "1 to 2000 characters"),
        ("The last column must not be a pivot column. The remaining columns must each be pivot columns.", "14 words"),
    ],
)  # fmt: skip
def test_a_label_that_no_answer_can_equal(label, reason):
    with pytest.raises(ValueError, match=reason):
        maths.check_label(label)


@pytest.mark.parametrize("label", [label for label, _ in RIGHT])
def test_a_label_that_an_answer_can_equal(label):
    maths.check_label(label)


def test_a_label_without_an_answer_is_named_where_it_is_met():
    with pytest.raises(ValueError, match="a label must be an answer, text or a number, not None"):
        maths.reward_func(["Q\\boxed{7}"], ["Q"], [None])


def test_what_the_final_answer_is():
    assert conclusion.boxes("\\boxed{1} so \\boxed{\\frac{1}{2}}") == ["\\frac{1}{2}"]
    assert conclusion.boxes("$\\boxed{1}$ and $\\boxed{2}$") == ["1", "2"]
    assert conclusion.boxes("\\boxed{1} and then \\boxed{2") == ["1"]  # cut off by a limit
    assert conclusion.boxes("\\boxed{\\{1, 2\\}} \\boxed{}") == ["\\{1, 2\\}"]
    assert conclusion.tagged("<answer>1</answer> <ANSWER> 2 </answer>") == "2"
    assert conclusion.tagged("</answer>") is None
    assert conclusion.announced("The answer is 1. Answer:\n\n**2**\nas above") == "2**"
    assert conclusion.announced("I answered it") is None
    assert maths.answer("") is None and maths.answer("\\boxed{") is None
    assert maths.answer(f"the answer is 7{' ' * 30_000}") is None  # only the end is read


def test_an_answer_that_is_too_long_is_not_compared():
    long = "1+" * 1_000 + "1"
    assert judge(f"\\boxed{{{long}}}", "1001") == (0.0, f"The final answer {long} is wrong.")
    assert not answers.equal("1", long)


SAME = (
    ("0.50", "\\frac{1}{2}", "1/2", "\\dfrac{1}{2}", "50\\%", "50 percent"), ("1,234", "$1,234$ dollars", "1234.0"),
    ("2,3", "3 and 2", "$3$, $2$"), ("-\\frac{3}{4}", "−0.75"), ("\\text{Paris}", "paris."), ("x^2 + 1", "x^2+1"),
    ("5;10",), ("10;5",), ("(1,2)",), ("\\frac{1}{0}",), ("9" * 100,), ("1e999999999",), ("7 cm", "7"),
)  # fmt: skip


def test_answers_that_are_counted_as_one():
    forms = [{answers.canonical(text) for text in same} for same in SAME]
    assert all(len(form) == 1 for form in forms) and len(set().union(*forms)) == len(SAME)
    assert all(answers.canonical(text) == "" for text in ("", " ", ",", "x" * 3_000))
