"""Every recipe small, on the real OpenRLHF: one step of a tiny model, taught by the recipe's own reward function."""

import importlib.util
import sys
from pathlib import Path

import pytest
from common import adapter, cases, motion
from safetensors.torch import load_file

from sdpo_plugin.openrlhf_adapter.launcher import recipe as recipes
from sdpo_plugin.testing import tiny_model, tiny_vision_model

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
import smoke  # noqa: E402


@pytest.fixture(scope="module")
def small_models(tmp_path_factory):
    """A language model and, for recipes with images, a vision-language model."""
    directory = tmp_path_factory.mktemp("smoke")
    made = (tiny_model(directory / "model", positions=4096), tiny_vision_model(directory / "vision", positions=4096))
    return dict(zip((False, True), made, strict=True))


RECIPES = {str(path.relative_to(ROOT / "recipes")): (path,) for path in smoke.smoked()}


@pytest.mark.parametrize("path", cases(RECIPES, "multi_turn/sdpo.yaml", "tooluse/sdft.yaml"))
def test_a_recipe_distils_what_its_environment_says(openrlhf, small_models, path, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = smoke.small(smoke.launch(path))
    given = {}
    for config in smoke.configs(flags):
        given |= recipes.load(config)
    small_model = small_models["data.max_images_per_prompt" in given]
    if given.get("reward.remote_url", "").endswith("reasoning.py"):
        pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'openrlhf-sdpo[reasoning]'")
    run = openrlhf.train(*flags, "--actor.model_name_or_path", str(small_model), timeout=120)
    assert f"openrlhf-sdpo: --algo {given['algo.name']}; plugins" in run.output
    first = {name: values[0][1] for name, values in run.metrics.items()}
    assert first["train/self_distillation/loss"] > 0 and first["train/self_distillation/token_fraction"] > 0
    assert first["train/self_distillation/reprompt_sample_fraction"] == 1.0
    if given.get("ds.lora.rank"):
        assert any(values.any() for name, values in adapter(run).items() if "lora_B" in name)
    else:
        assert motion(run, load_file(small_model / "model.safetensors")) > 0
    if "reward.remote_url" in given:
        assert_judged_by(given["reward.remote_url"], run.samples[0], small_model)


def assert_judged_by(file, samples, model):
    """The samples' rewards and feedback are those of the reward function in `file`."""
    from transformers import AutoTokenizer

    spec = importlib.util.spec_from_file_location("reward", ROOT / file)
    spec.loader.exec_module(reward := importlib.util.module_from_spec(spec))
    tokenizer = AutoTokenizer.from_pretrained(model)
    for sample in samples:
        query, prompt = tokenizer.decode(sample.sequences[0]), sample.prompts[0]
        judged = reward.reward_func([query], [prompt], [sample.labels[0]])
        assert query.startswith(prompt) or "images" in sample.record  # whose tokens are more than one each
        assert judged["rewards"] == sample.rewards and judged["rewards"].item() == 0.0
        assert judged["feedback"] == [sample.feedback] and sample.feedback
