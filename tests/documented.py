"""The listings of docs/hooks.md as files."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "hooks.md").read_text()


def modules() -> dict[str, str]:
    """The page's Python, by the file name in a listing's first line; listings of one file are put together."""
    found: dict[str, str] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        name = re.search(r"\w+(?=\.py)", block.splitlines()[0])[0]
        found[name] = found.get(name, "") + block + "\n"
    return found


def install_toy(directory: Path) -> Path:
    """Builds the page's package as a user does, and installs it into a folder for PYTHONPATH."""
    source, target = directory / "openrlhf-toy", directory / "installed"
    source.mkdir()
    (source / "pyproject.toml").write_text(re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)[1])
    (source / "toy.py").write_text(modules()["toy"])
    offline = ("-q", "--no-deps", "--no-build-isolation")
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, "--target", target, source], check=True)
    return target
