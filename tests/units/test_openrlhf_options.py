"""The host's own options beside self-distillation, on the real host: each acts."""


import pytest
import torch


def test_the_correction_is_the_host_s():
    """Of two tokens and a masked one, by hand: log(old / engine) is log 4 and log(1/2)."""
    from sdpo_plugin.openrlhf_adapter.platform import cpu

    cpu.enable()
    from openrlhf.models.loss import PolicyLoss

    from sdpo_plugin.openrlhf_adapter.worker.worker import PolicyTrainer

    engine, mask = torch.tensor([[0.1, 0.2, 1.0]]).log(), torch.tensor([[1, 1, 0]])
    old = torch.tensor([[0.4, 0.1, 1.0]]).log()

    def correction(level, mode, gating, *threshold, **options):
        trainer = PolicyTrainer.__new__(PolicyTrainer)
        trainer.policy_loss_fn = PolicyLoss(
            is_correction_level=level, is_correction_mode=mode, is_correction_gating=gating,
            is_correction_threshold=threshold, **options,
        )  # fmt: skip
        return trainer._rollout_correction(old, engine, mask)[0].tolist()

    approx = pytest.approx
    assert correction("token", "clip", "ratio", 0.0, 2.0) == approx([2.0, 0.5, 0.0])  # as published
    assert correction("token", "clip", "ratio", 1.0, 2.0, token_level_loss=False) == approx([2.0, 1.0, 0.0])
    assert correction("token", "mask", "ratio", 0.5, 3.0) == approx([0.0, 0.5, 0.0])
    assert correction("token", "mask", "tv", 0.0, 0.2, policy_loss_type="gspo") == approx([0.0, 0.5, 0.0])
    # The geometric mean of the sequence's ratios is sqrt(2); those that stay keep their tokens' own.
    assert correction("seq", "mask", "ratio", 0.5, 1.5) == approx([4.0, 0.5, 0.0])
    assert correction("seq", "mask", "ratio", 0.5, 1.4) == approx([0.0, 0.0, 0.0])
    assert correction("off", "mask", "ratio", 0.5, 5.0) == approx([1.0, 1.0, 0.0])
