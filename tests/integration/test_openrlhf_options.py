"""The host's own options beside self-distillation, on the real host: each acts."""

import itertools
import json
import shutil

import pytest
import torch
from common import ROWS, SDPO, motion, same, vision_model

from sdpo_plugin.monitoring.sample_file import read_samples
from sdpo_plugin.testing import RunFailed

REINFORCE = ("--algo.advantage.estimator", "reinforce")  # needs no group


def values(run, tag) -> list[float]:
    return [value for _, value in run.metrics[f"train/{tag}"]]


@pytest.mark.check
def test_epochs_and_minibatches_move_the_teacher_and_the_importance_ratio(replay, openrlhf, model, reward, recorded):
    """Two steps of two epochs of two minibatches; the ratio is 1 where there is one update per rollout."""
    more = ("--train.max_epochs", "2", "--train.batch_size", "8", "--actor.adam.lr", "1e-2")
    run = openrlhf(model, ROWS, reward, *SDPO, *more, "--ckpt.save_steps", "1", replay=recorded)
    teacher = torch.load(run.directory / "ckpt" / "_actor" / "global_step2" / "teacher_rank0.pt", weights_only=False)
    assert teacher["steps"] == 8
    unclipped = ("--distill.is_clip", "none")
    assert not same(run, replay(*SDPO, *more, *unclipped))
    assert same(replay(*SDPO), replay(*SDPO, *unclipped))


@pytest.mark.check
def test_kl_to_the_reference_model_holds_the_student_back(replay, initial):
    free = replay(*SDPO, "--actor.adam.lr", "1e-2")
    kl = ("--algo.kl.use_loss", "--algo.kl.estimator", "k2", "--algo.kl.init_coef", "100")
    held = replay(*SDPO, "--actor.adam.lr", "1e-2", *kl)
    assert values(held, "kl")[1] > 0
    assert values(held, "self_distillation/loss")[0] == values(free, "self_distillation/loss")[0]
    assert not same(held, free)
    assert motion(held, initial) < motion(free, initial)


@pytest.mark.check
def test_an_entropy_bonus_acts_on_the_student(replay):
    run = replay(*SDPO, "--actor.entropy_coef", "1.0")
    assert values(run, "entropy_loss")[0] > 0 and not same(run, replay(*SDPO))


@pytest.mark.check
def test_critic_less_estimators_go_into_the_policy_s_half(replay):
    half = (*SDPO, "--distill.weight", "0.5", "--algo.advantage.estimator")
    runs = [replay(*SDPO), *(replay(*half, estimator) for estimator in ("reinforce", "rloo", "dr_grpo"))]
    assert not any(same(a, b) for a, b in itertools.combinations(runs, 2))


REWARD_OF_TURNS = """
import torch

asked = {}

def reward_func(queries, prompts, labels):
    '''Even labels succeed every other time, odd ones always.'''
    reward = torch.zeros(len(labels))
    for i, label in enumerate(labels):
        asked[label] = asked.get(label, 0) + 1
        reward[i] = float(int(label) % 2 or asked[label] % 2)
    return {"rewards": reward, "scores": reward}
"""


@pytest.mark.check
def test_dynamic_filtering_leaves_groups_that_differ(openrlhf, model, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD_OF_TURNS)
    run = openrlhf(
        model, ROWS, tmp_path / "reward.py", *SDPO, "--algo.dynamic_filtering_enable",
        "--algo.dynamic_filtering_range", "0.1", "0.9", "--rollout.batch_size", "2", "--rollout.micro_batch_size", "4",
        "--train.batch_size", "4", "--train.micro_batch_size", "4",
    )  # fmt: skip
    assert sorted(int(sample.labels[0]) for step in run.samples for sample in step) == [0, 0, 2, 2, 4, 4, 6, 6]
    assert values(run, "self_distillation/success_sample_fraction") == [0.5, 0.5]


def test_one_sample_a_prompt_partly_rolled_out_learns_from_feedback(openrlhf, model, reward, initial):
    """Generation goes on while weights change, so samples may be of two policies: their ratio is the engine's."""
    run = openrlhf(
        model, ROWS, reward, *SDPO, *REINFORCE, "--rollout.n_samples_per_prompt", "1", "--train.batch_size", "8",
        "--train.async_enable", "--train.partial_rollout_enable", "--train.num_episodes", "3",
    )  # fmt: skip
    assert values(run, "self_distillation/feedback_used_fraction")[0] == 1.0
    assert all(sample.rollout_log_probs is not None for step in run.samples for sample in step)
    assert motion(run, initial) > 0


def test_truncated_responses_are_left_out_and_counted(openrlhf, model, reward):
    """An untrained model ends one response in two within 64 tokens; all samples have feedback."""
    run = openrlhf(model, ROWS, reward, *SDPO, "--distill.mask_truncated", "--rollout.max_new_tokens", "64")
    (samples,) = run.samples
    lengths = [int(sample.action_mask.sum()) for sample in samples]
    ended = [n for n, sample in zip(lengths, samples, strict=True) if not sample.truncated]
    assert 0 < len(ended) < len(samples)
    assert values(run, "self_distillation/reprompt_sample_fraction") == [len(ended) / len(samples)]
    assert values(run, "self_distillation/token_fraction") == [pytest.approx(sum(ended) / sum(lengths))]
    for name, some in (("response_length", lengths), ("terminated_length", ended)):
        assert values(run, f"self_distillation/{name}_min") == [min(some)]
        assert values(run, f"self_distillation/{name}_max") == [max(some)]
    assert values(run, "self_distillation/terminated_length_mean") == [pytest.approx(sum(ended) / len(ended))]


def test_a_teacher_s_prompt_that_is_too_long_may_stop_the_run(replay):
    message = r"openrlhf-sdpo: error: --reprompt.truncation error: a teacher's prompt of \d+ tokens \("
    with pytest.raises(RunFailed, match=message):
        replay(*SDPO, "--reprompt.truncation", "error", "--reprompt.max_len", "90")


READERS = """
import json

from sdpo_plugin import hookimpl


def note(args, who, ids):
    with open(args.readers.out, "a") as file:
        file.write(json.dumps([who, ids]) + "\\n")


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--readers.out")


@hookimpl
def openrlhf_rollout_sample(sample, response, args):
    note(args, "student", sample.sequences[0].tolist())


@hookimpl(tryfirst=True)
def openrlhf_before_forward(micro_batch):
    for ids in micro_batch.data["teacher_prompt"]:
        note(micro_batch.worker.args, "teacher", ids.tolist())
"""


def test_the_chat_template_s_arguments_reach_student_and_teacher(openrlhf, model, reward, tmp_path, monkeypatch):
    """In training and evaluation, as token ids: of a template that answers in short where thinking is off."""
    from transformers import AutoTokenizer

    shutil.copytree(model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}in short: {% endif %}"
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "readers.py").write_text(READERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    asked = [{"prompt": [{"role": "user", "content": f"ask {i}"}], "label": str(i)} for i in range(8)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    openrlhf(
        tmp_path / "model", ROWS, reward, *SDPO, "--data.chat_template_kwargs", '{"enable_thinking": false}',
        "--plugins", "sdpo_plugin.testing", "readers", "--readers.out", str(tmp_path / "read"),
        "--eval.dataset", str(tmp_path / "asked.jsonl"), "--eval.steps", "1", "--eval.n_samples_per_prompt", "1",
    )  # fmt: skip
    read = [json.loads(line) for line in (tmp_path / "read").read_text().splitlines()]
    students, teachers = (
        [tokenizer.decode(ids) for who, ids in read if who == reader and ids] for reader in ("student", "teacher")
    )
    for content in ("say", "ask"):
        assert any(text.startswith(f"<|user|>{content} ") for text in students)
    assert all("<|assistant|>in short: " in text for text in students)
    assert teachers and all(text.endswith("original question.<|assistant|>in short: ") for text in teachers)


def test_a_vision_language_checkpoint_is_trained_on_text(openrlhf, reward, recorded, replay, tmp_path):
    """OpenRLHF hands over a processor where a tokenizer is expected; it is of the same text model's tokens.

    On recorded samples: vLLM has no model of LLaVA's without torchvision, which CPU installations are without.
    """
    parts = [row | {"prompt": [{"role": "user", "content": [{"type": "text", "text": f"say {i}"}]}]}
             for i, row in enumerate(ROWS)]  # fmt: skip
    run = openrlhf(
        vision_model(tmp_path / "model"), parts, reward, *SDPO, "--diagnostics.log_samples", "4", replay=recorded
    )
    for name in ("success_sample", "feedback_used", "reprompt_sample", "truncated", "token"):
        tag = f"self_distillation/{name}_fraction"
        assert values(run, tag) == values(replay(*SDPO), tag), tag
    assert all(0 < loss < 1 for loss in values(run, "self_distillation/loss"))
    taught = [line["teacher_prompt"] for line in read_samples(run.directory) if line["active"]]
    assert taught and all(text.startswith("<|user|>say ") for text in taught)
    assert all(text.endswith("original question.<|assistant|>") for text in taught)


AGENT = """
import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor


class Instance(AgentInstanceBase):
    def __init__(self):
        pass

    async def step(self, states, **kwargs):
        return {
            "rewards": torch.tensor(1.0), "scores": torch.tensor(1.0), "environment_feedback": "", "done": True,
            "extra_logs": {"feedback": "again"},
        }


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(Instance)

    async def execute(self, prompt, label, *args, **kwargs):
        response = await super().execute(prompt, label, *args, **kwargs)
        # What there was no room to answer earns a reward all the same: it must not become a demonstration.
        return response if response["action_ranges"] else response | {"reward": 1.0, "scores": 1.0}
"""


@pytest.mark.check
def test_samples_without_an_action_teach_nothing_and_are_taught_nothing(openrlhf, model, initial, tmp_path):
    """Where a response may be as long as the context, OpenRLHF lets a longer prompt leave its agent no room."""
    (tmp_path / "agent.py").write_text(AGENT)
    rows = [*ROWS[:-1], {"prompt": [{"role": "user", "content": "say " * 20}], "label": "7", "note": ""}]
    run = openrlhf(
        model, rows, "", *SDPO, "--train.agent_func_path", str(tmp_path / "agent.py"), "--data.max_len", "24",
        "--rollout.max_new_tokens", "24", "--train.micro_batch_size", "2", "--rollout.micro_batch_size", "2",
    )  # fmt: skip
    without = [sample for sample in run.samples[0] if not sample.action_mask.any()]
    assert len(without) == 2 and len(run.samples[0]) == 16
    assert values(run, "self_distillation/reprompt_sample_fraction") == [14 / 16]
    assert values(run, "self_distillation/success_group_fraction") == [7 / 8]
    assert values(run, "self_distillation/token_fraction") == [1.0]
    assert motion(run, initial) > 0


FP16_ON_CPU = """
from sdpo_plugin import hookimpl

@hookimpl
def openrlhf_model_built(actor, args):
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # it says no where oneDNN has no fp16 kernels; PyTorch has
"""


@pytest.mark.check
def test_fp16_has_the_gradient_of_bf16(replay, initial, monkeypatch, tmp_path):
    """DeepSpeed's loss scale starts at 65,536 and halves where a gradient overflows, which skips the step."""
    (tmp_path / "fp16_on_cpu.py").write_text(FP16_ON_CPU)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = replay(*SDPO, "--ds.param_dtype", "fp16", "--plugins", "sdpo_plugin.testing", "fp16_on_cpu")
    norms = values(run, "actor_grad_norm"), values(replay(*SDPO), "actor_grad_norm")
    print(f"gradient norms in fp16 and bf16: {norms}")
    assert norms[0][0] == pytest.approx(norms[1][0], rel=0.05) and motion(run, initial) > 0


def test_the_rollout_correction_acts_in_step(replay, recorded, initial):
    """Trainer and engine differ by rounding. A band that no response is in leaves nothing to learn from."""
    assert all(sample.rollout_log_probs is not None for samples in recorded.samples for sample in samples)
    level, mode, threshold = (f"--algo.advantage.is_correction_{name}" for name in ("level", "mode", "threshold"))
    corrected, off = replay(*SDPO), replay(*SDPO, level, "off")
    none = replay(*SDPO, level, "seq", mode, "mask", threshold, "2", "3")
    assert not same(corrected, off) and "train/vllm_kl" in corrected.metrics and "train/vllm_kl" not in off.metrics
    losses = [values(run, "self_distillation/loss") for run in (corrected, off, none)]
    print(f"losses: corrected {losses[0]}, off {losses[1]}, all dropped {losses[2]}")
    assert losses[0][0] != losses[1][0] and losses[2] == [0.0, 0.0] and motion(none, initial) == 0.0
