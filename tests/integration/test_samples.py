"""`--diagnostics.log_samples` on the real OpenRLHF: the numbers of two ranks are those of plain transformers."""

import pytest
import torch
from common import LORA, ROWS, SDPO, TWO_RANKS, ZERO, cases, same

from sdpo_plugin.monitoring.sample_file import NAME, read_samples

TEMPERATURE = 0.7
SOLUTION = "\nCorrect solution:\n\n{}\n\nCorrectly solve the original question."
KEYS = ["step", "sample", "prompt", "response", "reward", "feedback", "active", "truncated", "teacher_prompt",
        "truncated_at", "tokens", "token_ids", "in_loss", "student", "teacher", "alternatives"]  # fmt: skip


def flags(*more, samples=16):
    return (*SDPO, "--diagnostics.log_samples", str(samples), *more)


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


def test_the_numbers_are_those_of_plain_transformers(openrlhf, model, reward, recorded, plain, tmp_path):
    """Half of the samples have a teacher context. In float32, whose digits can be compared."""
    options = ["--no-reprompt.use_feedback", "--rollout.temperature", str(TEMPERATURE)]
    fp32 = ["--plugins", "probe", "--probe.fp32", "--probe.out", str(tmp_path / "gradients.pt")]
    run = openrlhf(model, ROWS, reward, *flags(*ZERO[3], *options, *fp32), replay=recorded)
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
        assert line["truncated"] == bool(sample.truncated) and line["truncated_at"] == {}
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
    assert tokens > 0


def test_off_by_default_and_no_weight_is_another(replay, recorded):
    """Two updates a rollout, so that a second look at a sample would be another."""
    twice = (*SDPO, *TWO_RANKS, "--train.max_epochs", "2")
    without, seen = replay(*twice), replay(*twice, "--diagnostics.log_samples", "3")
    assert same(without, seen) and not same(seen, recorded)
    assert not list(without.directory.rglob(NAME))
    (file,) = seen.directory.rglob(NAME)
    assert list(file.parent.glob("events.out.tfevents.*"))  # one directory is one run
    lines = read_samples(file)
    assert [line["step"] for line in lines] == [1] * 3 + [2] * 3
    assert [line["sample"] for line in lines[:3]] != [0, 2, 4]  # not the first ones: those of lowest hash, in its order
    prompts = [line["prompt"] for line in lines]
    assert prompts[:3] == prompts[3:] and len({str(prompt) for prompt in prompts}) == 3
    for line in lines:
        assert line["active"] and len(line["tokens"]) == len(line["student"]) == len(line["teacher"]) > 0
        assert all(len(five) == 5 for five in line["alternatives"])


CASES = {
    "lora": (*SDPO, *ZERO[3], *LORA),
    "dynamic": (*SDPO, *ZERO[2], "--ds.packing_samples", "--vllm.num_engines", "1",
                "--train.dynamic_batch_enable", "--train.max_tokens_per_gpu", "64"),
    "policy loss": (*SDPO, *ZERO[2], "--distill.weight", "0.5", "--teacher.kind", "trust_region"),
    "sdft": ("--algo", "sdft", *ZERO[2], "--reprompt.privileged_key", "note"),
    "rlcsd": ("--algo", "rlcsd", *ZERO[3], "--rlcsd.wrong_hints", "1", "--reprompt.template",
              "{prompt}{solution}{feedback}"),
}  # fmt: skip


@pytest.mark.parametrize("case", cases(CASES.keys(), "lora", "dynamic"))
def test_every_way_to_train_has_its_numbers(replay, case):
    run = replay(*CASES[case], "--diagnostics.log_samples", "16")
    lines = read_samples(run.directory / "tensorboard")
    assert sorted((line["step"], line["sample"]) for line in lines) == [(s, i) for s in (1, 2) for i in range(16)]
    active = [line for line in lines if line["active"]]
    assert active
    for line in active:
        assert len(line["tokens"]) == len(line["student"]) == len(line["teacher"]) == len(line["alternatives"]) > 0
        assert all(x < 0 for x in line["student"] + line["teacher"])
        for five, log_prob, token in zip(line["alternatives"], line["teacher"], line["tokens"], strict=True):
            values = [value for _, value in five]
            assert values == sorted(values, reverse=True) and values[0] >= log_prob
            assert token not in [piece for piece, _ in five] or dict(five)[token] == pytest.approx(log_prob, abs=1e-3)
    if case == "sdft":
        assert all("\nrow " in line["teacher_prompt"] for line in active) and len(active) == 32
    if case == "rlcsd":  # the first context is the right hint
        assert all(line["feedback"] in line["teacher_prompt"] for line in active)


def test_asynchronous_training_is_recorded(openrlhf, model, reward):
    """Of rows with labels of every type, and dates in every chat."""
    flags = (*SDPO, "--diagnostics.log_samples", "16", "--train.async_enable", "--train.num_episodes", "2")
    labels = [5, 0.5, ["a", 1], {"b": 1}, None, True, "x", "2024-05-01"]
    chats = [[{**row["prompt"][0], "time": "2024-05-01T10:00:00Z"}] for row in ROWS]
    rows = [{"prompt": chat, "label": label} for chat, label in zip(chats, labels, strict=True)]
    lines = read_samples(openrlhf(model, rows, reward, *flags).directory / "tensorboard")
    assert [line["step"] for line in lines] == [1] * 16 + [2] * 16 and all(line["teacher"] for line in lines)
    said = {f"expected {label}": chat for label, chat in zip(labels, chats, strict=True)}
    assert {line["feedback"] for line in lines} == set(said)
    assert all(line["prompt"] == said[line["feedback"]] for line in lines)


@pytest.mark.check
def test_a_restart_goes_on_where_its_checkpoint_was(openrlhf, model, reward, recorded, tmp_path):
    """Two steps, a checkpoint after the first alone; the second step's lines and a broken one are not there twice."""
    flags = (*SDPO, *TWO_RANKS, "--diagnostics.log_samples", "2", "--logger.wandb.run_name", "mine", "--ckpt.path",
             str(tmp_path / "ckpt"), "--logger.tensorboard_dir", str(tmp_path / "tensorboard"))  # fmt: skip
    file = tmp_path / "tensorboard" / "mine" / NAME
    openrlhf(model, ROWS, reward, *flags, "--ckpt.save_steps", "1", replay=recorded)
    whole = file.read_bytes()
    (tmp_path / "ckpt" / "_actor" / "latest").write_text("global_step1")
    file.write_bytes(whole + b'{"step": 3, "sam')
    openrlhf(model, ROWS, reward, *flags, "--ckpt.load_enable", replay=recorded)
    lines = file.read_bytes().splitlines()
    # The replay begins with its first file again: the lines of steps 2 and 3 are of the samples of steps 1 and 2.
    assert [line["step"] for line in read_samples(file)] == [1, 1, 2, 2, 3, 3]
    assert lines[:2] == whole.splitlines()[:2] and lines[2:4] != whole.splitlines()[2:4]
