"""The algorithm on a fake worker: what the teacher reads, which tokens count, and who follows whom."""

from types import SimpleNamespace

import pytest
import torch

from sdpo_plugin.config import ConfigError, DistillConfig
from sdpo_plugin.loss import per_token_loss
from sdpo_plugin.plugin import teacher_inputs
from sdpo_plugin.sdpo import SDPO
from sdpo_plugin.testing import fake_worker

# Prompts of 2, 3 and 1 tokens; the second sample is an agent's: two actions, an observation (9, 9), one action.
SEQUENCES = torch.tensor([[1, 2, 11, 12, 13, 0, 0, 0], [3, 4, 5, 21, 22, 9, 9, 23], [6, 0, 1, 0, 0, 0, 0, 0]])
ATTENTION = torch.tensor([[1] * 5 + [0] * 3, [1] * 8, [1] * 3 + [0] * 5])
ACTION = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0]])
PROMPTS = [torch.tensor([7, 7, 7, 7, 2]), torch.tensor([8, 5]), torch.tensor([], dtype=torch.long)]
MASKS = [ACTION[i].bool() & (len(PROMPTS[i]) > 0) for i in range(3)]


def algorithm(worker) -> SDPO:
    plugin = SDPO()
    plugin.openrlhf_worker_setup(worker)
    return plugin


def step(worker, plugin, prompts=PROMPTS, masks=MASKS):
    return worker.step(plugin, SEQUENCES, ATTENTION, ACTION, teacher_prompt=prompts, loss_mask=masks)


def test_everything_behind_the_prompt_is_replayed():
    sequences, attention, rows, taught = teacher_inputs(SEQUENCES, ATTENTION, ACTION, PROMPTS)
    assert sequences.tolist() == [[7, 7, 7, 7, 2, 11, 12, 13], [8, 5, 21, 22, 9, 9, 23, 0]]
    assert attention.tolist() == [[1] * 8, [1] * 7 + [0]]
    assert torch.roll(sequences, -1, 1)[rows].tolist() == [11, 12, 13, 21, 22, 23]  # the same tokens are predicted
    assert taught.tolist() == [*ACTION[:2].bool().tolist(), [False] * 7]


def test_without_any_context_two_tokens_stand_in():
    none = [torch.tensor([], dtype=torch.long)] * 3
    sequences, _, rows, taught = teacher_inputs(SEQUENCES, ATTENTION, ACTION, none)
    assert sequences.tolist() == [[1, 2]] and not rows.any() and not taught.any()


@pytest.mark.parametrize("mode", ["full", "topk", "sampled"])
def test_the_loss_is_the_definition_on_the_tokens_with_a_context(mode):
    options = {"mode": mode, "alpha": 1.0, "topk": 5}
    worker = fake_worker(distill=options)
    plugin = algorithm(worker)
    got = step(worker, plugin)
    expected = []
    for i in range(2):
        length = int(ATTENTION[i].sum())
        first = int(ACTION[i].nonzero()[0]) + 1
        replayed = torch.cat([PROMPTS[i], SEQUENCES[i, first:length]])[None]
        for p in ACTION[i].nonzero()[:, 0].tolist():
            student = worker.actor.lm_head(worker.actor.states(SEQUENCES[i : i + 1]))[:, p]
            teacher = worker.actor.lm_head(worker.actor.states(replayed))[:, p - first + len(PROMPTS[i])]
            config = DistillConfig(**options)
            expected.append(per_token_loss(student, teacher, SEQUENCES[i, p + 1 : p + 2], config))
    torch.testing.assert_close(got.loss, torch.cat(expected).mean())
    assert got.metrics["self_distillation/token_fraction"] == pytest.approx(6 / 8)
    per_token = got.metrics["self_distillation/loss"] / got.metrics["self_distillation/token_fraction"]
    torch.testing.assert_close(per_token, got.loss.detach())


def test_samples_without_a_context_are_read_only_where_something_else_wants_them():
    worker = fake_worker()
    got = step(worker, algorithm(worker))
    assert got.samples.tolist() == [True, True, False] and len(got.scores.log_probs) == 6
    for options in ({"distill": {"weight": 0.5}}, {"actor": {"entropy_coef": 0.0}}, {"actor": {"aux_loss_coef": 0.1}}):
        worker = fake_worker(**options)
        got = step(worker, algorithm(worker))
        assert got.samples is None and len(got.scores.log_probs) == 8


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, False), ({"distill": {"weight": 0.5}}, None), ({"train": {"max_epochs": 2}}, None),
        ({"train": {"batch_size": 2}}, None), ({"train": {"batch_size": 2, "async_enable": True}}, False),
        ({"algo": {"kl": SimpleNamespace(use_loss=False, init_coef=0.1)}}, None), ({"distill": {"weight": 0.0}}, None),
    ],
)  # fmt: skip
def test_old_log_probabilities_are_made_only_where_something_reads_them(options, wanted):
    assert SDPO().openrlhf_needs_old_log_probs(fake_worker(**options).args) is wanted


def gradient(worker, loss) -> torch.Tensor:
    worker.actor.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in worker.actor.parameters()])


def test_hybrid_mixes_gradients_and_zero_is_the_host():
    parts = {}
    for weight in (0.0, 0.25, 1.0):
        worker = fake_worker(distill={"weight": weight})
        parts[weight] = gradient(worker, step(worker, algorithm(worker)).loss)
    torch.testing.assert_close(parts[0.25], 0.75 * parts[0.0] + 0.25 * parts[1.0], atol=1e-6, rtol=1e-5)


def test_a_batch_without_context_has_a_zero_loss_that_backpropagates():
    worker = fake_worker()
    empty = [torch.tensor([], dtype=torch.long)] * 3
    got = step(worker, algorithm(worker), empty, [torch.zeros(7, dtype=torch.bool)] * 3)
    assert got.loss.item() == 0.0 and not gradient(worker, got.loss).any()
    assert got.metrics["self_distillation/empty_target_batch"] == 1.0


def test_skipped_tokens_leave_the_loss():
    plugin = SDPO()
    plugin._read(fake_worker(distill={"skip_tokens": 2}).args)
    sample = SimpleNamespace(action_mask=ACTION[1:2])
    assert plugin.loss_mask(sample, active=True).tolist() == [False] * 6 + [True]
    assert not plugin.loss_mask(sample, active=False).any()


@pytest.mark.parametrize(("kind", "follows"), [("live", 1.0), ("base", 0.0), ("ema", 0.25)])
def test_teachers_follow_the_student(kind, follows):
    worker = fake_worker(teacher={"kind": kind, "update_rate": 0.25})
    plugin = algorithm(worker)
    start = worker.actor.mix.weight.detach().clone()
    with torch.no_grad():
        worker.actor.mix.weight += 1.0
    plugin.openrlhf_optimizer_step(worker)
    torch.testing.assert_close(plugin.teacher.model.mix.weight, start + follows)


def test_a_checkpoint_without_a_teacher_is_named(tmp_path):
    worker = fake_worker()
    with pytest.raises(FileNotFoundError, match="written without --teacher.kind ema"):
        algorithm(worker).openrlhf_load_checkpoint(worker, str(tmp_path))


def test_prompts_without_a_user_turn_are_refused_before_training():
    rows = [{"prompt": [{"role": "user", "content": "a"}]}, {"prompt": [{"role": "assistant", "content": "b"}]}]
    with pytest.raises(ConfigError, match="--data.input_key prompt: row 1 has no user turn at its end"):
        SDPO().openrlhf_dataset(rows, fake_worker().args)
