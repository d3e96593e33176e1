"""Guided Self-Distillation: the context's part of what the teacher says, and nothing else."""

import pytest
import torch
from three_samples import ACTION, ATTENTION, MASKS, PROMPTS, SEQUENCES, gradient

from sdpo_plugin.config import ConfigError
from sdpo_plugin.context import Rollout
from sdpo_plugin.gsd import GSD, GuidanceConfig
from sdpo_plugin.loss import token_divergence
from sdpo_plugin.sdpo import SDPO
from sdpo_plugin.testing import fake_worker

FORWARD = {"mode": "full", "alpha": 0.0}
OWN = [SEQUENCES[0, :2], SEQUENCES[1, :3], torch.tensor([], dtype=torch.long)]  # what the students read


def result(algorithm, shown=PROMPTS, kind="live", scale=1.0, moved=0.0, plain=OWN):
    """Loss and gradient of one micro-batch; `moved`: how far the student is from the initial weights."""
    worker = fake_worker(distill=FORWARD, teacher={"kind": kind}, gsd={"scale": scale})
    plugin = algorithm(worker.args)
    plugin.openrlhf_worker_setup(worker)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in worker.actor.parameters():
            p += moved * torch.randn_like(p)
    data = {"teacher_prompt": shown, "loss_mask": MASKS}
    data |= {"teacher_prompt/1": plain} if algorithm is GSD else {}
    micro_batch = worker.micro_batch(plugin, SEQUENCES, ATTENTION, ACTION, **data)
    return micro_batch, gradient(worker, micro_batch.loss)


def test_with_the_student_s_own_weights_and_scale_1_it_is_sdpo():
    (ours, g), (sdpo, h) = result(GSD), result(SDPO)
    torch.testing.assert_close(ours.loss, sdpo.loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-6)
    assert h.abs().max() > 1e-3


def test_a_context_that_says_nothing_teaches_nothing_however_old_the_teacher():
    """The teacher behind the student's own prompt: SDPO pulls towards the old weights, this stays."""
    (ours, g), (sdpo, h) = (result(a, shown=OWN, kind="base", moved=0.3) for a in (GSD, SDPO))
    assert ours.loss.abs() < 1e-6 and g.abs().max() < 1e-6
    assert sdpo.loss > 1e-2 and h.abs().max() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_target_is_the_student_tilted_by_the_context(scale):
    tokens_loss = result(GSD, kind="base", scale=scale, moved=0.3)[0].scores.token_loss[:6]
    worker = fake_worker()
    initial = {name: p.clone() for name, p in worker.actor.state_dict().items()}
    torch.manual_seed(1)
    student = fake_worker().actor
    torch.manual_seed(1)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.3 * torch.randn_like(p)
    worker.actor.load_state_dict(initial)
    expected = []
    for i in range(2):
        length, first = int(ATTENTION[i].sum()), int(ACTION[i].nonzero()[0]) + 1
        for p in ACTION[i].nonzero()[:, 0].tolist():
            def at(actor, prompt, i=i, p=p, first=first, length=length):
                read = torch.cat([prompt, SEQUENCES[i, first:length]])[None]
                return actor.lm_head(actor.states(read))[0, p - first + len(prompt)].log_softmax(-1)

            s, t, plain = at(student, OWN[i]), at(worker.actor, PROMPTS[i]), at(worker.actor, OWN[i])
            expected.append(token_divergence(s, (s + scale * (t - plain)).log_softmax(-1), alpha=0.0))
    torch.testing.assert_close(tokens_loss, torch.stack(expected).detach(), rtol=1e-4, atol=1e-6)


def test_the_second_context_is_the_student_s_own_prompt_where_there_is_a_first():
    rollouts = [Rollout(0, "Q?", "4", 1.0), Rollout(0, "Q?", "5", 0.0), Rollout(1, "R?", "6", 0.0)]
    shown, plain = GSD(fake_worker(gsd={"scale": 1.0}).args).contexts(None, rollouts)
    assert [c.active for c in shown] == [c.active for c in plain] == [False, True, False]
    assert plain[1].messages == "Q?" and not plain[1].sections and "4" in shown[1].messages


def test_the_scale_is_positive():
    with pytest.raises(ConfigError, match="--gsd.scale 0.0: give a positive number"):
        GuidanceConfig(scale=0.0)
