"""Which machine a run is for, and how many GPUs it asks Ray for; without Ray."""

from types import SimpleNamespace

import pytest
import torch

from sdpo_plugin.config import ConfigError
from sdpo_plugin.openrlhf_adapter.platform import cluster

CLUSTER = cluster.Cluster("10.0.0.1:6379", 2, 16)
WITHOUT_GPUS = cluster.Cluster("10.0.0.1:6379", 2, 0)


@pytest.mark.parametrize(
    "asked, variable, here, joined, expected",
    [
        (None, None, True, None, False), (None, None, False, None, True),
        (None, None, False, CLUSTER, False),  # a driver without a GPU decides nothing
        (None, None, False, WITHOUT_GPUS, True), (None, None, True, WITHOUT_GPUS, False),
        ("cuda", None, False, WITHOUT_GPUS, False), ("cpu", None, False, CLUSTER, True),
        ("cpu", None, True, None, True),
        (None, "cpu", True, None, True), ("auto", "cpu", True, None, False),  # the flag wins
    ],
)  # fmt: skip
def test_which_machine(monkeypatch, asked, variable, here, joined, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv(cluster.VARIABLE, raising=False)
    if variable:
        monkeypatch.setenv(cluster.VARIABLE, variable)
    assert cluster.on_cpu(asked, joined) == expected
    hidden = cluster.os.environ.get("CUDA_VISIBLE_DEVICES") == cluster.HIDDEN
    assert hidden == (asked == "cpu" or (asked is None and variable == "cpu"))


def test_a_platform_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--platform cuda: this machine has no CUDA GPU, and no Ray cluster is there"):
        cluster.on_cpu("cuda", None)
    with pytest.raises(ConfigError, match="--platform tpu: choose one of auto, cuda, cpu"):
        cluster.on_cpu("tpu", None)


def arguments(**changed) -> SimpleNamespace:
    one = {"num_nodes": 1, "num_gpus_per_node": 8}
    groups = {
        "actor": one, "ref": one, "critic": one | {"model_name_or_path": None},
        "reward": one | {"remote_url": "reward.py"}, "vllm": {"num_engines": 4, "tensor_parallel_size": 2},
        "algo": {"kl": SimpleNamespace(init_coef=0.0), "name": None},
        "train": {"colocate_all": False, "colocate_actor_ref": False, "colocate_critic_reward": False,
                  "async_enable": False},
    }  # fmt: skip
    return SimpleNamespace(**{name: SimpleNamespace(**{**v, **changed.get(name, {})}) for name, v in groups.items()})


WITH_REFERENCE = {"algo": {"kl": SimpleNamespace(init_coef=0.1)}}


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({}, {"actor": 8, "vllm": 8}),
        (WITH_REFERENCE, {"actor": 8, "ref": 8, "vllm": 8}),
        (WITH_REFERENCE | {"train": {"colocate_actor_ref": True}}, {"actor": 8, "vllm": 8}),
        (WITH_REFERENCE | {"train": {"colocate_all": True}}, {"actor": 8}),
        ({"train": {"colocate_all": True, "async_enable": True}}, {"actor": 8, "vllm": 8}),
        ({"reward": {"remote_url": None}}, {"actor": 8, "vllm": 8, "reward": 8}),
        ({"reward": {"remote_url": None}, "critic": {"model_name_or_path": "c"},
          "train": {"colocate_critic_reward": True}}, {"actor": 8, "vllm": 8, "critic": 8}),
    ],
)  # fmt: skip
def test_the_gpus_that_openrlhf_requests(changed, expected):
    assert cluster.gpus_needed(arguments(**changed)) == expected


def test_too_few_gpus_are_reported_before_ray_waits_for_them():
    cluster.require_gpus(arguments(), CLUSTER, cpu=False)
    with pytest.raises(ConfigError, match=r"24 GPUs \(actor 8, ref 8, vllm 8\), and the Ray cluster .* has 16"):
        cluster.require_gpus(arguments(**WITH_REFERENCE), CLUSTER, cpu=False)
