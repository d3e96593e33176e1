"""The collapse monitor: what it measures, when it warns, and what it does then."""

import pytest
import torch

from sdpo_plugin.config import DiagnosticsConfig, RepromptConfig
from sdpo_plugin.distillation.context import Rollout, TeacherContext, build_teacher_contexts
from sdpo_plugin.distillation.head import Head
from sdpo_plugin.monitoring.collapse import CONTEXT_KL, CollapseMonitor, measure


def monitor(patience=3, reprompt=None, uses_policy_loss=False, **options) -> CollapseMonitor:
    config = DiagnosticsConfig(patience=patience, **options)
    return CollapseMonitor(config, reprompt or RepromptConfig(), uses_policy_loss)


def rollouts(rewards, feedback=None):
    return [Rollout(0, "question", f"answer {i}", reward, feedback) for i, reward in enumerate(rewards)]


def said(monitor, batch, checks=3):
    contexts = build_teacher_contexts(batch, monitor.reprompt)
    return [warning for _ in range(checks) for warning in monitor.check_batch(batch, contexts)]


@pytest.mark.parametrize(
    ("monitor", "batch", "message"),
    [
        (monitor(), rollouts([0.0, 0.0]), r"nothing is distilled: 0 of 2 rewards reach --reprompt.success_thresh"),
        (monitor(reprompt=RepromptConfig(use_feedback=False)), rollouts([1.0, 0.0], "no"), r"--no-reprompt.use_feedb"),
        (monitor(uses_policy_loss=True), rollouts([1.0, 1.0]), r"all rewards are 1.0, so OpenRLHF's policy loss"),
        (monitor(), rollouts([1.0, 1.0]), r"all rewards are 1.0, so every response counts as a success"),
    ],
)
def test_a_degenerate_batch_is_named_after_so_many_checks(monitor, batch, message):
    import re

    assert not said(monitor, batch, checks=2)
    (warning,) = said(monitor, batch, checks=1)
    assert re.search(message, warning) and "3 checks in a row" in warning


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
    assert not said(monitor(reprompt=RepromptConfig(template=template)), batch)


def test_flat_rewards_are_not_mentioned_where_the_data_set_teaches():
    batch = [Rollout(0, "question", "answer", 1.0, privileged_context="reference") for _ in range(2)]
    assert not said(monitor(reprompt=RepromptConfig(template="{prompt}{privileged_context}")), batch)


def test_responses_left_out_are_named_where_nothing_is_distilled():
    batch = rollouts([1.0, 1.0])
    contexts = [TeacherContext(rollout.messages, False) for rollout in batch]
    (warning,) = monitor(patience=1).check_batch(batch, contexts, left_out=2)
    assert "2 of 2 rewards reach" in warning and "--distill.mask_truncated leaves out 2 responses" in warning


def test_a_healthy_batch_is_not_mentioned_and_starts_the_count_again():
    w = monitor()
    assert not said(w, rollouts([0.0, 0.0]), checks=2) and not said(w, rollouts([1.0, 0.0]), checks=5)
    assert not said(w, rollouts([0.0, 0.0]), checks=2)


def test_checks_are_taken_at_the_interval():
    assert [monitor(interval=3).due() for _ in range(1)] == [False]
    w = monitor(interval=3)
    assert [w.due() for _ in range(6)] == [False, False, True, False, False, True]
    assert not monitor(on_collapse="off").due()


def test_a_falling_context_kl_is_a_collapse_and_slows_the_ema():
    w = monitor()
    assert w.slowed(0.05) == 0.05
    for kl in (2.0, 2.1, 1.9, 2.0):
        assert not w.check_context_kl(kl, "ema")
    assert w.slowed(0.05) == pytest.approx(0.05)
    assert not w.check_context_kl(1.9, "ema") and 0.0 < w.slowed(0.05) < 0.02
    assert not w.check_context_kl(1.0, "ema") and w.slowed(0.05) < 1e-4
    assert not w.check_context_kl(1.0, "ema")  # the median of three is 1.0 now, and counted
    assert not w.check_context_kl(1.0, "ema")
    again = monitor()
    again.restore(w.state())
    for each in (w, again):
        (warning,) = each.check_context_kl(1.0, "ema, 0.05")
        assert "50% of what it was" in warning and "--teacher.kind base (now ema, 0.05)" in warning
    w.check_context_kl(2.0, "ema")
    assert w.slowed(0.05) < 1e-4 * 1.2  # it comes back, but slowly


def test_a_context_that_never_changes_anything_is_named():
    """Rounding leaves a kl of about 1e-8 where the teacher reads what the student reads."""
    w = monitor(on_collapse="slow")
    assert [w.check_context_kl(kl, "ema") for kl in (0.0, 1e-8)] == [[], []]
    (warning,) = w.check_context_kl(-1e-8, "ema")
    assert "the teacher's context changes nothing" in warning and "--reprompt.max_len may leave no room" in warning
    assert "3 checks in a row" in warning and w.pop_metrics() == {"warning/collapse": 0.0, "warning/no_context_kl": 1.0}
    assert w.slowed(0.05) == 0.05  # there is nothing that it could have forgotten


def test_checks_without_a_context_kl_are_no_reference():
    """The first batches may have no failed sample with a context; later ones are compared with each other."""
    w = monitor(patience=2)
    for kl in (0.0, 2.0, 2.0, 2.0):
        assert not w.check_context_kl(kl, "ema")
    assert w.first == [2.0, 2.0, 2.0] and w.fraction([1.0]) == 0.5
    assert not [*w.check_context_kl(0.0, "ema"), *w.check_context_kl(0.0, "ema")]  # the median of three is 0 now
    (warning,) = w.check_context_kl(0.0, "ema")
    assert "less and less" in warning and "0% of what it was" in warning
    old = monitor()  # of a checkpoint that was written when they were a reference
    old.restore({"first": [0.0, 0.0, 0.0], "last": [0.0], "lengths": [0.0, 0.0, 0.0]})
    assert old.slowed(0.05) == 0.05 and not old.check_context_kl(2.0, "ema") and old.first == [2.0]
    assert old.drift(4.0) == 1.0 and old.drift(8.0) == 8 / 6


def test_warnings_are_metrics_of_the_steps_that_were_checked():
    w = monitor(patience=2)
    rung = []
    for kl in (2.0, 2.0, 2.0, 0.1, 0.1, 0.1, 0.1):
        said(w, rollouts([0.0, 1.0]), checks=1)
        warnings = w.check_context_kl(kl, "ema")
        metrics = w.pop_metrics()
        assert metrics["warning/collapse"] == bool(warnings) and metrics["warning/flat_rewards"] == 0.0
        rung.append(metrics["warning/collapse"])
    assert rung == [0, 0, 0, 0, 0, 1, 0] and w.pop_metrics() == {}


def test_a_found_rate_is_kept_as_long_as_the_flag_is_the_same():
    w = monitor(on_collapse="slow")
    for kl in (2.0, 2.0, 2.0, 1.9):
        w.check_context_kl(kl, "ema")
    found = w.slowed(0.05)
    again = monitor(on_collapse="slow")
    again.restore(w.state())
    assert again.in_use(0.05) == found < 0.02
    assert again.in_use(0.04) == 0.04 and again.slowed(0.04) == pytest.approx(found * 0.04 / 0.05)


def test_the_drift_is_relative_to_the_first_checks():
    w = monitor()
    assert [w.drift(length) for length in (8.0, 10.0, 12.0, 20.0, 5.0)] == [1.0, 10 / 9, 1.2, 2.0, 0.5]


def test_batches_without_a_response_token_are_no_reference():
    w = monitor()
    assert [w.drift(length) for length in (0.0, 0.0, 8.0, 0.0, 4.0)] == [1.0, 1.0, 1.0, 0.0, 4 / 6]


@pytest.mark.usefixtures("device")
def test_the_gain_is_the_divergence_between_the_teacher_with_and_without_context():
    torch.manual_seed(0)
    student, teacher, without = torch.randn(3, 6, 8, dtype=torch.float64)
    head, other = Head(torch.randn(11, 8, dtype=torch.float64)), Head(torch.randn(11, 8, dtype=torch.float64))
    ids, failed = torch.arange(6), torch.tensor([True, True, False, True, False, False])
    sums = measure(student, head, teacher, without, other, ids, failed, 1.0)
    t, w, s = ((x @ h.weight.T).log_softmax(-1) for x, h in ((teacher, other), (without, other), (student, head)))
    kl = (t.exp() * (t - w)).sum(-1)
    advantage = (t - s).gather(-1, ids[:, None])[:, 0]
    for name, values, rows in (
        (CONTEXT_KL, kl, failed), ("teacher/log_ratio_on_failures", advantage, failed),
        ("teacher/log_ratio_on_successes", advantage, ~failed),
        ("self_distillation/student_entropy", -(s.exp() * s).sum(-1), failed | True),
    ):  # fmt: skip
        total, number = sums[name]
        torch.testing.assert_close(total / number, values[rows].mean(), check_dtype=False)
    same = measure(student, head, without, without, other, ids, failed, 1.0)[CONTEXT_KL]
    assert same[0].abs() < 1e-12
