"""Self-Distillation Zero: the teacher's input, token by token, and which samples have one."""

import math
from types import SimpleNamespace

import pytest
import torch

from sdpo_plugin.algorithms.sdzero import SDZERO
from sdpo_plugin.config import ConfigError
from sdpo_plugin.interface.rollout_batch import RolloutBatch
from sdpo_plugin.testing import fake_worker

PHRASES = {"right": "Good.", "wrong": "Wait."}


@pytest.fixture(scope="module")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture
def attached(tokenizer):
    """`attached([(response, reward), ...])`: the teacher's prompts as texts, and the tokens in the loss, by sample."""

    def attach(answers, positions=math.inf, chat="{}", **reprompt):
        samples = []
        for response, _ in answers:
            prompt, ids = (
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("<|user|>Q?<|assistant|>", response)
            )
            samples.append(SimpleNamespace(
                sequences=torch.tensor([prompt + ids]), truncated=torch.tensor([False]), feedback=None, turns=[],
                action_mask=torch.tensor([[0] * (len(prompt) - 1) + [1] * len(ids)]), record={"prompt": "Q?"},
            ))  # fmt: skip
        skipped = [reward is None for _, reward in answers]
        for sample, lost in zip(samples, skipped, strict=True):
            sample.skipped = "no reward" if lost else None
        rewards = torch.tensor([reward or 0.0 for _, reward in answers])
        experience = SimpleNamespace(index=list(range(len(samples))), rewards=rewards, info={})
        args = fake_worker(sdzero=PHRASES, reprompt=reprompt, data={"chat_template_kwargs": chat}).args
        batch = RolloutBatch(samples, [experience], args, tokenizer, positions)
        SDZERO(args).openrlhf_rollout_batch(batch)
        prompts = [tokenizer.decode(ids) for ids in experience.info["plugin/teacher_prompt"]]
        return prompts, [int(mask.sum()) for mask in experience.info["plugin/loss_mask"]], batch.metrics

    return attach


def test_the_response_goes_on_with_the_verdict_and_is_scored_again(attached):
    prompts, counts, metrics = attached([("four<eos>", 1.0), ("five<eos>", 0.0), ("six", 0.4), ("x", None)])
    assert prompts == [
        "<|user|>Q?<|assistant|>four\n\nGood.\n\n", "<|user|>Q?<|assistant|>five\n\nWait.\n\n",
        "<|user|>Q?<|assistant|>six\n\nWait.\n\n", "",
    ]  # fmt: skip
    assert counts == [5, 5, 3, 0]  # the end of the turn is scored, too
    assert metrics["self_distillation/reprompt_sample_fraction"] == 0.75


def test_a_long_attempt_is_truncated_to_the_room_that_is_left(attached):
    """A token a character: 4 of the prompt, 9 of the phrase."""
    text = "abcdefghij"
    whole = "<|user|>Q?<|assistant|>" + text + "\n\nWait.\n\n"
    assert attached([(text, 0.0)], max_len=23)[0] == [whole]
    assert attached([(text, 0.0)], max_len=17)[0] == [whole.replace(text, "abcd")]
    assert attached([(text, 0.0)], max_len=17, truncation="left")[0] == [whole.replace(text, "ghij")]
    prompts, _, metrics = attached([(text, 0.0)], positions=25)  # 10 of them are the response's
    assert prompts == [whole.replace(text, "ab")] and metrics["self_distillation/truncated_fraction"] == 1.0
    prompts, counts, metrics = attached([(text, 0.0)], positions=22)
    assert prompts == [""] and counts == [0] and metrics["self_distillation/too_long_fraction"] == 1.0
    with pytest.raises(ConfigError, match=r"truncation error: a teacher's prompt of 23 tokens \(attempt 10\)"):
        attached([(text, 0.0)], max_len=17, truncation="error")


def test_the_teacher_s_chat_template_arguments_render_its_prompt(attached, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + "{{ style }}")
    assert attached([("four", 1.0)])[0] == ["<|user|>Q?<|assistant|>four\n\nGood.\n\n"]
    own = attached([("four", 1.0)], chat_template_kwargs='{"style": "think: "}')[0]
    assert own == ["<|user|>Q?<|assistant|>think: four\n\nGood.\n\n"]
