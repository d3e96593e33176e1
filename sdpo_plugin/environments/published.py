"""The data sets that were published with SDPO (github.com/lasgroup/SDPO, `datasets/`, also what its `data/` makes).

    python -m sdpo_plugin.environments.published datasets/sciknoweval/biology/train.json > rows.jsonl

prints such a file, a JSON array or JSON lines, as rows of a chat and a label. Whose label it is depends on the kind of
rows: `mcq` choice.py's, `tooluse` tools.py's, `math` maths.py's, `code` code.py's. Tests become public ones, which
feedback may show: the authors show them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from sdpo_plugin.environments.tools import label_of


def rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a file, with columns `prompt` and `label`.

    Raises:
        ValueError: its rows are of a kind that no environment here checks, or of several.
    """
    with open(path) as file:
        text = file.read()
    found = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    kinds = {row["kind"] for row in found}
    if len(kinds) > 1 or not kinds <= LABELS.keys():
        raise ValueError(f"{path} has rows of {', '.join(sorted(kinds))}; they must be of one of {', '.join(LABELS)}")
    for row in found:
        question = row["prompt"]
        if row["kind"] == "code":  # the authors show signatures without their class
            question = question.replace("(self, ", "(")
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        yield {"prompt": [*system, {"role": "user", "content": question}], "label": LABELS[row["kind"]](row)}


def _answer(row: dict[str, Any]) -> str:
    return row["answer"]


def _calls(row: dict[str, Any]) -> str:
    return label_of([(call["Action"], json.loads(call["Action_Input"])) for call in json.loads(row["answer"])])


def _tests(row: dict[str, Any]) -> str:
    tests = json.loads(row["tests"])
    if tests["testtype"] not in ("stdin", "functional"):
        raise ValueError(f"tests of type {tests['testtype']} are of no environment here: stdin, functional")
    pairs = zip(tests["inputs"], tests["outputs"], strict=True)
    cases = [{"input": given, "output": out, "testtype": tests["testtype"]} for given, out in pairs]
    return json.dumps({"fn_name": tests["fn_name"] or None, "tests": cases})


LABELS: dict[str, Callable[[dict[str, Any]], str]] = {
    "mcq": _answer, "math": _answer, "tooluse": _calls, "code": _tests
}  # fmt: skip

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m sdpo_plugin.environments.published FILE")
    for row in rows(sys.argv[1]):
        print(json.dumps(row))
