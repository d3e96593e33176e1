"""SDFT on the real host: a demonstrated skill is learned without a reward, from either prompt."""

import json
import sys
from pathlib import Path

import pytest

from sdpo_plugin.testing import RunFailed

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "quickstart"))

# What the quickstart's model was warm-started to read: a solution in its context.
TEMPLATE = "{prompt}\nCorrect solution:\n\n{privileged_context}\n\nCorrectly solve the original question."
FLAGS = (
    "--algo", "sdft", "--reprompt.template", TEMPLATE, "--distill.mode", "full", "--distill.alpha", "0",
    "--rollout.n_samples_per_prompt", "4", "--train.batch_size", "32", "--train.micro_batch_size", "32",
    "--rollout.micro_batch_size", "32", "--actor.adam.lr", "2e-3", "--eval.steps", "10", "--eval.temperature", "0",
    "--eval.n_samples_per_prompt", "1", "--ckpt.best_metric_key", "none",
)  # fmt: skip


@pytest.fixture(scope="session")
def vault():
    """The quickstart's warm-started model and its rows, built once per checkout."""
    import vault

    vault.build(ROOT / "runs" / "quickstart", vault.Settings())
    lines = (ROOT / "runs" / "quickstart" / "data" / "eval.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:8]]
    return ROOT / "runs" / "quickstart" / "model", [row | {"privileged_context": row["label"]} for row in rows]


@pytest.mark.parametrize("prompt", ["student", "teacher"])
def test_a_demonstrated_skill_is_learned_without_a_reward(openrlhf, vault, prompt, tmp_path):
    model, rows = vault
    reward = ROOT / "recipes" / "quickstart" / "reward.py"  # used for evaluation; every training reward is 0 or 1
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*FLAGS, "--eval.dataset", str(tmp_path / "eval.jsonl"), "--train.num_episodes", "30"]
    if prompt == "teacher":
        flags += ["--distill.generate_from_teacher"]
    run = openrlhf(model, rows, reward, *flags)
    accuracy = [value for _, value in run.metrics["eval/eval_default_pass1"]]
    assert accuracy[-1] >= 0.9
    first = run.samples[0]
    knows = sum(sample.rewards.item() for sample in first) / len(first)
    assert knows >= 0.9 if prompt == "teacher" else knows <= 0.1  # whose prompt the engine saw
    for sample in first:  # what was sampled is what is trained on, behind the student's own prompt
        tokens, mask = sample.sequences[0], sample.action_mask[0].bool()
        sampled = tokens[1:][mask]
        assert len(sampled) == int(sample.response_length) and mask[-1]
        assert "Correct solution" not in sample.prompts[0]


def test_without_a_reward_function_the_host_gets_zeros(openrlhf, vault):
    model, rows = vault
    run = openrlhf(model, rows, "", *FLAGS, "--eval.steps", "-1")
    assert run.metrics["train/reward"][0][1] == 0.0
    assert run.metrics["train/self_distillation/reprompt_sample_fraction"][0][1] == 1.0
    assert run.metrics["train/self_distillation/loss"][0][1] > 0.0


def test_a_missing_column_is_named(openrlhf, vault):
    model, rows = vault
    bare = [{"prompt": row["prompt"], "label": row["label"]} for row in rows]
    with pytest.raises(RunFailed, match="privileged_key privileged_context: the data set has no such column"):
        openrlhf(model, bare, "", *FLAGS)
