"""Ring attention: the gradient, the log-probabilities and the metrics are those of one rank without a ring."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import cases
from transformers import AutoConfig

from sdpo_plugin.config import ConfigError

RANKS = {"2": (2, 2), "4": (4, 4), "2x2": (4, 2)}  # all ranks, and those of a ring


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """`found(ranks, size)`: what each rank found in all cases of ring_ranks.py."""
    done = {}

    def run(ranks, size):
        if (ranks, size) not in done:
            import ring_ranks

            directory = tmp_path_factory.mktemp("ring")
            torch.multiprocessing.spawn(ring_ranks.on_rank, (ranks, size, str(directory)), ranks)
            done[ranks, size] = [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
        return done[ranks, size]

    # Where the ranks' processes, which are no forks, find this package and ring_ranks.py.
    with pytest.MonkeyPatch.context() as patch:
        root = Path(__file__).parents[2]
        patch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(root / "tests"), os.environ["PYTHONPATH"]]))
        patch.setattr(sys, "path", [str(root), *sys.path])
        yield run


@pytest.mark.parametrize(("ranks", "size"), cases(RANKS, "2"))
def test_a_ring_has_the_gradient_of_one_rank(found, ranks, size):
    distances = {}
    for case, first in found(ranks, size)[0].items():
        expected, got = first["expected"]["gradients"], first["got"]["gradients"]
        assert expected.keys() == got.keys()
        difference = torch.stack([(got[name] - g).norm() for name, g in expected.items()]).norm()
        distances[case] = float(difference / torch.stack([g.norm() for g in expected.values()]).norm())
    without_teacher = distances.pop("no-teacher")
    print(distances)
    assert max(distances.values()) <= 1e-5
    assert without_teacher != without_teacher  # 0 / 0


@pytest.mark.parametrize(("ranks", "size"), cases(RANKS, "2"))
def test_the_cases_have_ranks_without_a_response_and_teachers_on_other_ranks(found, ranks, size):
    ring = found(ranks, size)[:size]
    rows = {case: [of_rank[case]["got"]["rows"][0] for of_rank in ring] for case in ring[0]}
    assert rows["prompt-alone"][0] == 0 and sum(rows["prompt-alone"]) == 3
    assert sum(n > 0 for n in rows["straddles"]) > 1
    # Two of the prompt, six of the response: the first ranks have student states, the last one all teacher states.
    assert rows["teacher-elsewhere"][0] > 0 and sum(rows["teacher-elsewhere"]) == 6


@pytest.mark.parametrize(("ranks", "size"), cases(RANKS, "2"))
def test_every_rank_of_a_ring_has_the_log_probabilities_losses_and_reports_of_all_tokens(found, ranks, size):
    for rank, of_rank in enumerate(found(ranks, size)):
        for case, both in of_rank.items():
            expected, got = (SimpleNamespace(**both[kind]) for kind in ("expected", "got"))
            first = rank // size * len(got.losses)
            own = slice(first, first + len(got.losses))  # the micro-batches of the ring
            for a, b in zip(got.log_probs, expected.log_probs[own], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=case)
            assert got.losses == pytest.approx(expected.losses[own], rel=1e-4, abs=1e-6), case
            assert got.reports.keys() == {key for key in expected.reports if key[2] // 100 == rank // size}, case
            for key, stats in got.reports.items():
                assert_same_stats(stats, expected.reports[key])


def assert_same_stats(got, expected):
    """What the recorder is told of a sample, token by token."""
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        if name == "ids":
            assert got[name] == values
            continue
        for a, b in zip(got[name], values, strict=True):
            assert a == b if b is None else a == pytest.approx(b, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("ranks", "size"), cases(RANKS, "2"))
def test_logged_means_over_all_ranks_are_those_of_one_rank(found, ranks, size):
    """As sums and numbers, which OpenRLHF adds up over all ranks: the ratios are what is logged."""
    every = found(ranks, size)
    for case in every[0]:
        expected = every[0][case]["expected"]["means"]
        for name, (total, count) in expected.items():
            if name.startswith("teacher/") or name.endswith("student_entropy"):
                continue  # of a few samples of each rank's first micro-batch: other samples, where there are more ranks
            of_ranks = [of_rank[case]["got"]["means"][name] for of_rank in every]
            totals, counts = (sum(x) for x in zip(*of_ranks, strict=True))
            assert totals * count == pytest.approx(total * counts, rel=1e-4), (case, name)


@pytest.mark.parametrize(("ranks", "size"), cases({"2": (2, 2)}, "2"))
def test_the_collapse_monitor_measures_the_same_on_one_ring_as_on_one_rank(found, ranks, size):
    every = found(ranks, size)
    for case in every[0]:
        for name, (total, count) in every[0][case]["expected"]["means"].items():
            of_ranks = [of_rank[case]["got"]["means"][name] for of_rank in every]
            totals, counts = (sum(x) for x in zip(*of_ranks, strict=True))
            assert totals * count == pytest.approx(total * counts, rel=1e-3, abs=1e-6), (case, name)


def flags(**changed):
    """Of a run with rings of two on one machine, as far as ring attention is concerned."""
    group = SimpleNamespace(num_nodes=1, num_gpus_per_node=4)
    found = {
        "actor": group, "ref": group, "critic": SimpleNamespace(**vars(group), model_name_or_path=None),
        "algo": SimpleNamespace(kl=SimpleNamespace(init_coef=0.0)), "data": SimpleNamespace(max_images_per_prompt=0),
    }  # fmt: skip
    ds = {"ring_attn_size": 2, "ring_attn_head_stride": 1, "attn_implementation": "flash_attention_2"}
    found["ds"] = SimpleNamespace(**ds | changed.pop("ds", {}))
    return SimpleNamespace(**found | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ds": {"ring_attn_size": 3}}, r"--ds.ring_attn_size 3: the actor has 1 x 4 GPUs.* a multiple of 3"),
        ({"data": SimpleNamespace(max_images_per_prompt=1)}, r"--data.max_images_per_prompt 1: images cannot"),
        ({"ds": {"attn_implementation": "flash_attention_3"}}, r"flash_attention_3: .* give flash_attention_2"),
        ({}, r"--ds.ring_attn_size 2: ring_flash_attn is not installed; pip install 'openrlhf\[ring\]'"),
    ],
)
def test_flags_that_do_not_go_together_with_a_ring_are_rejected(changed, message):
    from sdpo_plugin.openrlhf_adapter.launcher import ring

    with pytest.raises(ConfigError, match=message), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring.importlib.util, "find_spec", lambda name: None)
        ring.check(flags(**changed), cpu=False)
    ring.check(flags(), cpu=True)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("qwen3_next", {}, r"there: it has layers of the kind linear_attention.* give --ds.ring_attn_size 1"),
        ("gemma2", {}, r"there: ring_flash_attn has no soft-cap"),
        ("llama", {"num_key_value_heads": 2}, r"--ds.ring_attn_head_stride 4: there has 2 key-value heads"),
        ("llama", {"num_key_value_heads": 8}, None),
        ("gemma3_text", {"num_key_value_heads": 4}, None),
    ],
)
def test_models_that_cannot_be_sliced_are_rejected(kind, options, message):
    from sdpo_plugin.openrlhf_adapter.launcher import ring

    found = [("--actor.model_name_or_path", "there", AutoConfig.for_model(kind, **options))]
    args = flags(ds={"ring_attn_head_stride": 4})
    if message is None:
        ring.models(args, found)
        return
    with pytest.raises(ConfigError, match=message):
        ring.models(args, found)
