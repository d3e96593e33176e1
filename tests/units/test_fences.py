"""Fenced blocks in the forms in which models write them, and in hostile ones."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpo_plugin.environments import code
from sdpo_plugin.environments.fences import Block, blocks, texts

PROGRAM = "a, b = map(int, input().split())\nprint(a + b)\n"


def indented(by: str) -> str:
    return "".join(f"{by}{line}\n" for line in PROGRAM.splitlines())


FORMS = {
    "plain": f"```python\n{PROGRAM}```",
    "closed behind the code": f"```python\n{PROGRAM.strip()}```",
    "opened behind words": f"Here it is: ```python\n{PROGRAM}```\nDone.",
    "not closed": f"Here it is:\n```python\n{PROGRAM}",
    "its output behind it": f"```python\n{PROGRAM}```\nIt prints:\n```\n3\n```",
    "its output behind it, no tags": f"```\n{PROGRAM}```\nIt prints:\n```\n3\n```",
    "its output behind it, closed behind the code": f"```python\n{PROGRAM.strip()}```\nIt prints:\n```\n3\n```",
    "its output behind it, in words": f"```\n{PROGRAM}```\n```text\nprint writes 3\n```",
    "in words behind it": f"```python\n{PROGRAM}```\nThat is:\n```\ninput a, b\nprint(a + b)\n```",
    "how to run it": f"```python\n{PROGRAM}```\n```bash\necho 1 2 | python main.py\n```",
    "how to call it": f"```python\n{PROGRAM}```\nFor example\n```python\nprint(sum([1, 2]))\n```",
    "the same in Java behind it": f"```python\n{PROGRAM}```\n```java\nSystem.out.print(a + b); // of stdin\n```",
    "a session behind it": f"```python\n{PROGRAM}```\n```pycon\n>>> print(input())\n```",
    "in a list item": f"1. Solution:\n\n   ```python\n{indented('   ')}   ```\n2. Done.",
    "in a list item, behind its bullet": f"- ```python\n{indented('  ')}  ```",
    "in a list item, tabs": f"1.\tSolution:\n\t```python\n{indented(chr(9))}\t```",
    "CRLF": f"```python\n{PROGRAM}```\nIt prints:\n```\n3\n```".replace("\n", "\r\n"),
    "CR": f"```python\n{PROGRAM}```".replace("\n", "\r"),
    "a title": f'```python title="main.py"\n{PROGRAM}```',
    "line numbers": f"```python {{1,2}} linenos=true\n{PROGRAM}```",
    "attributes as Pandoc has them": f"```{{.python .numberLines}}\n{PROGRAM}```\n```\n3\n```",
    "its file": f"```python:main.py\n{PROGRAM}```",
    "its file alone": f"```main.py\n{PROGRAM}```",
    "its version": f"``` Python 3.11\n{PROGRAM}```\n```\n3\n```",
    "backticks in a string": f"```python\nfence = '```'\n{PROGRAM}```",
    "backticks in an f-string": f'```python\nfence = f"```{{1}}```\\""\n{PROGRAM}```\n```\n3\n```',
    "a fence in a long string": f'```python\ntext = """\n```\n"""\n{PROGRAM}```\n```\n3\n```',
    "a block in a docstring": f"```python\ndef f():\n    '''Like:\n\n    ```\n    f()\n    ```\n    '''\n{PROGRAM}```",
    "backticks in a comment": f"```python\n# it's not ```\n{PROGRAM}```\n```\n3\n```",
    "a long fence": f"````python\n```\n{PROGRAM}````".replace("\n```\n", "\n"),
    "tildes": f"~~~python\n{PROGRAM}~~~\n~~~\n3\n~~~",
    "tildes, backticks inside": f"~~~ python\nfence = '''\n```\n'''\n{PROGRAM}~~~\n```\n3\n```",
    "tildes in a list item": f"* Solution:\n  ~~~py\n{indented('  ')}  ~~~",
    "a draft before it": f"```python\nprint(input())\n```\nNo, it is\n```python\n{PROGRAM}```",
    "a draft before it with an open string": f"```python\ns = '''\nprint(input())\n```\nNo:\n```python\n{PROGRAM}```",
    "inline blocks around it": f"Use ```input()```.\n```python\n{PROGRAM}```\nThis is ```O(1)``` or ```python O(1)```.",
    "a thought before it": f"<think>Maybe ```python\nprint(input())\n```?</think>\n```python\n{PROGRAM}```",
    "a thought before it, opened in the prompt": f"Maybe ```python\nprint(input())</think>\n\n```python\n{PROGRAM}```",
    "a thought of Magistral": f"[THINK]```\nprint(input())\n```[/THINK]```python\n{PROGRAM}```",
    "in a tag": f"<answer>\n```python\n{PROGRAM}```\n</answer>",
}


@pytest.mark.parametrize("form", FORMS)
def test_the_program_of_a_response(form):
    found = code.extract(FORMS[form])
    assert found is not None and PROGRAM.strip() in found
    compile(found, form, "exec")


def test_where_there_is_none():
    for response in ("", "I give up.", "Use ```print``` here.", "```\n```", f"<think>```python\n{PROGRAM}```"):
        assert code.extract(response) is None, response


def test_the_block_that_defines_the_function():
    calls = "```python\nassert twice(2) == 4\nprint(twice(3))\n```"
    twice = f"```python\ndef twice(n):\n    return 2 * n\n```\nso that\n{calls}"
    assert code.extract(twice, "twice") == "def twice(n):\n    return 2 * n\n"
    assert code.extract(twice) == "assert twice(2) == 4\nprint(twice(3))\n"


def test_blocks():
    text = 'a ```json {"x": 1}``` b\n```JSON\n{"x": "a ``` b"}\n```\n```json {"x": 2}```'
    assert blocks(text) == [Block("json", '{"x": "a ``` b"}\n'), Block("json", '{"x": 2}')]
    assert blocks("   ```\n   a\n     b\n  c\n   ```") == [Block("", "a\n  b\nc\n")]
    assert blocks('```json {"x":\n"`"}\n```') == [Block("json", '"`"}\n', '{"x":')]
    assert texts('It is ```json{"x": "a ``` b"}```\nnot ```[1]``` or\n```[2]\n```') == ['{"x": "a ``` b"}', "[2]\n"]
    assert blocks("~~~\na ~~~\n~~~~ \n~~~") == [Block("", "a ~~~\n")]


@given(st.text(alphabet="`~\"'\\\n #a1.{-\r\t=", max_size=200), st.sampled_from([None, "f"]))
def test_no_response_is_too_odd(response, function):
    code.extract(response, function)


HOSTILE = {
    "backticks": "`", "fences": "```\n", "fences with a word": "```a", "inline blocks": "```x y```", "tildes": "~~~\n",
    "triple quotes": '"""', "escaped quotes": '\\"', "strings with fences": '"""\n```\n"""\n', "blanks": " ",
    "blank lines": "   \n", "half a list item": "  1.  ~", "thoughts": "</think>", "assignments": "= ", "def": "def ",
    "comments": "#```\n", "apostrophes": "'\\", "digits": "1",
    "JSON behind fences": "```json [", "attributes": "```{.a}\n",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("before, behind", [("", ""), ("```\n", "'''"), ("```python\n\"", "\n~~~")])
def test_time_is_linear_in_the_response(name, before, behind):
    def seconds(n: int) -> float:
        response, began = before + HOSTILE[name] * n + behind, time.process_time()
        code.extract(response, "f")
        return time.process_time() - began

    short, long = min(seconds(4000) for _ in range(3)), min(seconds(16_000) for _ in range(2))
    assert long < 10 * short + 0.05  # 16 times and more if it were quadratic
