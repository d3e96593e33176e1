"""One optimizer step's gradient on ranks with ring attention and on one rank without, for test_ring_attention.py.

The policy model, the algorithm, OpenRLHF's normalizers and its policy loss are the real ones. There is no DeepSpeed, so
gradients are averaged by hand; tests/integration/test_gradients.py has all of it.
"""

import copy
from types import SimpleNamespace

import torch
import torch.distributed as dist

from sdpo_plugin.openrlhf_adapter.platform import cpu

cpu.enable()

from openrlhf.models import PolicyLoss, aggregate_loss  # noqa: E402
from openrlhf.models.ring_attn_utils import set_ring_attn_group  # noqa: E402
from openrlhf.utils.loss_utils import iter_grad_accum_global_norm  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from sdpo_plugin.algorithms.fsd import FSD, FsdConfig  # noqa: E402
from sdpo_plugin.algorithms.rlcsd import RLCSD, RlcsdConfig  # noqa: E402
from sdpo_plugin.algorithms.sdpo import SDPO  # noqa: E402
from sdpo_plugin.interface import models  # noqa: E402
from sdpo_plugin.interface.micro_batch import MicroBatch, combined_requirements  # noqa: E402
from sdpo_plugin.interface.transport import ATTACHED, REQUESTED  # noqa: E402
from sdpo_plugin.monitoring.recorder import RECORDED  # noqa: E402
from sdpo_plugin.openrlhf_adapter.worker import lora  # noqa: E402
from sdpo_plugin.openrlhf_adapter.worker.actor import PolicyActor  # noqa: E402
from sdpo_plugin.openrlhf_adapter.worker.teacher_model import AdapterTeacher, SeparateTeacher  # noqa: E402
from sdpo_plugin.openrlhf_adapter.worker.trainer import PolicyTrainer, windows_with_loss_mask  # noqa: E402
from sdpo_plugin.testing import fake_worker  # noqa: E402

VOCAB = 31
# Of each sample: tokens of its prompt, of its response, and of the teacher's prompt (0: no teacher).
BATCHES = {
    "uneven": [(3, 5, 9), (7, 2, 0), (2, 8, 20), (4, 4, 6)],
    "straddles": [(4, 9, 11)],
    "prompt-alone": [(13, 3, 2)],
    "teacher-elsewhere": [(2, 6, 30)],
    "no-teacher-on-one": [(2, 6, 0), (2, 6, 5)],
    "no-teacher": [(2, 3, 0), (4, 2, 0)],
    "short": [(1, 1, 1)],
}  # fmt: skip
MIXED = ("uneven", "no-teacher", "prompt-alone", "straddles")
HYBRID = {"distill": {"weight": 0.5}, "actor": {"entropy_coef": 0.1}}
# name: batches of each rank (each data-parallel rank has all), algorithm, options, LoRA
CASES = {
    **{batch: ((batch,), SDPO, {}, False) for batch in BATCHES},
    "micro-batches": (MIXED, SDPO, {}, False),
    "token-mean": (MIXED, SDPO, {"distill": {"loss_agg_mode": "token-mean", "mode": "full"}}, False),
    "sampled": (MIXED, SDPO, {"distill": {"mode": "sampled", "alpha": 1.0}}, False),
    "policy-loss-entropy": (MIXED, SDPO, HYBRID, False),
    "base": (MIXED, SDPO, {"teacher": {"kind": "base"}}, False),
    "ema": (MIXED, SDPO, {"teacher": {"kind": "ema", "update_rate": 0.3}}, False),
    "trust-region": (MIXED, SDPO, {"teacher": {"kind": "trust_region", "update_rate": 0.3}}, False),
    "small-passes": (MIXED, SDPO, {"teacher": {"kind": "live", "max_tokens_per_gpu": 5}}, False),
    "lora-base": (MIXED, SDPO, {"teacher": {"kind": "base"}}, True),
    "lora-ema": (MIXED, SDPO, {"teacher": {"kind": "ema", "update_rate": 0.3}, **HYBRID}, True),
    "correction": (MIXED, SDPO, {"algo": {"advantage": SimpleNamespace(is_correction_level="token")}}, False),
    "mean-of-token-weights": (MIXED, FSD, {"fsd": vars(FsdConfig())}, False),
    "token-advantages": (MIXED, RLCSD, {"rlcsd": vars(RlcsdConfig(wrong_hints=1))}, False),
}  # fmt: skip


class Engine(torch.nn.Module):
    """Of DeepSpeed's engine, what the policy model touches."""

    device = torch.device("cpu")

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def policy(with_lora) -> PolicyActor:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    if with_lora:
        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        lora.add_teacher(model)
    actor = PolicyActor(Engine(model))
    actor.packing_samples = True
    return actor


def experience(batch, number):
    """A micro-batch as the policy worker gets it, with what the controller attached."""
    random = torch.Generator().manual_seed(number)
    tokens = [torch.randint(1, VOCAB, (p + r,), generator=random) for p, r, _ in batch]
    sequences = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    position = torch.arange(sequences.shape[1])
    begin, end = (torch.tensor(x)[:, None] for x in ([p for p, _, _ in batch], [p + r for p, r, _ in batch]))
    action = ((position[1:] >= begin) & (position[1:] < end)).long()
    prompts = [torch.randint(1, VOCAB, (t,), generator=random) for *_, t in batch]
    others = [torch.randint(1, VOCAB, (t and t + 3,), generator=random) for *_, t in batch]
    data = {
        "teacher_prompt": prompts, "teacher_prompt/1": others,
        "loss_mask": [mask.bool() & (t > 0) for mask, (*_, t) in zip(action, batch, strict=True)],
        "failed": [torch.tensor(i % 2 == 0) for i in range(len(batch))], "reward": list(torch.arange(len(batch)) / 2.0),
        REQUESTED + RECORDED: [torch.tensor([1, number + i]) for i in range(len(batch))],
    }  # fmt: skip
    old = -torch.rand(action.shape, generator=random) * 4 * action
    return SimpleNamespace(
        sequences=sequences, attention_mask=(position < end).long(), action_mask=action, action_log_probs=old,
        rollout_log_probs=old - 0.1 * torch.rand(action.shape, generator=random) * action,
        advantages=torch.randn(action.shape, generator=random) * action,
        info={ATTACHED + name: values for name, values in data.items()},
    )  # fmt: skip


def optimizer_step(case, batches, rank, ranks, dp_group):
    """Gradients of the micro-batches on this rank, as they are before they are averaged, and what was logged."""
    names, kind, options, with_lora = CASES[case]
    worker = fake_worker(**options)
    worker.args.distill.topk = 8
    actor = worker.actor = policy(with_lora)
    worker.rank, worker.ranks = rank, ranks
    start = copy.deepcopy(actor)

    def initial(offload, updatable):
        if with_lora:
            return AdapterTeacher(worker, lora.TEACHER if updatable else None)
        start.tap_head()
        return SeparateTeacher(worker, start)

    worker.load_initial_model = initial
    worker.fragments = lambda: {
        name: models.Fragment(0, parameter.data.view(-1))
        for name, parameter in actor.model.module.named_parameters() if parameter.requires_grad
    }  # fmt: skip
    plugin = kind(worker.args)
    plugin.openrlhf_worker_setup(worker)
    with torch.no_grad():  # the student is no longer its initial model
        torch.manual_seed(1)
        for parameter in actor.model.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    plugin.openrlhf_optimizer_step(worker)

    trainer = PolicyTrainer.__new__(PolicyTrainer)
    level = worker.args.algo.advantage.is_correction_level
    trainer.policy_loss_fn = PolicyLoss(is_correction_level=level)
    trainer.hook = SimpleNamespace(openrlhf_policy_loss=plugin.openrlhf_policy_loss)
    strategy = SimpleNamespace(ds_device_mesh={"dp": SimpleNamespace(get_group=lambda: dp_group)})
    required = combined_requirements([plugin.openrlhf_requirements(worker.args)])
    windows = windows_with_loss_mask(iter_grad_accum_global_norm)
    entropy_coef, losses, rows, means, reports, log_probs = worker.args.actor.entropy_coef, [], [], {}, {}, []
    for batch, info in windows(iter(batches), strategy, len(batches), lambda e: e.action_mask):
        micro_batch = trainer.micro_batch = MicroBatch(
            worker, batch, required, trainer._mean(batch.loss_mask_info, True), trainer._mean(info, False),
            trainer._rollout_correction, reports, actor.ring,
        )  # fmt: skip
        plugin.openrlhf_before_forward(micro_batch)
        with actor.using(micro_batch):
            found, output = actor(
                batch.sequences, batch.action_mask, attention_mask=batch.attention_mask, return_output=True,
                ring_attn_group=actor.ring.group, return_entropy=entropy_coef is not None,
            )  # fmt: skip
        loss, *_ = trainer._loss(
            found, batch.action_log_probs, batch.advantages, action_mask=batch.action_mask,
            rollout_log_probs=batch.rollout_log_probs, **info,
        )  # fmt: skip
        if entropy_coef is not None:
            loss = loss - aggregate_loss(output.entropy, batch.action_mask, **info) * entropy_coef
        (loss / len(batches)).backward()
        losses.append(float(loss.detach()))
        rows.append(int(micro_batch.response.sum()))
        log_probs.append(found.detach())
        for name, (total, count) in micro_batch.means.items():
            before = means.get(name, (0.0, 0.0))
            means[name] = (before[0] + total, before[1] + count)
    trained = {n: p for n, p in actor.model.module.named_parameters() if p.requires_grad}
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
    return SimpleNamespace(
        gradients=gradients, losses=losses, rows=rows, means=means, reports=reports, log_probs=log_probs
    )  # fmt: skip


def on_rank(rank, world, size, directory):
    """Entry point of `torch.multiprocessing.spawn`: `size` ranks to a ring."""
    torch.set_num_threads(1)
    models.MAX_CHUNK_BYTES = 3 * 32 * 4  # three hidden states at a time
    dist.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=world)
    mesh = dist.init_device_mesh("cpu", (world // size, size), mesh_dim_names=("dp", "sp"))
    alone = dist.new_subgroups(1)[0]
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    from ring_flash_attn import substitute_hf_flash_attn

    found = {}
    for case, (names, *_) in CASES.items():
        every = lambda dp: [experience(BATCHES[name], 100 * dp + 10 * i) for i, name in enumerate(names)]  # noqa: B023, E731
        set_ring_attn_group(None)
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
        expected = optimizer_step(case, [b for dp in range(world // size) for b in every(dp)], 0, 1, alone)
        group = mesh["sp"].get_group()
        set_ring_attn_group(group)
        substitute_hf_flash_attn(group, 1)
        got = optimizer_step(case, every(rank // size), rank, world, mesh["dp"].get_group())
        for gradient in got.gradients.values():
            dist.all_reduce(gradient)
            gradient /= world
        found[case] = {"expected": vars(expected), "got": vars(got)}
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()
