"""What a GPU would show, on the emulated accelerator: waits for the device, sizes, and what stays after a step."""

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from emulated import Emulated, Emulator
from largest import LargestTensor
from three_samples import ACTION, ATTENTION, MASKS, PROMPTS, SEQUENCES

from sdpo_plugin.algorithms.sdpo import SDPO
from sdpo_plugin.config import DistillConfig
from sdpo_plugin.distillation.fused import linear_distillation
from sdpo_plugin.distillation.head import Head, TeacherStates
from sdpo_plugin.distillation.loss import objective_of
from sdpo_plugin.interface.ring import OneRank
from sdpo_plugin.interface.scoring import ScoringRequest
from sdpo_plugin.testing import fake_worker

# Without the model's own forward pass. Each lets the GPU's queue run empty; four are the fake worker's.
WAITS = {"live": 25, "base": 25, "ema": 25, "trust_region": 27}


@pytest.fixture
def emulator():
    with Emulator() as emulator:
        yield emulator


def made(device="emu", **options):
    worker = fake_worker(device=device, **options)
    plugin = SDPO(worker.args)
    plugin.openrlhf_worker_setup(worker)
    return worker, plugin


def step(worker, plugin, times=1):
    """A micro-batch of the three samples, `times` over, with its backward pass."""
    tensors = (x.repeat(times, 1).to("emu") for x in (SEQUENCES, ATTENTION, ACTION))
    data = {"teacher_prompt": PROMPTS, "loss_mask": MASKS}
    batch = worker.micro_batch(plugin, *tensors, **{k: [x.to("emu") for x in v * times] for k, v in data.items()})
    batch.loss.backward()
    return batch


def test_an_emulated_tensor_cannot_be_mixed_with_one_of_the_cpu(emulator):
    there, here = torch.ones(3, device="emu"), torch.ones(3)
    with pytest.raises(RuntimeError, match="to be on the same device"):
        there + here
    assert (there + here.sum() + there[torch.tensor([0, 0, 1])]).tolist() == [5.0] * 3  # a scalar and indices may
    with pytest.raises(TypeError):
        there.numpy()
    kept, there.data = there.data, here
    assert there.device.type == "cpu" and (there + here).device.type == "cpu"
    there.data = kept
    assert there.device.type == "emu"


def test_waits_are_counted(emulator):
    x = torch.arange(4, device="emu")
    for wait in (x.tolist, x.sum().item, x.cpu, x.nonzero, lambda: x[x > 1], lambda: bool(x[0] > 0)):
        before = len(emulator.waits)
        wait()
        assert len(emulator.waits) > before
    emulator.reset()
    x[torch.tensor([1, 2])] = x.masked_fill(x > 1, 0)[:2] + 1
    assert not emulator.waits and emulator.operations and emulator.largest == x.nbytes


@pytest.mark.parametrize("kind", WAITS)
def test_a_micro_batch_waits_for_the_device_a_few_times_however_many_samples_it_has(emulator, kind):
    worker, plugin = made(teacher={"kind": kind})
    found = []
    for times in (1, 4):
        emulator.reset()
        step(worker, plugin, times)
        found.append(len(emulator.waits))
    assert found == [WAITS[kind]] * 2


def test_nothing_on_the_device_outlives_a_step_but_gradients(emulator):
    worker, plugin = made()
    step(worker, plugin)
    gc.collect()
    before = {id(x.raw) for x in gc.get_objects() if isinstance(x, Emulated)}
    for _ in range(3):
        step(worker, plugin)
    gc.collect()
    new = [x for x in gc.get_objects() if isinstance(x, Emulated) and id(x.raw) not in before]
    assert not [x.shape for x in new if not any(x is p.grad for p in worker.actor.parameters())]


def test_a_teacher_s_hidden_states_are_held_for_response_tokens_only():
    """One long sample among short ones: [B, A, H] with its padding would be B times as large."""
    samples, length, width = 33, 512, 64
    worker, plugin = made("cpu")
    sequences = torch.ones(samples, length, dtype=torch.long)
    action = torch.zeros(samples, length - 1)
    action[:, :8], action[0] = 1, 1
    attention = torch.cat([torch.ones(samples, 1), action], dim=1).long()
    prompts, masks = [torch.tensor([2, 3])] * samples, list(action.bool())
    batch = worker.micro_batch(plugin, sequences, attention, action, teacher_prompt=prompts, loss_mask=masks)
    plugin.teacher.hidden_states = lambda ids, mask, rows, most, wanted, images: torch.zeros(int(wanted.sum()), width)
    requests = [ScoringRequest(i, prompts[i], action[i].bool()) for i in range(samples)]
    with LargestTensor() as largest:
        hidden = plugin._teacher_hidden(batch, requests, None)
    tokens = int(action.sum())
    assert hidden.shape == (tokens, width)
    assert largest.bytes <= 4 * (tokens + 1) * width


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_loss_does_not_hold_a_teacher_s_head_longer_than_its_gradients_need_it(differentiable):
    """At ZeRO-3 the head is gathered for the pass: 1.2 GB for Qwen3-8B."""
    hidden, head = (torch.randn(n, 8, requires_grad=True) for n in (5, 31))
    teacher = Head(torch.randn(31, 8))
    held, ids = weakref.ref(teacher.weight.untyped_storage()), torch.arange(5)
    output = linear_distillation(
        hidden, Head(head), [TeacherStates(torch.randn(5, 8), teacher)], ids, torch.ones(5),
        objective_of(DistillConfig()), differentiable_log_probs=differentiable,
    )  # fmt: skip
    del teacher
    assert (held() is None) is not differentiable  # a second sweep reads it
    output.loss.backward()
    assert held() is None and output.loss.grad_fn is not None


def test_a_trainer_holds_nothing_of_a_micro_batch_that_is_over(monkeypatch):
    from sdpo_plugin.openrlhf_adapter.platform import cpu

    cpu.enable()
    from sdpo_plugin.openrlhf_adapter.worker.trainer import PolicyTrainer

    held = []

    def of_openrlhf(trainer, experience, *_):
        batch, states = trainer.micro_batch, torch.zeros(3)
        batch.loss = (torch.ones(3, requires_grad=True) * states).sum()
        batch.head_fn = lambda *_: (batch, states)  # a pass knows its micro-batch
        held.append(weakref.ref(states.untyped_storage()))
        return {"metrics": {"policy_loss": batch.loss.detach()}, "weights": {"policy_loss": "token"},
                "num_action_tokens": 1.0}  # fmt: skip

    monkeypatch.setattr(PolicyTrainer.__mro__[1], "training_step", of_openrlhf)
    trainer = PolicyTrainer.__new__(PolicyTrainer)
    engine = SimpleNamespace(is_gradient_accumulation_boundary=lambda: True, was_step_applied=lambda: True)
    hook = SimpleNamespace(openrlhf_before_forward=lambda **_: None, openrlhf_optimizer_step=lambda **_: None)
    train = SimpleNamespace(dynamic_batch_enable=False)
    trainer.worker = SimpleNamespace(ranks=1, rank=0)
    trainer.args = SimpleNamespace(train=train, ds=SimpleNamespace(param_dtype="bf16"))
    trainer.hook, trainer.required, trainer.reports = hook, {}, {}
    trainer.actor = SimpleNamespace(model=engine, ring=OneRank(), using=lambda _: contextlib.nullcontext())
    trainer._mean = lambda *_, **__: None
    gc.disable()
    try:
        trainer.training_step(SimpleNamespace(info={}, loss_mask_info=None), 0.0, 0, {"some": 1})
        assert held[0]() is None
    finally:
        gc.enable()
