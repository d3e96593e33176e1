"""docs/design.md follows one sample through the package: every file and function that it names exists, in few moves."""

import ast
import re

from documented import DOCS, ROOT

LINE = re.compile(r"^\d+\. `(\S+\.py)` `(\w+)`", re.MULTILINE)
PATH = LINE.findall((DOCS / "design.md").read_text())


def test_the_functions_on_the_way_of_a_sample_exist():
    assert len(PATH) > 20
    for file, function in PATH:
        tree = ast.parse((ROOT / "sdpo_plugin" / file).read_text())
        defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert function in defined, f"{file}: {function}"


def test_a_sample_enters_each_process_once_and_returns_to_the_controller():
    """It moves between processes as OpenRLHF moves it, and enters the adapter's folder of each once per visit."""
    adapter = "openrlhf_adapter"
    rooms = [file.split("/")[1] for file, _ in PATH if file.startswith(adapter)]
    order = [room for room, before in zip(rooms, ["", *rooms], strict=False) if room != before]
    assert order == ["launcher", "controller", "engine", "controller", "worker", "controller"]
