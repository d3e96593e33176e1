"""SDFT on the real host: a demonstrated skill is learned without a reward function, from either prompt."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What the quickstart's model was warm-started to read: a solution in its context. An answer has four tokens, so none
# is skipped, and the initial weights teach: 70 steps at 1e-3 are no place for an average.
TEMPLATE = "{prompt}\nCorrect solution:\n\n{privileged_context}\n\nCorrectly solve the original question."
FLAGS = (
    "--algo", "sdft", "--reprompt.template", TEMPLATE, "--distill.skip_tokens", "0", "--teacher.kind", "base",
    "--rollout.n_samples_per_prompt", "4", "--train.batch_size", "32", "--train.micro_batch_size", "32",
    "--rollout.micro_batch_size", "32", "--train.num_episodes", "70",
)  # fmt: skip


@pytest.fixture(scope="session")
def vault():
    """The quickstart's warm-started model and some of its rows, built once per checkout."""
    sys.path.insert(0, str(ROOT / "recipes" / "quickstart"))
    import vault

    vault.build(ROOT / "runs" / "quickstart", vault.Settings())
    lines = (ROOT / "runs" / "quickstart" / "data" / "eval.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:8]]
    return ROOT / "runs" / "quickstart" / "model", [row | {"privileged_context": row["label"]} for row in rows]


def accuracy(model, rows) -> float:
    """Share of the rows the model answers greedily as labelled, without any context."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    right = 0
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = policy.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        right += tokenizer.decode(answer, skip_special_tokens=True).strip() == row["label"]
    return right / len(rows)


@pytest.mark.check  # warm-starting the model is a minute
@pytest.mark.parametrize("prompt", ["student", "teacher"])
def test_a_demonstrated_skill_is_learned_without_a_reward_function(openrlhf, vault, prompt, tmp_path):
    model, rows = vault
    evaluation = tmp_path / "eval.jsonl"  # where nothing is demonstrated
    evaluation.write_text("".join(json.dumps({k: row[k] for k in ("prompt", "label")}) + "\n" for row in rows))
    flags = [*FLAGS, "--eval.dataset", str(evaluation), "--eval.steps", "70"]
    if prompt == "teacher":
        flags += ["--distill.generate_from_teacher"]
    run = openrlhf(model, rows, "", *flags)
    assert "eval/eval_default_pass1" in run.metrics
    assert accuracy(model, rows) <= 0.1 and accuracy(run.directory / "model", rows) >= 0.9
    assert {reward for _, reward in run.metrics["train/reward"]} == {0.0}

    # Whose prompt the engine saw: with the demonstration in it, the warm-started model answers right at once.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    first = run.samples[0]
    knew = sum(sampled_text(sample, tokenizer) == str(sample.labels[0]) for sample in first) / len(first)
    assert knew >= 0.9 if prompt == "teacher" else knew <= 0.1
    for sample in first:  # the loss is on what was sampled, behind the student's own prompt
        own = tokenizer(sample.prompts[0], add_special_tokens=False)["input_ids"]
        assert sample.sequences[0, : len(own)].tolist() == own and "Correct solution" not in sample.prompts[0]
        assert sample.action_mask[0].sum() == len(sample.sequences[0]) - len(own) == sample.response_length


def sampled_text(sample, tokenizer) -> str:
    return tokenizer.decode(sample.sequences[0, 1:][sample.action_mask[0].bool()], skip_special_tokens=True).strip()
