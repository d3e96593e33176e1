"""Every variant on the real host: it runs, it is no other algorithm, and its gradient is its definition's."""

import pytest
import torch
from common import ROWS, ZERO, cases, same
from test_gradients import active, distance, twice  # noqa: F401

TOKENS = ("--distill.topk", "20", "--algo.advantage.is_correction_level", "off")
# That two steps show what 0.001 does.
SDPG = ("--algo.kl.init_coef", "0.1", "--sdpg.beta", "0.5", "--no-sdpg.positive_only")
HINTS = "{prompt}{solution}{feedback}"  # of two samples none has a right and a wrong sibling
# Half of the samples succeed, by chance, and all have feedback.
VARIANTS = {
    "srpo": (), "rlsd": ("--teacher.kind", "base"), "sdpg": SDPG, "fsd": (),
    "rlcsd": ("--rlcsd.wrong_hints", "1", "--rlcsd.temperature", "0.5", "--reprompt.template", HINTS),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_an_algorithm_of_its_own(replay, recorded, name):
    run = replay("--algo", name, *TOKENS, *VARIANTS[name], *ZERO[2])
    plain = replay("--algo.advantage.estimator", "group_norm", *ZERO[2], plain=True)
    assert not same(run, plain) and not same(run, recorded)
    losses = [value for _, value in run.metrics["train/policy_loss"]]
    assert len(losses) == 2 and all(abs(loss) < 10 for loss in losses)


@pytest.mark.check
def test_without_its_share_rlsd_is_the_policy_loss(replay):
    """The same rewards, the same loss: what the teacher adds is all there is to it."""
    flags = (*TOKENS, "--teacher.kind", "base", *ZERO[2])
    plain = replay("--algo.advantage.estimator", "group_norm", *ZERO[2], plain=True)
    none, some = (replay("--algo", "rlsd", "--rlsd.mix", mix, *flags) for mix in ("0", "1"))
    norms = [run.metrics["train/actor_grad_norm"][0][1] for run in (plain, none, some)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)  # chunks of logits in bf16, and all at once
    assert norms[2] != norms[1] and not same(some, none)


def test_a_rank_without_a_token_to_weigh_reports_like_the_others(openrlhf, model, reward, recorded, active):  # noqa: F811
    """One of sixteen samples has a context: on two ranks, in two micro-batches each. Shares are of response tokens."""
    samples = ("--testing.replay", str(active(1)))
    run = openrlhf(model, ROWS, reward, "--algo", "fsd", *TOKENS, *ZERO[2], *samples, replay=recorded)
    assert run.metrics["train/self_distillation/token_weight"][0][1] > 0.0
    assert 0.0 < run.metrics["train/self_distillation/empty_target_batch"][0][1] < 1.0


@pytest.mark.parametrize(("name", "stage"), cases({"srpo": ("srpo", 2), "rlcsd": ("rlcsd", 3)}, "rlcsd"))
def test_gradient_is_the_definition_s(openrlhf, model, reward, recorded, twice, tmp_path, name, stage):  # noqa: F811
    """Token weights from the teacher's entropy beside the policy loss, and two teacher contexts."""
    probe = ["--probe.out", str(tmp_path / "gradients.pt"), "--probe.fp32", "--plugins", "probe"]
    flags = ["--algo", name, *TOKENS, *VARIANTS[name], *ZERO[stage], "--actor.adam.lr", "0"]
    flags += ["--testing.replay", str(twice)]
    openrlhf(model, ROWS, reward, *flags, *probe, replay=recorded)
    fused, dense = torch.load(tmp_path / "gradients.pt")
    difference = distance(fused, dense)
    print(f"{name}, stage {stage}: relative difference {difference:.1e}")
    assert difference <= 1e-5


@pytest.mark.check
def test_a_variant_at_weight_0_is_openrlhf(replay):
    assert same(replay("--algo", "srpo", "--distill.weight", "0", *ZERO[2], "--algo.advantage.estimator", "group_norm"),
                replay("--algo.advantage.estimator", "group_norm", *ZERO[2], plain=True))
