"""The watch: what it measures, when it speaks, and what it does about it."""

import pytest
import torch

from sdpo_plugin.config import DiagnosticsConfig, RepromptConfig
from sdpo_plugin.distillation.context import Rollout, TeacherContext, build_teacher_contexts
from sdpo_plugin.distillation.fused import Head
from sdpo_plugin.monitoring.collapse import GAIN, Watch, measure


def watch(tolerance=3, reprompt=None, uses_policy_loss=False, **options) -> Watch:
    return Watch(DiagnosticsConfig(tolerance=tolerance, **options), reprompt or RepromptConfig(), uses_policy_loss)


def rollouts(rewards, feedback=None):
    return [Rollout(0, "question", f"answer {i}", reward, feedback) for i, reward in enumerate(rewards)]


def said(watch, batch, looks=3):
    contexts = build_teacher_contexts(batch, watch.reprompt)
    return [warning for _ in range(looks) for warning in watch.at_contexts(batch, contexts)]


@pytest.mark.parametrize(
    ("watch", "batch", "message"),
    [
        (watch(), rollouts([0.0, 0.0]), r"nothing is distilled: 0 of 2 rewards reach --reprompt.success_threshold 0.5"),
        (watch(reprompt=RepromptConfig(use_feedback=False)), rollouts([1.0, 0.0], "no"), r"--no-reprompt.use_feedback"),
        (watch(uses_policy_loss=True), rollouts([1.0, 1.0]), r"all rewards are 1.0, so OpenRLHF's policy loss, which"),
        (watch(), rollouts([1.0, 1.0]), r"all rewards are 1.0, so every response counts as a success"),
    ],
)
def test_a_degenerate_batch_is_named_after_so_many_looks(watch, batch, message):
    import re

    assert not said(watch, batch, looks=2)
    (warning,) = said(watch, batch, looks=1)
    assert re.search(message, warning) and "3 looks in a row" in warning


@pytest.mark.parametrize(
    "batch",
    [
        rollouts([0.0, 0.0], "no"), rollouts([1.0, 0.0]),
        [Rollout(group, "question", "answer", 1.0, "well done") for group in range(2)],  # nobody to learn from
        [Rollout(0, "question", "answer", 0.0, privileged_context="reference")],
    ],
)  # fmt: skip
def test_flat_rewards_are_not_mentioned_where_no_success_teaches(batch):
    template = "{prompt}{solution}{feedback}{privileged_context}"
    assert not said(watch(reprompt=RepromptConfig(template=template)), batch)


def test_flat_rewards_are_not_mentioned_where_the_data_set_teaches():
    batch = [Rollout(0, "question", "answer", 1.0, privileged_context="reference") for _ in range(2)]
    assert not said(watch(reprompt=RepromptConfig(template="{prompt}{privileged_context}")), batch)


def test_responses_left_out_are_named_where_nothing_is_distilled():
    batch = rollouts([1.0, 1.0])
    contexts = [TeacherContext(rollout.messages, False) for rollout in batch]
    (warning,) = watch(tolerance=1).at_contexts(batch, contexts, left_out=2)
    assert "2 of 2 rewards reach" in warning and "--distill.mask_truncated leaves out 2 responses" in warning


def test_a_healthy_batch_is_not_mentioned_and_starts_the_count_again():
    w = watch()
    assert not said(w, rollouts([0.0, 0.0]), looks=2) and not said(w, rollouts([1.0, 0.0]), looks=5)
    assert not said(w, rollouts([0.0, 0.0]), looks=2)


def test_looks_are_taken_at_the_interval():
    assert [watch(interval=3).due() for _ in range(1)] == [False]
    w = watch(interval=3)
    assert [w.due() for _ in range(6)] == [False, False, True, False, False, True]
    assert not watch(guard="off").due()


def test_a_sinking_gain_is_a_collapse_and_slows_the_average():
    w = watch()
    assert w.slowed(0.05) == 0.05
    for gain in (2.0, 2.1, 1.9, 2.0):
        assert not w.at_gain(gain, "ema")
    assert w.slowed(0.05) == pytest.approx(0.05)
    assert not w.at_gain(1.9, "ema") and 0.0 < w.slowed(0.05) < 0.02
    assert not w.at_gain(1.0, "ema") and w.slowed(0.05) < 1e-4
    assert not w.at_gain(1.0, "ema")  # the median of three is 1.0 now, and counted
    assert not w.at_gain(1.0, "ema")
    again = watch()
    again.restore(w.state())
    for each in (w, again):
        (warning,) = each.at_gain(1.0, "ema, 0.05")
        assert "50% of what it was" in warning and "--teacher.kind base (now ema, 0.05)" in warning
    w.at_gain(2.0, "ema")
    assert w.slowed(0.05) < 1e-4 * 1.2  # it comes back, but slowly


def test_a_context_that_never_changes_anything_is_named():
    """Rounding leaves a gain of about 1e-8 where the teacher reads what the student reads."""
    w = watch(guard="slow")
    assert [w.at_gain(gain, "ema") for gain in (0.0, 1e-8)] == [[], []]
    (warning,) = w.at_gain(-1e-8, "ema")
    assert "the teacher's context changes nothing" in warning and "--reprompt.max_len may leave no room" in warning
    assert "3 looks in a row" in warning and w.handed_over() == {"alarm/collapse": 0.0, "alarm/no_gain": 1.0}
    assert w.slowed(0.05) == 0.05  # there is nothing that it could have forgotten


def test_looks_without_a_gain_are_no_reference():
    """The first batches may have no failed sample with a context; later ones are compared with each other."""
    w = watch(tolerance=2)
    for gain in (0.0, 2.0, 2.0, 2.0):
        assert not w.at_gain(gain, "ema")
    assert w.first == [2.0, 2.0, 2.0] and w.share([1.0]) == 0.5
    assert not [*w.at_gain(0.0, "ema"), *w.at_gain(0.0, "ema")]  # the median of three is 0 now
    (warning,) = w.at_gain(0.0, "ema")
    assert "less and less" in warning and "0% of what it was" in warning
    old = watch()  # of a checkpoint that was written when they were a reference
    old.restore({"first": [0.0, 0.0, 0.0], "last": [0.0], "lengths": [0.0, 0.0, 0.0]})
    assert old.slowed(0.05) == 0.05 and not old.at_gain(2.0, "ema") and old.first == [2.0]
    assert old.drift(4.0) == 1.0 and old.drift(8.0) == 8 / 6


def test_alarms_are_metrics_where_it_looked():
    w = watch(tolerance=2)
    rung = []
    for gain in (2.0, 2.0, 2.0, 0.1, 0.1, 0.1, 0.1):
        said(w, rollouts([0.0, 1.0]), looks=1)
        warnings = w.at_gain(gain, "ema")
        alarms = w.handed_over()
        assert alarms["alarm/collapse"] == bool(warnings) and alarms["alarm/flat_rewards"] == 0.0
        rung.append(alarms["alarm/collapse"])
    assert rung == [0, 0, 0, 0, 0, 1, 0] and w.handed_over() == {}


def test_a_found_rate_is_kept_as_long_as_the_flag_is_the_same():
    w = watch(guard="slow")
    for gain in (2.0, 2.0, 2.0, 1.9):
        w.at_gain(gain, "ema")
    found = w.slowed(0.05)
    again = watch(guard="slow")
    again.restore(w.state())
    assert again.in_use(0.05) == found < 0.02
    assert again.in_use(0.04) == 0.04 and again.slowed(0.04) == pytest.approx(found * 0.04 / 0.05)


def test_the_drift_is_relative_to_the_first_looks():
    w = watch()
    assert [w.drift(length) for length in (8.0, 10.0, 12.0, 20.0, 5.0)] == [1.0, 10 / 9, 1.2, 2.0, 0.5]


def test_batches_without_a_response_token_are_no_reference():
    w = watch()
    assert [w.drift(length) for length in (0.0, 0.0, 8.0, 0.0, 4.0)] == [1.0, 1.0, 1.0, 0.0, 4 / 6]


def test_the_gain_is_the_divergence_between_the_teacher_with_and_without_context():
    torch.manual_seed(0)
    student, teacher, without = torch.randn(3, 6, 8, dtype=torch.float64)
    head, other = Head(torch.randn(11, 8, dtype=torch.float64)), Head(torch.randn(11, 8, dtype=torch.float64))
    ids, failed = torch.arange(6), torch.tensor([True, True, False, True, False, False])
    sums = measure(student, head, teacher, without, other, ids, failed, 1.0)
    t, w, s = ((x @ h.weight.T).log_softmax(-1) for x, h in ((teacher, other), (without, other), (student, head)))
    gain = (t.exp() * (t - w)).sum(-1)
    advantage = (t - s).gather(-1, ids[:, None])[:, 0]
    for name, values, rows in (
        (GAIN, gain, failed), ("teacher/advantage_on_failures", advantage, failed),
        ("teacher/advantage_on_successes", advantage, ~failed),
        ("self_distillation/student_entropy", -(s.exp() * s).sum(-1), failed | True),
    ):  # fmt: skip
        total, number = sums[name]
        torch.testing.assert_close(total / number, values[rows].mean(), check_dtype=False)
    same = measure(student, head, without, without, other, ids, failed, 1.0)[GAIN]
    assert same[0].abs() < 1e-12
