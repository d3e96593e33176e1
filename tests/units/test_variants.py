"""What each variant does with a token, against its paper's formula written down again."""

import math
from types import SimpleNamespace

import pytest
import torch
from three_samples import ACTION, ATTENTION, MASKS, PROMPTS, SEQUENCES, gradient

from sdpo_plugin.algorithms.fsd import FSD, FsdConfig
from sdpo_plugin.algorithms.rlcsd import RLCSD, RlcsdConfig
from sdpo_plugin.algorithms.rlsd import RLSD, RlsdConfig
from sdpo_plugin.algorithms.sdpg import SDPG, SdpgConfig
from sdpo_plugin.algorithms.sdpo import SDPO
from sdpo_plugin.algorithms.sdzero import SDZERO, SdzeroConfig
from sdpo_plugin.algorithms.srpo import SRPO, SrpoConfig
from sdpo_plugin.config import ConfigError
from sdpo_plugin.distillation.context import Rollout
from sdpo_plugin.distillation.loss import entropy_of, token_divergence
from sdpo_plugin.testing import fake_worker

RESPONSE = [mask.bool() for mask in ACTION]  # 3, 3 and 2 tokens; the first two samples have a teacher context
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5])[:, None].expand(ACTION.shape) * ACTION
NONE = torch.tensor([], dtype=torch.long)


def made(algorithm, config=None, **distill):
    groups = {config.prefix: vars(config)} if config is not None else {}
    worker = fake_worker(teacher={"kind": "base"}, distill={"is_clip": None, **distill}, **groups)
    plugin = algorithm(worker.args)
    plugin.openrlhf_worker_setup(worker)
    torch.manual_seed(1)
    with torch.no_grad():  # student and teacher are apart
        for p in worker.actor.parameters():
            p += 0.3 * torch.randn_like(p)
    return worker, plugin


def run(worker, plugin, prompts=PROMPTS, masks=MASKS, rewards=(1.0, 0.0, 0.0), advantages=None, **data):
    advantages = ADVANTAGES if advantages is None else advantages
    data |= {"teacher_prompt": prompts, "loss_mask": masks, "reward": [torch.tensor(r) for r in rewards]}
    old = torch.zeros(ACTION.shape)
    return worker.micro_batch(plugin, SEQUENCES, ATTENTION, ACTION, advantages, old, **data)


def distributions(worker, plugin, prompts=None):
    """(sample, student, teacher [V], sampled token) of each response token that has a teacher."""
    found = []
    for i, prompt in enumerate(PROMPTS if prompts is None else prompts):
        length, first = int(ATTENTION[i].sum()), int(ACTION[i].nonzero()[0]) + 1
        for p in ACTION[i].nonzero()[:, 0].tolist() if len(prompt) else ():
            def at(actor, ids, position):
                return actor.lm_head(actor.states(ids[None]))[0, position].log_softmax(-1)

            replayed = torch.cat([prompt, SEQUENCES[i, first:length]])
            student = at(worker.actor, SEQUENCES[i], p)
            teacher = at(plugin.teacher.model, replayed, p - first + len(prompt)).detach()
            found.append((i, student, teacher, int(SEQUENCES[i, p + 1])))
    return found


# ── SRPO ──


@pytest.mark.usefixtures("device")
def test_srpo_routes_failures_with_a_teacher_to_distillation_and_all_others_to_the_policy_loss():
    """Of three samples the first is a success, the second failed with a teacher, the third failed without."""
    config = SrpoConfig(beta=2.0)
    worker, plugin = made(SRPO, config, mode="full", alpha=0.0, loss_agg_mode="token-mean")
    shown = [NONE, PROMPTS[1], NONE]
    got = run(worker, plugin, shown, masks=RESPONSE)
    assert got.policy_weights.tolist() == [1.0, 0.0, 1.0]
    routed = [(s, t) for i, s, t, _ in distributions(worker, plugin) if i == 1]
    weights = torch.stack([torch.exp(-2.0 * entropy_of(t)) for _, t in routed])
    losses = torch.stack([token_divergence(s, t, 0.0) for s, t in routed])
    distilled = (losses * weights / weights.mean()).sum() / 8  # of eight response tokens
    policy = -(ADVANTAGES * got.log_probs)[[0, 2]].sum() / 8
    torch.testing.assert_close(got.loss, distilled + policy, rtol=1e-4, atol=1e-6)
    whole = gradient(worker, got.loss)
    again = -(ADVANTAGES * run(worker, plugin, shown, masks=RESPONSE).log_probs)[[0, 2]].sum() / 8
    torch.testing.assert_close(whole, gradient(worker, distilled + again), rtol=1e-3, atol=1e-6)
    assert weights.max() / weights.min() > 1.01  # the entropies differ
    assert got.means["self_distillation/token_weight"][1] == 3


@pytest.mark.usefixtures("device")
def test_srpo_is_the_policy_loss_where_all_succeed():
    worker, plugin = made(SRPO, SrpoConfig())
    got = run(worker, plugin, [NONE] * 3, masks=RESPONSE)
    torch.testing.assert_close(got.loss, -(ADVANTAGES * got.log_probs).sum() / 8)


def test_srpo_shows_nothing_to_successes_and_counts_all_response_tokens():
    args = fake_worker(srpo={"beta": 1.0}).args
    rollouts = [Rollout(0, "Q?", text, reward) for text, reward in (("r1", 1.0), ("r2", 1.0), ("w", 0.0), ("x", None))]
    (shown,) = SRPO(args).teacher_contexts(None, rollouts)
    assert [c.active for c in shown] == [False, False, True, True]
    batch = SimpleNamespace(response_mask=lambda i: RESPONSE[i])
    assert SRPO(args).loss_mask(batch, 0, [False]).tolist() == RESPONSE[0].tolist()


# ── RLSD ──


def shared_out(got, worker, plugin, config, step):
    left = config.mix * (max(0.0, 1 - (step - 1) / config.decay_steps) if config.decay_steps else 1.0)
    expected = ADVANTAGES.clone()
    tokens = distributions(worker, plugin)
    for i in range(2):
        for p, (_, s, t, y) in zip(ACTION[i].nonzero()[:, 0].tolist(), [x for x in tokens if x[0] == i], strict=True):
            a = float(ADVANTAGES[i, p])
            w = math.exp(math.copysign(1, a) * float((t[y] - s[y]).detach()))
            expected[i, p] = a * (1 - left + left * min(max(w, 1 - config.clip), 1 + config.clip))
    return expected


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("step", "config"), [(1, RlsdConfig()), (26, RlsdConfig()), (99, RlsdConfig(decay_steps=0))])
def test_rlsd_shares_an_advantage_out_without_changing_its_sign(step, config):
    worker, plugin = made(RLSD, config)
    got = run_at(worker, plugin, step)
    expected = shared_out(got, worker, plugin, config, step)
    torch.testing.assert_close(got.advantages, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(got.advantages[:2], ADVANTAGES[:2]) and torch.equal(got.advantages[2], ADVANTAGES[2])
    assert torch.equal(got.advantages.sign(), ADVANTAGES.sign())
    torch.testing.assert_close(got.loss, -(expected * got.log_probs).sum() / 8, rtol=1e-4, atol=1e-6)
    assert "self_distillation/loss" not in {name for name, (_, count) in got.means.items() if count}


def run_at(worker, plugin, step, **options):
    """`run` in rollout batch `step`."""
    data = plugin.token_data
    plugin.token_data = lambda micro_batch: data(micro_batch) | {"step": torch.full((8,), float(step))}
    return run(worker, plugin, **options)


@pytest.mark.usefixtures("device")
def test_rlsd_is_the_policy_loss_when_its_share_is_gone():
    worker, plugin = made(RLSD, RlsdConfig(decay_steps=10))
    got = run_at(worker, plugin, 11)
    torch.testing.assert_close(got.advantages, ADVANTAGES)


# ── RLCSD ──


@pytest.mark.usefixtures("device")
def test_rlcsd_contrasts_a_right_with_wrong_hints():
    """The second wrong hint is there for the first sample only."""
    config = RlcsdConfig(wrong_hints=2, temperature=0.5, scale=0.5, threshold=0.1)
    worker, plugin = made(RLCSD, config)
    wrong = [torch.tensor([9, 9, 2]), torch.tensor([9, 5]), NONE], [torch.tensor([4, 2]), NONE, NONE]
    got = run(worker, plugin, **{"teacher_prompt/1": wrong[0], "teacher_prompt/2": wrong[1]})
    right, w1, w2 = (distributions(worker, plugin, prompts) for prompts in (PROMPTS, *wrong))
    expected, selected = ADVANTAGES[ACTION.bool()].clone(), torch.zeros(8, dtype=torch.bool)
    for n, (i, _, t, y) in enumerate(right):
        shown = [float(w1[n][2][y])] + ([float(w2[n][2][y])] if i == 0 else [])
        moved = 0.5 * math.tanh((float(t[y]) - math.log(sum(map(math.exp, shown)) / len(shown))) / 0.5)
        if abs(moved) > 0.1:
            a = float(expected[n])
            expected[n], selected[n] = (max(a + moved, 0.0) if a > 0 else min(a + moved, 0.0)), True
    assert 0 < selected[:6].sum() < 6
    count = torch.where(selected, selected.sum(), (~selected).sum())
    torch.testing.assert_close(got.advantages[ACTION.bool()], expected * 8 / count, rtol=1e-4, atol=1e-5)


def test_rlcsd_shows_failed_siblings_but_never_the_response_itself():
    args = fake_worker(rlcsd=vars(RlcsdConfig(wrong_hints=2)), reprompt=RLCSD_TEMPLATES).args
    group = [Rollout(0, "Q?", text, reward) for text, reward in (("r1", 1.0), ("r2", 1.0), ("w1", 0.0), ("w2", 0.0))]
    right, *wrong = RLCSD(args).teacher_contexts(None, [*group, Rollout(1, "R?", "w3", 0.0)])
    shown = [[c.sections.get("solution") for c in contexts] for contexts in (right, *wrong)]
    assert shown == [["r2", "r1", "r1", "r1", None], ["w1", "w1", "w2", "w1", None], ["w2", "w2", None, None, None]]
    batch = SimpleNamespace(response_mask=lambda i: RESPONSE[0], samples=[SimpleNamespace(truncated=False)])
    assert RLCSD(args).loss_mask(batch, 0, [True, True, False]).any()
    assert not RLCSD(args).loss_mask(batch, 0, [True, False, False]).any()


RLCSD_TEMPLATES = {k.removeprefix("reprompt."): v for k, v in RLCSD.defaults.items() if k.startswith("reprompt.")}


# ── SDPG ──


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("positive_only", [False, True])
def test_sdpg_adds_the_reverse_kl_to_the_policy_loss(positive_only):
    config = SdpgConfig(beta=0.5, positive_only=positive_only)
    worker, plugin = made(SDPG, config, mode="full", alpha=1.0)
    got = run(worker, plugin)
    losses = [(i, token_divergence(s, t, 1.0)) for i, s, t, _ in distributions(worker, plugin)]
    counted = [loss for i, loss in losses if not positive_only or ADVANTAGES[i].sum() > 0]
    distilled = sum(counted) / 9  # three samples, of three tokens in the loss each
    policy = -(ADVANTAGES * got.log_probs).sum() / 8
    torch.testing.assert_close(got.loss, policy + 0.5 * distilled, rtol=1e-4, atol=1e-6)


# ── Focal Self-Distillation ──


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("focus", [0.0, 1.0, 2.0])
def test_fsd_weighs_tokens_by_their_total_variation(focus):
    worker, plugin = made(FSD, FsdConfig(focus=focus), mode="full", alpha=0.0)
    got = run(worker, plugin)
    tokens = distributions(worker, plugin)
    weights = torch.stack([(s.exp() - t.exp()).abs().sum() / 2 for _, s, t, _ in tokens]) ** focus
    losses = torch.stack([token_divergence(s, t, 0.0) for _, s, t, _ in tokens])
    weights = (weights / weights.mean()).detach()
    expected = (losses * weights).sum() / 9  # three samples, of three tokens in the loss each
    torch.testing.assert_close(got.loss, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient(worker, got.loss), gradient(worker, expected), rtol=1e-3, atol=1e-6)
    assert focus == 0.0 or weights.max() / weights.min() > 1.1


# ── their options ──


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        (SrpoConfig, {"beta": -1.0}, "--srpo.beta -1.0: give a number >= 0"),
        (RlsdConfig, {"clip": 2.0}, r"--rlsd.clip 2.0: give a number in \[0, 1\]"),
        (RlsdConfig, {"decay_steps": -1}, "--rlsd.decay_steps -1: give an integer >= 0"),
        (RlcsdConfig, {"wrong_hints": 0}, "--rlcsd.wrong_hints 0: give a positive integer"),
        (SdpgConfig, {"beta": 0.0}, "--sdpg.beta 0.0: give a positive number"),
        (FsdConfig, {"focus": -1.0}, "--fsd.focus -1.0: give a number >= 0"),
    ],
)
def test_out_of_range(group, values, message):
    with pytest.raises(ConfigError, match=message):
        group(**values)


@pytest.mark.parametrize("algorithm", [SRPO, RLSD, RLCSD, SDPG])
def test_a_weight_that_would_be_ignored_is_rejected(algorithm):
    groups = {group.prefix: vars(group()) for group in algorithm.options}
    args = fake_worker(distill={"weight": 0.5}, **groups).args
    plugin = algorithm(args)
    with pytest.raises(ConfigError, match=f"--distill.weight 0.5: --algo {algorithm.name} combines .*; give 1, or 0"):
        plugin.openrlhf_configure(full(args))


def test_a_template_that_would_be_ignored_is_rejected():
    args = full(fake_worker(sdzero=vars(SdzeroConfig()), reprompt={"template": "{prompt} {attempt}"}).args)
    with pytest.raises(ConfigError, match="--reprompt.template .*--algo sdzero does not use it"):
        SDZERO(args).openrlhf_configure(args)


def full(args):
    """`args` with what `compatibility.reject_unsupported` reads."""
    args.train.enable_ema, args.ds = False, SimpleNamespace(
        lora=SimpleNamespace(rank=0), ring_attn_size=1, tensor_parallel_size=1, deepcompile=False, enable_sleep=False
    )
    args.data.max_images_per_prompt = 0
    args.algo.advantage.is_correction_mode = "mask"
    return args


@pytest.mark.usefixtures("device")
def test_a_hybrid_weighs_each_sample_as_one_weight_would():
    """`loss_coefficients` with one weight for all samples is `--distill.weight`."""
    worker, plugin = made(SDPO, weight=0.25)
    got = run(worker, plugin)
    assert got.policy_weights.tolist() == [0.75] * 3
    torch.testing.assert_close(got.loss, -0.75 * (ADVANTAGES * got.log_probs).sum() / 8 + got.head_output.loss)
