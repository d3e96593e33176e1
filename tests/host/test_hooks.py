"""The plugins of docs/hooks.md, on the real host. (`openrlhf_generation_prompt` is seen to act in test_sdft.py.)"""

import json
import re
from pathlib import Path

import pytest
import torch
from common import ROWS, SDPO, same

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


def test_the_example_weighs_prompts_and_survives_a_restart(
    openrlhf, model, reward, initial, recorded, documented, tmp_path
):
    rows = [row | {"hint": "!"} for row in ROWS]
    plugins = ["--plugins", "curriculum", "sdpo_plugin.testing", "--ckpt.path", str(tmp_path / "ckpt")]
    flags = [*SDPO, *plugins, "--ckpt.save_steps", "1"]
    first = openrlhf(model, rows, reward, *flags)
    assert first.metrics["train/curriculum/prompts"] == [[1, 8.0]]
    assert torch.equal(first.weights["model.embed_tokens.weight"], initial["model.embed_tokens.weight"])
    assert not torch.equal(first.weights["lm_head.weight"], initial["lm_head.weight"])
    assert json.loads((first.directory / "model" / "updates.json").read_text()) == 1
    assert all(sample.feedback.startswith("expected") for sample in first.samples[0])

    resumed = openrlhf(model, rows, reward, *flags, "--ckpt.load_enable", "--train.num_episodes", "2")
    assert json.loads((resumed.directory / "model" / "updates.json").read_text()) == 2

    weighed = openrlhf(model, ROWS, reward, *flags[:-2], "--curriculum.floor", "0.1", replay=recorded)
    floored = openrlhf(model, ROWS, reward, *flags[:-2], "--curriculum.floor", "1", replay=recorded)
    assert not same(weighed, floored)


def test_the_variant_is_offered(openrlhf, model, reward, recorded, documented):
    flags = ("--algo", "variant", "--distill.topk", "20", "--plugins", "variant", "sdpo_plugin.testing")
    run = openrlhf(model, ROWS, reward, *flags, replay=recorded)
    assert "train/teacher/ema_distance" not in run.metrics  # its teacher is the initial model
    assert not same(run, recorded)
