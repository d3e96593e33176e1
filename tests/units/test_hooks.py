"""The plugins of docs/hooks.md, on the real host. (`openrlhf_generation_prompt` is seen to act in test_sdft.py.)"""

import re
from pathlib import Path

import pytest

from sdpo_plugin import hookspecs

PAGE = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text()


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """The page's Python blocks as modules, by the name in their first line."""
    found = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    blocks = {re.search(r"\w+(?=\.py)", block)[0]: block for block in found}
    for name, block in blocks.items():
        (tmp_path / f"{name}.py").write_text(block)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return blocks


def test_the_example_has_every_hook(documented):
    hooks = {name for name in vars(hookspecs) if name.startswith("openrlhf_")}
    assert hooks - set(re.findall(r"def (openrlhf_\w+)", documented["curriculum"])) == {"openrlhf_algorithms"}
    assert "def openrlhf_algorithms" in documented["variant"]
