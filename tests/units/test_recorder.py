"""What is recorded of a sample: which ones, their texts on the controller, their numbers on a worker."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from largest import LargestTensor
from three_samples import ACTION, ATTENTION, MASKS, PROMPTS, SEQUENCES

from sdpo_plugin.algorithms.sdft import SDFT
from sdpo_plugin.algorithms.sdpo import SDPO
from sdpo_plugin.distillation.context import Rollout
from sdpo_plugin.distillation.head import Head
from sdpo_plugin.distillation.prompts import FramedText
from sdpo_plugin.interface.rollout_batch import RolloutBatch, Turn
from sdpo_plugin.interface.transport import ATTACHED, REQUESTED
from sdpo_plugin.monitoring.recorder import RECORDED, chosen, likeliest, token_texts
from sdpo_plugin.monitoring.sample_file import read_samples
from sdpo_plugin.testing import fake_worker

# ── which samples ──


def rollouts(*prompts, per_prompt=2):
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [Rollout(group, chat, "r", 0.0) for group, chat in enumerate(asked) for _ in range(per_prompt)]


def test_the_same_prompts_are_chosen_in_whatever_order_they_come():
    names = [f"say {i}" for i in range(16)]
    first = [rollouts(*names)[i].messages for i in chosen(rollouts(*names), 3)]
    moved = names[5:] + names[:5]
    assert [rollouts(*moved)[i].messages for i in chosen(rollouts(*moved), 3)] == first
    assert all(i % 2 == 0 for i in chosen(rollouts(*names), 3))  # the first sample of each
    fewer = [name for name in names if {"role": "user", "content": name} not in first[1]]
    assert rollouts(*fewer)[chosen(rollouts(*fewer), 3)[1]].messages == first[2]


def test_more_than_there_are_prompts_are_further_samples_of_each():
    batch = rollouts("a", "b", per_prompt=3)
    found = chosen(batch, 4)
    assert sorted(found) == [0, 1, 3, 4] and set(found[:2]) == {0, 3}
    assert sorted(chosen(batch, 99)) == list(range(6)) and chosen([], 3) == []
    framed = [Rollout(0, FramedText("<", "a\ud83d", ">"), "r", 0.0)]
    assert chosen(framed, 1) == [0]


# ── the controller ──


@pytest.fixture(scope="module")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture
def lines(tokenizer, tmp_path):
    """`lines(samples, answers, algorithm, **options)`: of one rollout batch, what its run writes.

    A sample is (response, reward, feedback, turns); without turns all of the response is sampled.
    """

    def write(samples, answers=(), algorithm=SDPO, step=3, **options):
        found = []
        for response, reward, feedback, *turns in samples:
            prompt, ids = (tokenizer(text)["input_ids"] for text in ("<|user|>Q?<|assistant|>", response))
            mask = [0] * (len(prompt) - 1) + [1] * len(ids)
            turns = [Turn(len(prompt) - 1 + a, len(prompt) - 1 + b, said) for a, b, said in turns]
            if turns:
                mask = [int(any(turn.start <= at < turn.stop for turn in turns)) for at in range(len(mask))]
            found.append(SimpleNamespace(
                sequences=torch.tensor([prompt + ids]), truncated=torch.tensor([len(ids) > 8]), feedback=feedback,
                action_mask=torch.tensor([mask]), turns=turns, skipped="down" if reward is None else None,
                record={"prompt": [{"role": "user", "content": "Q?"}], "privileged_context": "P" * 50},
            ))  # fmt: skip
        rewards = torch.tensor([0.0 if reward is None else reward for _, reward, *_ in samples])
        experience = SimpleNamespace(index=list(range(len(found))), rewards=rewards, info={})
        options = {"diagnostics": {"log_samples": 9}, **options}
        logger = {"tensorboard_dir": str(tmp_path), "wandb": SimpleNamespace(run_name="run")}
        args = fake_worker(logger=logger, **options).args
        batch = RolloutBatch(found, [experience], args, tokenizer, math.inf, step)
        plugin = algorithm(args)
        plugin.openrlhf_load_controller_state({"global_step": step - 1}, args)
        plugin.openrlhf_rollout_batch(batch)
        asked = {i for i, sample in enumerate(experience.info[ATTACHED + REQUESTED + RECORDED]) if len(sample)}
        batch.collect_reports({(RECORDED, step, i): told for i, told in enumerate(answers) if told is not None})
        plugin.openrlhf_after_training_step(batch)
        written = {line["sample"]: line for line in read_samples(tmp_path)}
        assert asked == set(written) == set(range(len(samples)))
        return [written[i] for i in range(len(samples))]

    return write


def test_every_kind_of_sample_has_its_line(lines):
    right, wrong, empty, failed = lines(
        [("abc", 1.0, None), ("de<eos>", 0.0, "no"), ("", 0.0, None), ("fghijklmn", None, None)]
    )
    assert right["prompt"] == [{"role": "user", "content": "Q?"}] and right["step"] == 3
    assert not right["active"] and right["teacher_prompt"] is None and right["in_loss"] == [False] * 3
    assert wrong["active"] and "abc" in wrong["teacher_prompt"] and wrong["teacher_prompt"].endswith("<|assistant|>")
    assert wrong["response"] == "de<eos>" and wrong["tokens"] == ["d", "e", "<eos>"] and wrong["in_loss"] == [True] * 3
    assert wrong["feedback"] == "no" and wrong["reward"] == 0.0 and not wrong["truncated"]
    assert empty["tokens"] == empty["token_ids"] == empty["student"] == [] and empty["response"] == ""
    assert failed["reward"] is None and failed["truncated"] and "abc" not in (failed["teacher_prompt"] or "")


def test_numbers_take_their_places(lines):
    told = {"student": [-0.123456, -2.0], "teacher": [None, -math.inf]}
    told |= {"ids": [[], [7, 8]], "log_probs": [[], [-1.0, -1.5]]}
    right, wrong = lines([("ab", 1.0, None), ("cd", 0.0, None)], [{"student": [-1.0, math.nan]}, told])
    assert wrong["student"] == [-0.1235, -2.0] and wrong["teacher"] == [None, None]
    assert wrong["alternatives"] == [[], [[" ", -1.0], ["!", -1.5]]]
    assert right["student"] == [-1.0, None] and right["teacher"] == right["alternatives"] == []


def test_a_sample_that_no_worker_trained_on_has_no_numbers(lines):
    _, wrong = lines([("ab", 1.0, None), ("cd", 0.0, None)], [None, None])
    assert wrong["active"] and wrong["student"] == wrong["teacher"] == wrong["alternatives"] == []


def test_what_was_truncated_is_named_with_its_place(lines):
    template = "{prompt}{privileged_context}{feedback}."
    options = {"reprompt": {"template": template, "max_len": 140}}
    _, wrong = lines([("ab", 1.0, None), ("cd", 0.0, "F" * 50)], **options)
    ((name, (place,)),) = wrong["truncated_at"].items()
    before, after = wrong["teacher_prompt"][:place], wrong["teacher_prompt"][place:]
    assert name == "feedback" and before.endswith("FF") and after.lstrip().startswith(".<|"), (before, after)
    assert "F" * 50 not in wrong["teacher_prompt"]
    assert lines([("ab", 1.0, None), ("cd", 0.0, "F")], reprompt={"template": template})[1]["truncated_at"] == {}


def test_of_turns_the_first_scored_one_is_shown_and_all_feedback(lines):
    """Between the two turns there is an observation, which the student did not write."""
    turns = [(0, 2, "first"), (5, 7, "second")]
    (line,) = lines([("aa123bb", 0.0, "whole", *turns)])
    assert line["response"] == "aa123bb" and line["tokens"] == ["a", "a", "b", "b"]
    assert line["feedback"] == "whole\n\nfirst\n\nsecond"
    assert "first" in line["teacher_prompt"] and "second" not in line["teacher_prompt"] and line["active"]


def test_feedback_that_nothing_uses_may_be_anything(lines):
    (line,) = lines([("ab", 0.0, {"a": 1})], reprompt={"use_feedback": False})
    assert line["feedback"] == "{'a': 1}" and not line["active"]


def test_sdft_shows_its_demonstration(lines):
    args = {"reprompt": {"template": SDFT.defaults["reprompt.template"]}}
    (line,) = lines([("ab", 0.0, None)], algorithm=SDFT, **args)
    assert line["active"] and "P" * 50 in line["teacher_prompt"]


def test_a_full_disk_is_reported_and_the_run_goes_on(lines, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdpo_plugin.monitoring.sample_file.SampleFile.append", full)
    with pytest.raises(AssertionError):  # there is nothing to read
        lines([("ab", 0.0, "no")])
    assert "the samples of step 3 are not recorded" in caplog.text and "No space left" in caplog.text


def test_pieces_keep_the_spaces_of_sentencepiece():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "\u2581the": 1, "\u2581": 2, "re": 3}
    own = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    own.pre_tokenizer, own.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")
    assert token_texts([1, 3, 2, 1, 99], wrapped) == [" the", "re", " ", " the", ""]


# ── the policy worker ──


def step(worker, plugin, asked=(0, 1, 2), **more):
    asked = [torch.tensor([1, 10 + i] if i in asked else []) for i in range(3)]
    given = {"teacher_prompt": PROMPTS, "loss_mask": MASKS, REQUESTED + RECORDED: asked, **more}
    return worker.micro_batch(plugin, SEQUENCES, ATTENTION, ACTION, **given)


def algorithm(worker):
    plugin = SDPO(worker.args)
    plugin.openrlhf_worker_setup(worker)
    return plugin


def scored(worker, i, prompt):
    """Log-probabilities `[A_i, V]` of the vocabulary behind a prompt (None: the student's), at temperature 1."""
    first, length = int(ACTION[i].nonzero()[0]) + 1, int(ATTENTION[i].sum())
    own = SEQUENCES[i, :first] if prompt is None else prompt
    read = torch.cat([own, SEQUENCES[i, first:length]])[None]
    logits = worker.actor.lm_head(worker.actor.states(read))[0, len(own) - 1 : -1]
    sampled = ACTION[i, first - 1 : length - 1].bool()
    return logits.log_softmax(-1)[sampled], SEQUENCES[i, first:length][sampled]


@pytest.mark.usefixtures("device")
def test_a_worker_reports_what_both_made_of_the_tokens():
    worker = fake_worker()
    step(worker, algorithm(worker))
    assert set(worker.reports) == {(RECORDED, 1, 10 + i) for i in range(3)}
    for i in range(2):
        told = worker.reports[RECORDED, 1, 10 + i]
        (student, ids), (teacher, _) = scored(worker, i, None), scored(worker, i, PROMPTS[i])
        assert told["student"] == pytest.approx(student.gather(1, ids[:, None])[:, 0].tolist(), abs=1e-5)
        assert told["teacher"] == pytest.approx(teacher.gather(1, ids[:, None])[:, 0].tolist(), abs=1e-5)
        values, likely = teacher.topk(5)
        assert told["ids"] == likely.tolist()
        torch.testing.assert_close(torch.tensor(told["log_probs"]), values)
    assert worker.reports[RECORDED, 1, 12] == {}  # no teacher, so the student has not read it; no engine's numbers


@pytest.mark.usefixtures("device")
def test_only_those_requested_and_only_once():
    worker = fake_worker()
    plugin = algorithm(worker)
    step(worker, plugin, asked=(1,))
    assert set(worker.reports) == {(RECORDED, 1, 11)}
    before = worker.reports[RECORDED, 1, 11]
    with torch.no_grad():
        worker.actor.lm_head.weight.mul_(2.0)
    step(worker, plugin)
    assert worker.reports[RECORDED, 1, 11] is before
    assert set(worker.reports) == {(RECORDED, 1, 10 + i) for i in range(3)}


@pytest.mark.usefixtures("device")
def test_the_student_is_the_one_before_the_first_update():
    worker = fake_worker(train={"max_epochs": 2})
    old = torch.rand(ACTION.shape) - 2
    plugin = algorithm(worker)
    asked = [torch.tensor([1, 10 + i]) for i in range(3)]
    given = {"teacher_prompt": PROMPTS, "loss_mask": MASKS, REQUESTED + RECORDED: asked}
    engine = torch.rand(ACTION.shape) - 9
    worker.micro_batch(plugin, SEQUENCES, ATTENTION, ACTION, old_log_probs=old, rollout_log_probs=engine, **given)
    for i, known in enumerate((old, old, engine)):  # the last one is not read, having no teacher
        assert worker.reports[RECORDED, 1, 10 + i]["student"] == pytest.approx(known[i][ACTION[i].bool()].tolist())


@pytest.mark.usefixtures("device")
def test_turns_that_no_teacher_scored_are_empty():
    worker = fake_worker()
    spans = [torch.zeros(7, 2, dtype=torch.long) for _ in range(3)]
    at = ACTION[0].nonzero()[:, 0]
    spans[0][at[1:]] = torch.tensor([0, len(PROMPTS[0])])
    masks = [MASKS[0].clone(), torch.zeros(7, dtype=torch.bool), torch.zeros(7, dtype=torch.bool)]
    masks[0][at[0]] = False
    step(worker, algorithm(worker), teacher_spans=spans, loss_mask=masks)
    told = worker.reports[RECORDED, 1, 10]
    assert told["teacher"][0] is None and told["ids"][0] == told["log_probs"][0] == [] and len(told["student"]) == 3
    assert None not in told["teacher"][1:] and all(len(ids) == 5 for ids in told["ids"][1:])


def test_by_default_nothing_is_computed_or_sent(monkeypatch):
    monkeypatch.setattr("sdpo_plugin.monitoring.recorder.likeliest", None)
    worker = fake_worker()
    plugin = algorithm(worker)
    assert plugin.recorder is None
    worker.micro_batch(plugin, SEQUENCES, ATTENTION, ACTION, teacher_prompt=PROMPTS, loss_mask=MASKS)
    assert not worker.reports
    sample = SimpleNamespace(action_mask=ACTION[:1])
    batch = RolloutBatch([sample], [], worker.args, None, math.inf)
    plugin.openrlhf_after_training_step(batch)
    assert not batch.reports


@pytest.mark.usefixtures("device")
def test_a_loss_is_the_same_with_and_without_recording():
    found = []
    for asked in ((), (0, 1, 2)):
        worker = fake_worker(distill={"mode": "full"})
        got = step(worker, algorithm(worker), asked=asked)
        found.append([got.loss.detach(), *torch.autograd.grad(got.loss, worker.actor.lm_head.parameters())])
        assert bool(worker.reports) is bool(asked)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_tensor_grows_with_tokens_and_vocabulary():
    n, hidden, vocab = 4096, 8, 8192
    head = Head(torch.randn(vocab, hidden), vocab_size=vocab - 100)
    states, ids = torch.randn(n, hidden), torch.randint(vocab - 100, (n,))
    with LargestTensor() as largest:
        log_probs, top, values = likeliest(states, head, ids, 0.5)
    assert largest.bytes < n * vocab * 4 / 8
    expected = ((states[:9] @ head.weight[:-100].T) / 0.5).log_softmax(-1)
    torch.testing.assert_close(log_probs[:9], expected.gather(1, ids[:9, None])[:, 0])
    torch.testing.assert_close(values[:9], expected.topk(5).values)
    assert json.dumps(top[0].tolist()) and top.max() < vocab - 100
    small = likeliest(torch.zeros(2, 8), Head(torch.randn(3, 8)), torch.zeros(2, dtype=torch.long), 1.0)
    assert small[1].shape == (2, 3)
