"""Contexts of a teacher's own, on OpenRLHF: its attempt and its chat template's arguments; a consensus of answers."""

import json
import shutil

from common import ROWS, SDPO, motion

READER = """
import json

from sdpo_plugin import hookimpl

@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--reader.out")

@hookimpl
def openrlhf_before_forward(micro_batch):
    batch = micro_batch.experience
    with open(micro_batch.worker.args.reader.out, "a") as file:
        for i, ids in enumerate(micro_batch.data["teacher_prompt"]):
            length = int(batch.attention_mask[i].sum())
            bare = micro_batch.data["bare_prompt"][i].tolist()
            rewarded = float(micro_batch.data["reward"][i])
            file.write(json.dumps([batch.sequences[i, :length].tolist(), ids.tolist(), bare, rewarded]) + "\\n")
"""
COUNTER = """
import torch

from sdpo_plugin import hookimpl

@hookimpl
def openrlhf_rollout_sample(sample, response, args):
    assert set(sample.record) == {"prompt", "label", "note"}
    sample.truncated = torch.tensor([False])  # an untrained model hardly ever ends by itself

@hookimpl
def openrlhf_answer(response, record, args):
    assert set(record) == {"prompt"}, sorted(record)
    return "even" if sum(map(ord, response)) % 2 == 0 else "odd"
"""


def test_a_response_is_revised_after_a_chat_template_of_its_own(openrlhf, model, reward, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    shutil.copytree(model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template += "{% if thinks %}thinks: {% endif %}"
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "reader.py").write_text(READER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = openrlhf(
        tmp_path / "model", ROWS, reward, "--algo", "sdzero", "--reprompt.chat_template_kwargs", '{"thinks": true}',
        "--sdzero.right", "Good.", "--sdzero.wrong", "Wait.", "--plugins", "sdpo_plugin.testing", "reader",
        "--reader.out", str(tmp_path / "read"),
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "read").read_text().splitlines()]
    assert len(lines) == 2 * len(ROWS) and {rewarded for *_, rewarded in lines} == {0.0, 1.0}
    for student, teacher, bare, rewarded in lines:
        ended = student[-1] in tokenizer.all_special_ids  # an untrained model samples all of them
        prompt, attempt = tokenizer.decode(student[:-1] if ended else student).split("<|assistant|>", 1)
        phrase = "Good." if rewarded else "Wait."
        assert tokenizer.decode(teacher) == f"{prompt}<|assistant|>thinks: {attempt}\n\n{phrase}\n\n"
        assert tokenizer.decode(bare) == f"{prompt}<|assistant|>thinks: "
    assert run.metrics["train/self_distillation/reprompt_sample_fraction"][0][1] == 1.0
    assert run.metrics["train/self_distillation/loss"][0][1] > 0.0 and run.metrics["train/teacher/context_kl"]


def test_a_consensus_of_answers_teaches_without_a_reward(openrlhf, model, initial, tmp_path, monkeypatch):
    """In an asynchronous run, which sends the prompt's column and no others."""
    (tmp_path / "counter.py").write_text(COUNTER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = openrlhf(
        model, ROWS, "", *SDPO, "--reprompt.demonstration", "consensus", "--rollout.n_samples_per_prompt", "4",
        "--train.batch_size", "32", "--train.async_enable", "--plugins", "sdpo_plugin.testing", "counter",
    )  # fmt: skip
    fractions = {name.rpartition("/")[2]: points[0][1] for name, points in run.metrics.items()}
    assert fractions["answer_fraction"] > 0.9 and 0.5 <= fractions["agreement_fraction"] <= 1.0
    assert 0.0 < fractions["success_sample_fraction"] <= 0.25  # one of a group of four
    assert motion(run, initial) > 0 and {reward for _, reward in run.metrics["train/reward"]} == {0.0}
    assert all(set(sample.record) == {"prompt"} for samples in run.samples for sample in samples)
