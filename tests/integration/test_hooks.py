"""The plugins of docs/hooks.md and docs/tutorial.md in OpenRLHF. (That a generation prompt acts is in test_sdft.py.)"""

import json

import pytest
import torch
from common import ROWS, SDPO, same
from documented import install_toy, modules


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """The page's modules, where a run finds them."""
    for name, text in modules().items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_the_example_weighs_prompts_and_survives_a_restart(
    openrlhf, model, reward, initial, recorded, documented, tmp_path
):
    rows = [row | {"hint": "!"} for row in ROWS]
    plugins = ["--plugins", "curriculum", "sdpo_plugin.testing", "--ckpt.path", str(tmp_path / "ckpt")]
    flags = [*SDPO, *plugins, "--ckpt.save_steps", "1"]
    first = openrlhf(model, rows, reward, *flags)
    assert first.metrics["train/curriculum/prompts"] == first.metrics["train/curriculum/known"] == [[1, 8.0]]
    assert 0.1 <= first.metrics["train/curriculum/rarity"][0][1] <= 1.0
    assert -8 * 10 < first.metrics["train/curriculum/least_likely"][0][1] < -8  # up to 8 tokens of 100, any as likely
    assert torch.equal(first.weights["model.embed_tokens.weight"], initial["model.embed_tokens.weight"])
    assert not torch.equal(first.weights["lm_head.weight"], initial["lm_head.weight"])
    assert json.loads((first.directory / "model" / "updates.json").read_text()) == 1
    assert all(sample.feedback.startswith("expected") for sample in first.samples[0])
    logged, end = (first.directory / "model" / "rewards.txt").read_text().splitlines()
    assert logged == f"1 {first.metrics['train/reward'][0][1]:.16g}" and end == "over"

    resumed = openrlhf(model, rows, reward, *flags, "--ckpt.load_enable", "--train.num_episodes", "2")
    assert json.loads((resumed.directory / "model" / "updates.json").read_text()) == 2

    weighed = openrlhf(model, ROWS, reward, *flags[:-2], "--curriculum.floor", "0.1", replay=recorded)
    floored = openrlhf(model, ROWS, reward, *flags[:-2], "--curriculum.floor", "1", replay=recorded)
    assert not same(weighed, floored)


@pytest.mark.check
def test_the_algorithm_is_offered_and_has_its_option(openrlhf, model, reward, recorded, documented):
    flags = ("--algo", "early", "--distill.topk", "20", "--plugins", "early")
    soon, late = (openrlhf(model, ROWS, reward, *flags, "--early.half_life", h, replay=recorded) for h in ("1", "99"))
    assert "train/teacher/ema_distance" not in soon.metrics  # its teacher is the initial model
    weights = [run.metrics["train/self_distillation/token_weight"][0][1] for run in (soon, late)]
    assert 0 < weights[0] < weights[1] < 1
    assert not same(soon, recorded) and not same(soon, late)


def test_the_tutorial_s_variant_acts(openrlhf, model, reward, recorded, tmp_path, monkeypatch):
    (tmp_path / "corrections.py").write_text(modules("tutorial.md")["corrections"])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = ("--algo", "corrections", "--distill.topk", "20", "--plugins", "corrections", "--corrections.margin", "0")
    run = openrlhf(model, ROWS, reward, *flags, replay=recorded)
    assert 0.0 < run.metrics["train/self_distillation/token_weight"][0][1] < 1.0
    assert not same(run, recorded)


@pytest.mark.check
def test_the_package_s_own_test_passes(openrlhf, tmp_path, monkeypatch):
    """Installed, the plugin acts without being named."""
    monkeypatch.setenv("PYTHONPATH", str(install_toy(tmp_path)))
    test = {}
    exec(modules()["test_toy"], test)
    test["test_toy"](openrlhf, tmp_path)
