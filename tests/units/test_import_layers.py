"""Imports run one way: no circle, production without the harness, OpenRLHF in one folder only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "sdpo_plugin"
NAMES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it, but for those that only type checkers see."""
    tree = ast.parse(path.read_text())
    typing = {
        id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }  # fmt: skip
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


FOLDERS = {"sdpo_plugin", "sdpo_plugin.openrlhf_adapter"}  # with nothing to import in them
GRAPH = {name: imported(path) & NAMES.keys() - {name, *FOLDERS} for name, path in NAMES.items()}


def reached(name: str) -> set[str]:
    found, todo = set(), [*GRAPH[name]]
    while todo:
        if (module := todo.pop()) not in found:
            found.add(module)
            todo += GRAPH[module]
    return found


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_module_does_not_reach_itself(name):
    assert name not in reached(name)
    if not name.startswith("sdpo_plugin.testing"):
        assert not any(other.startswith("sdpo_plugin.testing") for other in reached(name))


def test_the_two_towers_do_not_know_each_other():

    base = "sdpo_plugin.algorithms.controller_side"
    algorithms = {base} | {n for n in NAMES if base in reached(n)}
    algorithms -= {n for n in NAMES if n.startswith("sdpo_plugin.testing")}
    assert "sdpo_plugin.algorithms.sdpo" in algorithms and "sdpo_plugin.plugin" in algorithms
    assert not any(n.startswith("sdpo_plugin.openrlhf_adapter") for n in algorithms)
    assert not any(other.startswith("sdpo_plugin.openrlhf_adapter") for n in algorithms for other in reached(n))


def test_openrlhf_is_known_in_one_folder():
    outside = {n for n in NAMES if not n.startswith(("sdpo_plugin.openrlhf_adapter", "sdpo_plugin.testing"))}
    for name in outside:
        known = {module.split(".")[0] for module in imported(NAMES[name])}
        assert not known & {"openrlhf", "ray", "vllm", "deepspeed"}, name
