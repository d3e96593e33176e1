"""The real host on CPU: Ray, vLLM, DeepSpeed, weight sync. What is asserted are weights, tokens and metrics."""


import pytest
from common import ROWS, SDPO, STAGES, ZERO, cases, motion, same

from sdpo_plugin.testing import RunFailed

PUBLISHED_METRICS = (
    "success_group_fraction", "success_sample_fraction", "feedback_available_fraction", "feedback_used_fraction",
    "reprompt_sample_fraction", "empty_target_batch",
)  # fmt: skip


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
    # The host averages what each rank has of the mean, weighted by its share of the tokens: near the mean, not it.
    assert first["policy_loss"] == pytest.approx(first["self_distillation/loss"], rel=1e-2)


def test_feedback_and_record_reach_the_samples(recorded):
    for samples in recorded.samples:
        assert len(samples) == 2 * len(ROWS)
        for sample in samples:
            row = int(sample.labels[0])
            assert sample.record["note"] == f"row {row}" and sample.feedback == f"expected {row}"


@pytest.mark.parametrize("zero", cases({name: STAGES[name] for name in ("zero2", "zero3")}, "zero2"))
def test_distillation_acts_on_the_weights_and_weight_0_is_the_host(replay, recorded, initial, zero):
    distilled = recorded if zero == ZERO[2] else replay(*SDPO, *zero)
    without = replay(*SDPO, "--distill.weight", "0", *zero)
    host = replay(*zero, plain=True)
    assert same(without, host)
    assert not same(distilled, host)
    assert motion(distilled, initial) > 0 and motion(host, initial) > 0
    assert not any(tag.startswith("train/self_distillation") for tag in without.metrics)


REFUSED = {"name": ("bfloat16", "unheard_of"), "dtype": ("float32", "mismatch dtype: src torch.fl")}


@pytest.mark.parametrize(("dtype", "said"), cases(REFUSED, "name"))
def test_a_weight_that_the_engine_refuses_ends_the_run(openrlhf, model, reward, monkeypatch, dtype, said):
    with pytest.raises(RunFailed, match=rf"^(?!no end in time)[\s\S]*{said}"):
        openrlhf(
            model, ROWS, reward, *SDPO, "--refused.dtype", dtype, "--plugins", "sdpo_plugin.testing", "refused",
            timeout=90,
        )  # fmt: skip


def test_hybrid_is_neither_of_its_parts(replay, recorded):
    half = replay(*SDPO, "--distill.weight", "0.5", *ZERO[2])
    assert not same(half, recorded) and not same(half, replay(*ZERO[2], plain=True))


TOY = '''
"""Pull the log-probabilities of what was sampled down, by a flag."""
from sdpo_plugin import hookimpl

@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--toy.pull", type=float, default=0.0)
    parser.add_argument("--toy.bonus", type=float, default=0.0)

@hookimpl(trylast=True)
def openrlhf_policy_loss(micro_batch):
    toy = micro_batch.worker.args.toy
    mean = (micro_batch.loss_weights * micro_batch.log_probs).sum()
    micro_batch.loss = micro_batch.loss + toy.pull * mean
    if toy.bonus:
        entropy = (micro_batch.loss_weights * micro_batch.entropy).sum()
        micro_batch.loss = micro_batch.loss - toy.bonus * entropy
    micro_batch.metrics["toy/log_prob"] = mean.detach()
'''
NEEDS = """
@hookimpl
def openrlhf_requirements(args):
    return {"log_probs": True, "entropy": True}
"""


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """`toy(source)`: a throw-away distribution with an entry point, next to the algorithm."""
    metadata = tmp_path / "toy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[openrlhf.plugins]\ntoy = toy\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return (tmp_path / "toy.py").write_text


@pytest.mark.parametrize("weight", cases(["0.5", "1"], "0.5"))
def test_a_foreign_plugin_adds_a_flag_a_metric_and_a_term(replay, recorded, toy, weight):
    """Also where the algorithm itself has no use for log-probabilities or entropy."""
    toy(TOY + NEEDS)
    flags = (*SDPO, "--distill.weight", weight, *ZERO[2])
    alone, pulled, spread = (replay(*flags, *more) for more in ((), ("--toy.pull", "0.3"), ("--toy.bonus", "0.3")))
    assert pulled.metrics["train/toy/log_prob"][0][1] < 0.0
    assert not same(pulled, alone) and not same(spread, alone) and not same(spread, pulled)


def test_a_term_without_a_gradient_is_an_error_that_says_what_to_do(replay, toy):
    toy(TOY)
    with pytest.raises(RunFailed, match='return {"log_probs": True} from openrlhf_requirements'):
        replay(*SDPO, *ZERO[2], "--toy.pull", "0.31")
