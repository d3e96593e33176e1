"""The house: imports run from a layer to those below it, OpenRLHF is known in one folder, and nothing is too long."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "sdpo_plugin"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
ADAPTER = "openrlhf_adapter"
# From the ground up. A module imports from its own layer and from those below.
LAYERS = (
    {"config", "flags"},
    {"distillation"},
    {"interface", "hookspecs"},
    {"plugins", "monitoring", "environments"},
    {"algorithms", "report"},
    {"plugin"},
    {f"{ADAPTER}.patch_points", f"{ADAPTER}.failures", f"{ADAPTER}.dates"},
    {f"{ADAPTER}.platform"},
    {f"{ADAPTER}.engine", f"{ADAPTER}.worker"},
    {f"{ADAPTER}.controller"},
    {f"{ADAPTER}.launcher"},
    {"__main__", "__init__"},  # the command, and the names that plugin authors import from the package
    {"testing"},
)


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


def own(names: set[str]) -> set[str]:
    """Of imported names, the files of this package. A folder has nothing to import, but for `report`."""
    inside = {name.removeprefix("sdpo_plugin.") for name in names if name.startswith("sdpo_plugin.")}
    return {name for name in inside & FILES.keys() if not FILES[name].name == "__init__.py" or name == "report"}


GRAPH = {name: own(imported(path)) - {name} for name, path in FILES.items()}


def layer(name: str) -> int:
    return next(number for number, rooms in enumerate(LAYERS) if any(f"{name}.".startswith(f"{r}.") for r in rooms))


def reached(name: str) -> set[str]:
    found, todo = set(), [*GRAPH[name]]
    while todo:
        if (module := todo.pop()) not in found:
            found.add(module)
            todo += GRAPH[module]
    return found


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_module_does_not_reach_itself(name):
    assert name not in reached(name)


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_import_runs_up(name):
    if name == ADAPTER:
        assert not GRAPH[name]
        return
    assert not {other for other in GRAPH[name] if layer(other) > layer(name)}


def test_the_adapter_and_the_algorithms_do_not_know_each_other():
    for name in FILES:
        if name.startswith(ADAPTER):
            assert not {other for other in GRAPH[name] if other.startswith("algorithms")}, name


def test_openrlhf_is_known_in_one_folder():
    outside = {name for name in FILES if not name.startswith((ADAPTER, "testing"))}
    for name in outside:
        known = {module.split(".")[0] for module in imported(FILES[name])}
        assert not known & {"openrlhf", "ray", "vllm", "deepspeed"}, name


def lengths(path: Path, kinds: tuple[type, ...]) -> list[tuple[str, int, bool]]:
    """Of each definition: its name, its lines without the docstring, and whether a reason for them stands above it."""
    lines, found = path.read_text().splitlines(), []
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, kinds):
            text = node.body[0] if ast.get_docstring(node) else None
            documented = text.end_lineno - text.lineno + 1 if text else 0
            above = lines[min([node.lineno, *(mark.lineno for mark in node.decorator_list)]) - 2].strip()
            found.append((node.name, node.end_lineno - node.lineno + 1 - documented, above.startswith("# Long: ")))
    return found


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_reader_finishes_each_file_class_and_function(name):
    path = FILES[name]
    assert len(path.read_text().splitlines()) <= 400
    assert not [found for found in lengths(path, (ast.ClassDef,)) if found[1] > 250]
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    assert not [found for found in lengths(path, functions) if found[1] > 50 and not found[2]]
