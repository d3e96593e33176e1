"""What the pages of docs/ hold, as tests read it: listings as files, commands, flags, links, tables."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *sorted((ROOT / "recipes").glob("*/README.md"))]
PAGE = (DOCS / "hooks.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("make", "pip", "python", "openrlhf-sdpo", "ray", "git")


def where(page: Path) -> str:
    """A page's path in the repository."""
    return str(page.relative_to(ROOT))


def modules(page: str = "hooks.md", language: str = "python") -> dict[str, str]:
    """A page's listings by the file name in their first line; listings of one file are put together."""
    found: dict[str, str] = {}
    for kind, block in FENCE.findall((DOCS / page).read_text()):
        if kind == language and (file := re.search(r"\w+(?=\.(?:py|yaml)\b)", block.splitlines()[0])):
            found[file[0]] = found.get(file[0], "") + block + "\n"
    return found


def commands(page: Path) -> list[str]:
    """The commands in a page's listings, a line each, without comments and environment variables."""
    other = ("python", "pycon", "yaml", "json", "toml")
    blocks = [block for kind, block in FENCE.findall(page.read_text()) if kind not in other]
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines()
    lines = [re.sub(r"^\$ |^(?:\w+=\S+ )+|\s+#.*$", "", line) for line in lines]  # an indented line is output
    return [line for line in lines if line.split(" ")[0] in PROGRAMS]


def inline(page: Path) -> list[str]:
    """The commands in a page's text."""
    return [
        " ".join(span.split())
        for span in re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text()))
        if re.match(rf"({'|'.join(PROGRAMS)}) [\w./'-]+( |$)", span)
    ]


def first_cells(text: str) -> list[str]:
    """The first cell of every row of the tables in `text`."""
    return [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if re.match(r"\| `", line)]


def install_toy(directory: Path) -> Path:
    """Builds the page's package as a user does, and installs it into a folder for PYTHONPATH."""
    source, target = directory / "openrlhf-toy", directory / "installed"
    source.mkdir()
    (source / "pyproject.toml").write_text(re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)[1])
    (source / "toy.py").write_text(modules()["toy"])
    offline = ("-q", "--no-deps", "--no-build-isolation")
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, "--target", target, source], check=True)
    return target
