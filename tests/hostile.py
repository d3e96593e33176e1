"""What models wrote, or may write, to the harm of what reads it."""

PIECES = (
    " ", "\n", "\t", "a", "A", "I ", "1", "1 ", "1,", ".", "-", "<", ">", "[", "]", "{", "}", "(", ")", "$", "*",
    "_", "`", "#", "\\", "\\boxed{", "\\boxed", "\\text{", "\\(", "\\[", "\\left(", "\\frac{", "<answer>",
    "</answer>", "</think>", "<pad>", "<|im_end|>", "answer", "answer is ", "Answer: ", "the answer is A ",
    "and ", " or ", "A, ", "A and ", "(A) ", "Option ", "is correct", "\0", "\ud800", "\u200b", "｜", "选", "9^",
    "!", "~", "\r\n", "e", "\\%", "x = ",
)  # fmt: skip

NEVER_END = (
    "\\boxed{9^{9^{9}}}", "\\boxed{2^{10000000000}}", "\\boxed{10^{-10^{10}}}", "\\boxed{100000000!}",
    "\\boxed{9!!!!!}", "\\boxed{\\binom{10^{9}}{10^{8}}}", "\\boxed{\\prod_{i=1}^{10^9} i}",
)  # fmt: skip

HOSTILE = (
    *(piece * (10_000 // len(piece)) for piece in PIECES),
    *(f"\\boxed{{{piece * (1_900 // len(piece))}}}" for piece in PIECES),
    *(f"\\boxed{{{begin * 400}1{end * 400}}}" for begin, end in ("()", "[]", "{}", ("\\{", "\\}"), ("|", "|"))),
    *(f"\\boxed{{{begin * 200}1{'}' * 200}}}" for begin in ("\\sqrt{", "\\frac{1}{", "2^{", "\\text{", "\\boxed{")),
    f"\\boxed{{{'9' * 1_900}}}", f"\\boxed{{0.{'3' * 1_900}}}", f"\\boxed{{{'7,' * 900}}}", "\\boxed{NaN}",
    "\\boxed{1e999}", "\\boxed{\\infty}", "\\boxed{\ud800}", "\\boxed{\0}", "\ud800" * 50, "\0" * 50,
    "\\boxed{__import__('os')}", "\\boxed{０}", "x" * 1_000_000, "\\boxed{" * 100_000, "\n" * 1_000_000,
    "9" * 1_000_000, "\u202e7", "", "[" * 50_000, '{"a":' * 50_000, "[" * 50_000 + "]" * 50_000, "<tool_call>" * 50_000,
    "Action:" * 50_000,
    "```\n" * 50_000, "<answer>(" * 50_000, "1e999", "NaN",
    "0x" + "f" * 5_000, "9" * 5_000, "<answer>" + "9**" * 500 + "9</answer>", "<answer>" + "[" * 500 + "</answer>",
    "[f(x=" + "-" * 5_000 + "1)]", "[f(**{(1, 2): 3})]", "[f(x={b'a': {1: 2}})]", "[f(x=" + "9" * 5_000 + ")]",
)  # fmt: skip
