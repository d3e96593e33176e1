"""The real host on CPU: Ray, vLLM, DeepSpeed, weight sync. What is asserted are weights, tokens and metrics."""

import textwrap

import pytest
import torch
from common import ROWS, SDPO, TWO_RANKS, ZERO, motion, same

from sdpo_plugin.testing import RunFailed

PUBLISHED_METRICS = (
    "success_group_fraction", "success_sample_fraction", "feedback_available_fraction", "feedback_used_fraction",
    "reprompt_sample_fraction", "empty_target_batch",
)  # fmt: skip


@pytest.fixture(scope="session")
def initial(model):
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


def test_metrics_reach_the_logs(recorded):
    for name in PUBLISHED_METRICS:
        assert [step for step, _ in recorded.metrics[f"train/self_distillation/{name}"]] == [1, 2], name
    first = {tag.removeprefix("train/"): points[0][1] for tag, points in recorded.metrics.items()}
    won = [sample.rewards.item() for sample in recorded.samples[0]]
    pairs = list(zip(won[::2], won[1::2], strict=True))  # two samples per prompt teach each other
    assert first["self_distillation/success_group_fraction"] == pytest.approx(sum(map(any, pairs)) / len(pairs))
    assert first["self_distillation/success_sample_fraction"] == pytest.approx(sum(won) / len(won))
    assert first["self_distillation/feedback_available_fraction"] == 1.0
    assert first["self_distillation/feedback_used_fraction"] == pytest.approx(1 - sum(won) / len(won))
    assert first["self_distillation/reprompt_sample_fraction"] == 1.0
    assert first["self_distillation/loss"] > 0.0
    assert first["policy_loss"] == pytest.approx(first["self_distillation/loss"], rel=1e-3)


def test_feedback_and_record_reach_the_samples(recorded):
    for samples in recorded.samples:
        assert len(samples) == 2 * len(ROWS)
        for sample in samples:
            row = int(sample.labels[0])
            assert sample.record["note"] == f"row {row}" and sample.feedback == f"expected {row}"


@pytest.mark.parametrize("zero", [ZERO[2], ZERO[3]], ids=["zero2", "zero3"])
def test_distillation_acts_on_the_weights_and_weight_0_is_the_host(replay, initial, zero):
    distilled = replay(*SDPO, *zero)
    without = replay(*SDPO, "--distill.weight", "0", *zero)
    host = replay(*zero, plain=True)
    assert same(without, host)
    assert not same(distilled, host)
    assert motion(distilled, initial) > 0 and motion(host, initial) > 0
    assert not any(tag.startswith("train/self_distillation") for tag in without.metrics)


def test_hybrid_is_neither_of_its_parts(replay):
    half = replay(*SDPO, "--distill.weight", "0.5", *ZERO[2])
    assert not same(half, replay(*SDPO, *ZERO[2])) and not same(half, replay(*ZERO[2], plain=True))


def test_replay_repeats_the_recorded_run(replay, recorded):
    """Also: the engine's weights and the trainer's own path do not depend on who generated the samples."""
    assert same(replay(*SDPO, *ZERO[2]), recorded)


def test_ranks_and_stages_agree(replay):
    """One rank with the whole batch and two with half each: one global token mean."""
    one = replay(*SDPO, "--train.micro_batch_size", "8").weights
    for zero in (ZERO[0], ZERO[1], ZERO[2], ZERO[3]):
        two = replay(*SDPO, *zero).weights
        for name in one:
            torch.testing.assert_close(two[name].float(), one[name].float(), rtol=0, atol=2e-3, msg=f"{name} {zero}")


def test_teachers_agree_on_the_first_step_and_part_on_the_second(replay):
    runs = {kind: replay(*SDPO, "--teacher.kind", kind, *ZERO[2]) for kind in ("live", "base", "ema")}
    losses = {k: [v for _, v in run.metrics["train/self_distillation/loss"]] for k, run in runs.items()}
    assert losses["live"][0] == losses["base"][0] == losses["ema"][0]
    assert len({losses[k][1] for k in losses}) == 3
    assert not same(runs["live"], runs["base"]) and not same(runs["ema"], runs["base"])


def test_resume_continues_with_the_teacher(openrlhf, model, reward, recorded, tmp_path):
    """Stop after step 1, restart from its checkpoint: step 2 is the step of the run that never stopped."""
    import shutil

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


def test_a_foreign_plugin_adds_a_flag_a_metric_and_a_term(replay, monkeypatch, tmp_path):
    """A throw-away distribution with an entry point, next to the algorithm."""
    (tmp_path / "toy.py").write_text(
        textwrap.dedent('''
        """Pull the log-probabilities of what was sampled down, by a flag."""
        from sdpo_plugin.host.hookspecs import hookimpl

        @hookimpl
        def openrlhf_add_arguments(parser):
            parser.add_argument("--toy.pull", type=float, default=0.0)

        @hookimpl(trylast=True)
        def openrlhf_policy_loss(step):
            pull = step.worker.args.toy.pull
            mean = (step.loss_weights * step.log_probs).sum()
            step.loss = step.loss + pull * mean
            step.metrics["toy/log_prob"] = mean.detach()
        ''')
    )
    metadata = tmp_path / "toy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[openrlhf.plugins]\ntoy = toy\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    half = (*SDPO, "--distill.weight", "0.5", *ZERO[2])
    pulled = replay(*half, "--toy.pull", "0.3")
    assert pulled.metrics["train/toy/log_prob"][0][1] < 0.0
    monkeypatch.delenv("PYTHONPATH")
    assert not same(pulled, replay(*half))


def test_the_hosts_own_tests_pass_in_cpu_mode():
    import subprocess
    import sys

    code = (
        "from sdpo_plugin.host import cpu; cpu.enable()\n"
        "import pytest, sys, tests\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *tests.__path__]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert "221 passed" in done.stdout, done.stdout[-3000:]
