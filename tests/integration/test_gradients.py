"""The policy worker's gradient is the dense definition's, at every ZeRO stage, and no large logits exist in it."""

import functools
import shutil

import pytest
import torch
from common import LORA, ROWS, SDPO, STAGES, ZERO, cases
from probe import CHUNK_ROWS

from sdpo_plugin.testing import tiny_model


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True)


@pytest.fixture(scope="session")
def twice(recorded, tmp_path_factory):
    """The first recorded step, two times."""
    directory = tmp_path_factory.mktemp("twice")
    for name in ("00000.pt", "00001.pt"):
        shutil.copy(recorded.directory / "samples" / "00000.pt", directory / name)
    return directory


@pytest.mark.parametrize(
    ("stage", "tied"),
    cases({"0-untied": (0, False), "0-tied": (0, True), "2-untied": (2, False), "2-tied": (2, True),
           "3-untied": (3, False), "3-tied": (3, True)}, "2-untied", "3-tied"),
)  # fmt: skip
def test_gradient_is_the_definition_s(
    openrlhf, model, tied_model, reward, recorded, twice, monkeypatch, tmp_path, stage, tied
):
    flags = [*SDPO, *ZERO[stage], "--actor.adam.lr", "0", "--testing.replay", str(twice)]
    # In bf16 the last digit of what enters the layers below decides how some of their gradients are rounded: 5e-4.
    probe = ["--probe.out", str(tmp_path / "gradients.pt"), "--probe.fp32", "--plugins", "sdpo_plugin.testing", "probe"]
    run = openrlhf(tied_model if tied else model, ROWS, reward, *flags, *probe, replay=recorded)
    fused, dense = torch.load(tmp_path / "gradients.pt")
    difference = distance(fused, dense)
    print(f"stage {stage}, tied {tied}: relative difference {difference:.1e}")
    assert difference <= 1e-5
    rows = [value for _, value in run.metrics["train/probe/logit_rows"]]
    assert rows[0] <= CHUNK_ROWS < rows[1]  # and the tracer sees what there is to see


def norm(gradient) -> float:
    return float(sum(g.square().sum() for g in gradient.values()).sqrt())


def distance(a, b) -> float:
    """Of two gradients, relative to the second."""
    assert norm(b) > 0 and a.keys() == b.keys()
    return norm({name: a[name] - g for name, g in b.items()}) / norm(b)


@pytest.fixture(scope="session")
def active(recorded, tmp_path_factory):
    """`active(n)`: the first recorded step, where only the first n of its 16 samples have a context."""

    @functools.cache
    def samples(n):
        step = recorded.samples[0]
        for sample in step[n:]:
            sample.feedback, sample.rewards = None, torch.zeros_like(sample.rewards)
        directory = tmp_path_factory.mktemp(f"active{n}")
        torch.save(step, directory / "00000.pt")
        return directory

    return samples


@pytest.fixture(scope="session")
def probed(openrlhf, model, reward, recorded, active, tmp_path_factory):
    """`probed(*flags)`: what the probe wrote of one step in float32: another split of a sum changes bf16 by 1e-3.

    Half of the samples, one rank's of two, have a context.
    """

    def run(*flags, n=8):
        out = tmp_path_factory.mktemp("gradient") / "gradients.pt"
        probe = ["--probe.out", str(out), "--probe.fp32", "--plugins", "sdpo_plugin.testing", "probe"]
        openrlhf(model, ROWS, reward, *SDPO, *flags, "--testing.replay", str(active(n)), *probe, replay=recorded)
        return out

    return run


@pytest.fixture(scope="session")
def gradient(probed):
    return functools.cache(lambda *flags: torch.load(probed(*flags))[0])


@pytest.fixture(scope="session")
def of_one_rank(gradient):
    return gradient()


@pytest.mark.parametrize("zero", cases(STAGES, "zero2", "zero3"))
def test_two_ranks_have_the_gradient_of_one(gradient, of_one_rank, zero):
    difference = distance(gradient(*zero), of_one_rank)
    print(f"{zero}: relative difference {difference:.1e}")
    assert difference <= 1e-5


@pytest.mark.check
def test_both_means_keep_their_weight_beside_the_policy_s_loss(gradient, of_one_rank):
    """On two ranks, in micro-batches of two of which some hold no sample with a context, as on one in one of sixteen.

    Half of the samples have one, and all responses are about as long: the mean over the tokens with a context is about
    twice the mean over all samples.
    """
    pure = {"seq-mean-token-mean": of_one_rank}
    for mean in ("seq-mean-token-mean", "token-mean"):
        half = ("--distill.weight", "0.5", "--distill.loss_agg_mode", mean)
        whole = gradient(*half, "--train.micro_batch_size", "16", "--rollout.micro_batch_size", "16")
        split = gradient(*half, *ZERO[2], "--train.micro_batch_size", "2")
        difference = distance(split, whole)
        pure[mean] = pure.get(mean) or gradient("--distill.loss_agg_mode", mean)
        print(f"{mean}: relative difference {difference:.1e}, norm {norm(pure[mean]):.3e}")
        assert difference <= 1e-5
    assert norm(pure["token-mean"]) == pytest.approx(2 * norm(pure["seq-mean-token-mean"]), rel=0.2)


@pytest.mark.parametrize(
    ("batches", "stage"),
    cases({"packed-3": ("packed", 3), "dynamic-0": ("dynamic", 0), "dynamic-2": ("dynamic", 2)}, "dynamic-2"),
)
def test_packed_samples_have_the_gradient_of_padded_ones(gradient, of_one_rank, batches, stage):
    """Also in micro-batches of as many samples as have room. The host packs only if there is an engine."""
    flags = ["--ds.packing_samples", "--vllm.num_engines", "1"]
    if batches == "dynamic":
        flags += ["--train.dynamic_batch_enable", "--train.max_tokens_per_gpu", "64"]
    difference = distance(gradient(*ZERO[stage], *flags), of_one_rank)
    print(f"{batches}, stage {stage}: relative difference {difference:.1e}")
    assert difference <= 1e-5


RING = ("--ds.packing_samples", "--vllm.num_engines", "1", "--ds.ring_attn_size")
HYBRID = ("--distill.weight", "0.5", "--actor.entropy_coef", "0.1")
BASE = ("--teacher.kind", "base")
DYNAMIC = ("--train.dynamic_batch_enable", "--train.max_tokens_per_gpu", "64")
# Each with what one rank without a ring trains with, too.
RINGS = {
    "2-zero2-ema": (ZERO[2], "2", (), ()), "2-zero3-lora-ema": (ZERO[3], "2", LORA, ("--train.micro_batch_size", "2")),
    "2-zero3-base": (ZERO[3], "2", BASE, ()), "2-zero2-lora-base": (ZERO[2], "2", (*LORA, *BASE), ()),
    "2-zero2-dynamic": (ZERO[2], "2", (), DYNAMIC), "2-zero3-hybrid": (ZERO[3], "2", HYBRID, ()),
    "2-zero0": (ZERO[0], "2", (), ()),
    "2-zero2-recomputed": (ZERO[2], "2", (), ("--actor.gradient_checkpointing_enable",)),
    "2x2-zero2": ((*ZERO[2], "--actor.num_gpus_per_node", "4"), "2", (), ()),
    "4-zero3-ema": ((*ZERO[3], "--actor.num_gpus_per_node", "4"), "4", (), ()),
}  # fmt: skip


@pytest.mark.parametrize(("zero", "size", "both", "ring"), cases(RINGS, "2-zero3-lora-ema"))
def test_a_ring_has_the_gradient_of_one_rank(gradient, zero, size, both, ring):
    """With ring attention each rank has a slice of the packed student's tokens, and another of the teacher's."""
    difference = distance(gradient(*zero, *RING, size, *both, *ring), gradient(*both))
    print(f"relative difference {difference:.1e}")
    assert difference <= 1e-5


def test_the_ranks_of_a_ring_share_the_tokens_of_a_pass(probed):
    """One micro-batch, packed, so that no padding is counted; a pass is filled up to a multiple of the ring's size."""
    one = ("--train.micro_batch_size", "16", "--rollout.micro_batch_size", "16", *RING)
    whole, ring = probed(*one, "1"), probed(*ZERO[2], *one, "2")
    half = [(tokens + 1) // 2 for tokens in torch.load(f"{whole}.teacher0")]
    assert torch.load(f"{ring}.teacher0") == torch.load(f"{ring}.teacher1") == half


def test_samples_without_a_context_are_not_scored_and_the_others_dealt_evenly(probed, of_one_rank):
    """Half of sixteen samples have one: two in each of the two micro-batches of either rank."""
    out = probed(*ZERO[2], "--rollout.micro_batch_size", "2")
    assert [torch.load(f"{out}.read{rank}") for rank in (0, 1)] == [[2, 2], [2, 2]]
    assert distance(torch.load(out)[0], of_one_rank) <= 1e-5


def test_the_teacher_scores_in_passes_of_so_many_tokens(probed):
    """Three samples with a context on two ranks: at ZeRO-3 one waits for the other's second pass."""
    whole, parts = probed(*ZERO[2], n=3), probed(*ZERO[3], "--teacher.max_tokens_per_gpu", "1", n=3)
    passes = [[torch.load(f"{out}.teacher{rank}") for rank in (0, 1)] for out in (whole, parts)]
    assert len(passes[1][0]) > len(passes[0][0]) and max(passes[1][0]) < max(passes[0][0])
    assert distance(torch.load(parts)[0], torch.load(whole)[0]) <= 1e-5


SWITCHES = {
    "offload": ("--ds.adam_offload",), "none": (), "full": (), "lora": LORA, "once": (),
    "recomputed": ("--actor.gradient_checkpointing_enable",),
    "reentrant": ("--actor.gradient_checkpointing_enable", "--actor.gradient_checkpointing_reentrant"),
}  # fmt: skip
# What decides when and how DeepSpeed reduces gradients; all combinations are in matrix.py.
CELLS = {
    "-".join(map(str, cell)): cell for cell in (
        (1, "offload", "full", "reentrant"), (2, "offload", "full", "once"), (2, "offload", "lora", "recomputed"),
        (3, "offload", "full", "recomputed"), (3, "offload", "lora", "reentrant"),
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "optimizer", "weights", "layers"), cases(CELLS, "2-offload-full-once", "3-offload-lora-reentrant")
)
def test_every_micro_batch_is_in_the_gradient(gradient, stage, optimizer, weights, layers):
    """Four micro-batches on two ranks have the gradient of one on one, in buckets that overflow within a backward."""
    switches = [flag for name in (optimizer, weights, layers) for flag in SWITCHES[name]]
    flags = [*ZERO[stage], "--train.micro_batch_size", "2", "--probe.bucket", "2000", *switches]
    difference = distance(gradient(*flags), gradient("--train.micro_batch_size", "16", *SWITCHES[weights]))
    print(f"relative difference {difference:.1e}")
    assert difference <= 1e-5
