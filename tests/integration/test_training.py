"""The real host on CPU: ranks, teachers, resume, asynchronous rollouts, failures."""

import shutil

import pytest
from common import ROWS, SDPO, TWO_RANKS, ZERO, motion, same

from sdpo_plugin.testing import RunFailed


def test_ranks_and_stages_agree(replay, recorded):
    """One rank with the whole batch and two with half each, in two micro-batches: one global token mean.

    bf16 sets the tolerance: gradients are summed in different orders, and a model built under ZeRO-3 has its rotary
    frequencies in bf16, the host's reference model too. In float32 it is 1e-5 (test_gradients.py).
    """
    runs = [replay(*SDPO), recorded, replay(*SDPO, *ZERO[3])]
    for tag in ("train/self_distillation/loss", "train/actor_grad_norm"):
        one, two, sharded = [run.metrics[tag][0][1] for run in runs]
        print(f"{tag}: {two / one - 1:.1e}, {sharded / one - 1:.1e}")
        assert [two, sharded] == pytest.approx([one, one], rel=5e-3), tag


def test_teachers_agree_on_the_first_step_and_part_on_the_second(replay, recorded):
    runs = {kind: replay(*SDPO, "--teacher.kind", kind, *ZERO[2]) for kind in ("live", "base")}
    runs["ema"] = recorded  # the default
    losses = {k: [v for _, v in run.metrics["train/self_distillation/loss"]] for k, run in runs.items()}
    assert losses["live"][0] == losses["base"][0] == losses["ema"][0]
    assert len({losses[k][1] for k in losses}) == 3
    assert not same(runs["live"], runs["base"]) and not same(runs["ema"], runs["base"])


def test_resume_continues_with_the_teacher(openrlhf, model, reward, recorded, tmp_path):
    """Stop after step 1, restart from its checkpoint: step 2 is the step of the run that never stopped."""
    checkpoint = tmp_path / "ckpt" / "_actor"
    shutil.copytree(recorded.directory / "ckpt" / "_actor" / "global_step1", checkpoint / "global_step1")
    (checkpoint / "latest").write_text("global_step1")
    samples = tmp_path / "samples"
    samples.mkdir()
    shutil.copy(recorded.directory / "samples" / "00001.pt", samples)
    resumed = openrlhf(
        model, ROWS, reward, *SDPO, *TWO_RANKS, "--ckpt.load_enable", "--ckpt.path",
        str(tmp_path / "ckpt"), "--testing.replay", str(samples), "--vllm.num_engines", "1", replay=recorded,
    )  # fmt: skip
    assert same(resumed, recorded)


def test_asynchronous_rollouts_are_distilled(openrlhf, model, reward, initial):
    run = openrlhf(model, ROWS, reward, *SDPO, "--train.async_enable", "--train.num_episodes", "2")
    assert run.metrics["train/self_distillation/reprompt_sample_fraction"][0][1] == 1.0
    assert motion(run, initial) > 0


def test_a_reward_function_that_raises_stops_the_run(openrlhf, model, tmp_path):
    (tmp_path / "reward.py").write_text("def reward_func(queries, prompts, labels):\n    raise KeyError('no test')")
    with pytest.raises(RunFailed, match=r"(?s)the reward function failed.*KeyError: 'no test'"):
        openrlhf(model, ROWS, tmp_path / "reward.py", *SDPO)
