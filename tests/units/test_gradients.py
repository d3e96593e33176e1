"""Each micro-batch has its share of one mean over the optimizer step, and what is not finite ends the run."""

import math
import re
from types import SimpleNamespace

import pytest
import torch


def test_each_micro_batch_has_its_share_of_one_mean():
    """Four micro-batches of two samples, two to an optimizer step; in the second none has a context."""
    from sdpo_plugin.openrlhf_adapter.platform import cpu

    cpu.enable()
    from openrlhf.utils.loss_utils import iter_grad_accum_global_norm

    from sdpo_plugin.interface.micro_batch import MicroBatch
    from sdpo_plugin.openrlhf_adapter.worker.trainer import PolicyTrainer, windows_with_loss_mask

    trainer = PolicyTrainer.__new__(PolicyTrainer)
    batches = [([3, 1], [True, True]), ([2, 4], [False, False]), ([4, 2], [True, False]), ([1, 3], [False, True])]
    data = []
    for lengths, active in batches:
        response = torch.tensor([[i < length for i in range(4)] for length in lengths])
        mask = response & torch.tensor(active)[:, None]
        data.append(SimpleNamespace(
            sequences=torch.zeros(2, 6), action_mask=response.long(), info={"plugin/loss_mask": list(mask)}
        ))
    windows = windows_with_loss_mask(iter_grad_accum_global_norm)
    steps = []
    for experience, info in windows(iter(data), SimpleNamespace(), 2, lambda e: e.action_mask):
        means = trainer._mean(experience.loss_mask_info, True), trainer._mean(info, token_level=False)
        steps.append(MicroBatch(None, experience, {}, *means, None))
    # DeepSpeed halves the loss of each micro-batch. Four samples a step; four and seven tokens in the loss.
    for step, shares in zip(steps, ([1 / 12, 1 / 4], [0.0, 0.0], [1 / 16, 0.0], [0.0, 1 / 12]), strict=True):
        torch.testing.assert_close(step.sample_weights / 2, step.loss_mask * torch.tensor(shares)[:, None])
    for step, share in zip(steps, (1 / 4, 0.0, 1 / 7, 1 / 7), strict=True):
        torch.testing.assert_close(step.loss_weights / 2, step.loss_mask * share)


SETTINGS = [{}, {"dual_clip": 3.0}, {"token_level_loss": False}, {"policy_loss_type": "gspo"}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_openrlhf_s_policy_loss_is_proportional_to_a_sample_s_advantages(settings):
    """What makes a weight on the advantages a weight of the sample (`MicroBatch.policy_weights`)."""
    from sdpo_plugin.openrlhf_adapter.platform import cpu

    cpu.enable()
    from openrlhf.models import PolicyLoss

    torch.manual_seed(0)
    log_probs, old, advantages = torch.randn(3, 4, 6)
    mask, weights = torch.ones(4, 6), torch.tensor([0.5, 0.0, 2.0, 1.0])[:, None]

    def loss(advantages):
        return PolicyLoss(**settings)(log_probs, old, advantages, mask)[0]

    alone = [loss(advantages * one[:, None]) for one in torch.eye(4)]
    torch.testing.assert_close(loss(advantages * weights), (torch.stack(alone) * weights[:, 0]).sum())


@pytest.mark.parametrize(
    "loss, norm, dtype, said",
    [
        (0.5, 3.0, "bf16", None),
        (0.5, None, "bf16", None),  # between two optimizer steps
        (0.5, -1.0, "bf16", "on rank 1 the gradient's norm is nan, of a loss of 0.5; "),  # as ZeRO 1 and 2 say it
        (0.5, math.inf, "bf16", "the gradient's norm is inf, of a loss of 0.5; "),
        (0.5, "skipped", "bf16", "on rank 1 the gradient is not, and DeepSpeed skipped the step; the loss is 0.5; "),
        (0.5, "skipped", "fp16", None),
        (0.5, math.inf, "fp16", None),  # DeepSpeed lowers its loss scale
        (math.nan, math.nan, "fp16", "on rank 1 the loss is nan (not finite: policy_loss, kl); "),
    ],
)
def test_an_update_that_is_not_finite_is_an_error(tmp_path, loss, norm, dtype, said):
    from sdpo_plugin.openrlhf_adapter.failures import NotFinite
    from sdpo_plugin.openrlhf_adapter.worker.trainer import PolicyTrainer

    args = SimpleNamespace(ckpt=SimpleNamespace(path=str(tmp_path)), ds=SimpleNamespace(param_dtype=dtype))
    trainer = SimpleNamespace(args=args, worker=SimpleNamespace(rank=1))
    found = {"policy_loss": torch.tensor(loss), "kl": torch.tensor([loss]), "actor_lr": 1e-3}
    found |= {} if norm in (None, "skipped") else {"actor_grad_norm": norm}
    if said is None:
        PolicyTrainer._require_finite(trainer, found, skipped=norm == "skipped")
        return
    with pytest.raises(NotFinite, match=re.escape(said)):
        PolicyTrainer._require_finite(trainer, found, skipped=norm == "skipped")
    (tmp_path / "_actor").mkdir()
    (tmp_path / "_actor" / "latest").write_text("global_step4")
    with pytest.raises(NotFinite, match="the last checkpoint is .*/_actor/global_step4$"):
        PolicyTrainer._require_finite(trainer, found, skipped=norm == "skipped")
