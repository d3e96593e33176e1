"""`--diagnostics.samples` on the real OpenRLHF: the numbers of two ranks are those of plain transformers."""

import json

import pytest
import torch
from common import LORA, ROWS, SDPO, TWO_RANKS, ZERO, same

from sdpo_plugin.samples import NAME, read_samples
from sdpo_plugin.testing import RunFailed

TEMPERATURE = 0.7
SOLUTION = "\nCorrect solution:\n\n{}\n\nCorrectly solve the original question."
KEYS = ["step", "sample", "prompt", "response", "reward", "feedback", "active", "truncated", "teacher_prompt", "cut",
        "tokens", "token_ids", "in_loss", "student", "teacher", "alternatives"]  # fmt: skip


def flags(*more, samples=16):
    return (*SDPO, "--diagnostics.samples", str(samples), *more)


@pytest.fixture(scope="module")
def plain(model):
    """`plain(prompt ids, response ids)`: the initial model's log-probabilities of the response, and its likeliest."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)

    @torch.no_grad()
    def score(prompt, response):
        prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        logits = network(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        log_probs = (logits / TEMPERATURE).log_softmax(-1)
        values, ids = log_probs.topk(5)
        names = [[tokenizer.decode([i]) for i in row] for row in ids.tolist()]
        return log_probs.gather(-1, torch.tensor(response)[:, None])[:, 0].tolist(), values.tolist(), names

    return score


def test_the_numbers_are_those_of_plain_transformers(openrlhf, model, reward, recorded, plain):
    options = ["--no-reprompt.use_feedback", "--ds.param_dtype", "fp32", "--rollout.temperature", str(TEMPERATURE)]
    run = openrlhf(model, ROWS, reward, *flags(*ZERO[3], *options), replay=recorded)
    lines = read_samples(run.directory / "tensorboard")
    assert [list(line) for line in lines] == [KEYS] * 32
    assert [line["step"] for line in lines] == [1] * 16 + [2] * 16
    first, tokens = {line["sample"]: line for line in lines[:16]}, 0
    assert {line["active"] for line in lines[:16]} == {True, False}
    for i, (line, sample) in enumerate(zip([first[i] for i in range(16)], recorded.samples[0], strict=True)):
        ids = sample.sequences[0, sample.action_mask[0].nonzero()[0] + 1 :].tolist()
        other = recorded.samples[0][i ^ 1]
        assert line["prompt"] == ROWS[int(sample.labels[0])]["prompt"]
        assert line["token_ids"] == ids and line["response"] == "".join(line["tokens"])
        assert line["reward"] == sample.rewards.item() and line["feedback"] == f"expected {sample.labels[0]}"
        assert line["truncated"] == bool(sample.truncated) and line["cut"] == []
        assert line["active"] == bool(other.rewards) and line["in_loss"] == [line["active"]] * len(ids)
        question = f"say {sample.labels[0]}"
        if not line["active"]:
            assert line["teacher_prompt"] is None and line["teacher"] == line["alternatives"] == []
            engine = sample.rollout_log_probs[0][sample.action_mask[0].bool()].tolist()
            assert line["student"] == pytest.approx(engine, abs=1e-4)
            continue
        shown = first[i ^ 1]["response"].replace("<eos>", "").replace("<pad>", "")
        if "<" not in shown:
            assert line["teacher_prompt"] == f"<|user|>{question}{SOLUTION.format(shown)}<|assistant|>"
        student, *_ = plain(f"<|user|>{question}<|assistant|>", ids)
        teacher, likeliest, names = plain(line["teacher_prompt"], ids)
        assert line["student"] == pytest.approx(student, abs=1e-3)
        assert line["teacher"] == pytest.approx(teacher, abs=1e-3)
        assert line["teacher"] != pytest.approx(line["student"], abs=1e-3)
        for told, values, pieces in zip(line["alternatives"], likeliest, names, strict=True):
            assert [x for _, x in told] == pytest.approx(values, abs=1e-3)
            if min(a - b for a, b in zip(values, values[1:], strict=False)) > 1e-3:
                assert [piece for piece, _ in told] == pieces
        tokens += len(ids)
    assert tokens > 30
