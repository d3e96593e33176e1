"""LoRA on the real host: the engines follow the adapter, teachers are adapters, and a restart has both."""

from types import SimpleNamespace

import pytest

from sdpo_plugin.algorithms.compatibility import reject_unsupported
from sdpo_plugin.config import ConfigError
from sdpo_plugin.openrlhf_adapter.platform import cpu
from sdpo_plugin.testing import fake_worker


def test_only_the_policy_s_model_is_announced(model, monkeypatch):
    """And not the second one, without adapters, that --train.enable_ema builds."""
    cpu.enable()
    from openrlhf.trainer.ray import ppo_actor

    from sdpo_plugin.openrlhf_adapter.worker import worker

    for name in ("Actor", "ActorPPOTrainer", "DataLoader", "iter_grad_accum_global_norm"):
        monkeypatch.setattr(ppo_actor, name, getattr(ppo_actor, name))
    announced = []
    worker._bind(lambda actor: announced.append(actor))
    policy, average = (ppo_actor.Actor(str(model), attn_implementation="sdpa") for _ in range(2))
    assert announced == [policy] and type(average) is type(policy)


def test_openrlhf_s_own_ema_and_lora_are_rejected():
    args = fake_worker(train={"enable_ema": True, "async_enable": False}).args
    args.ds = SimpleNamespace(lora=SimpleNamespace(rank=4))
    with pytest.raises(ConfigError, match="--train.enable_ema with --ds.lora.rank 4: .*leave --train.enable_ema out"):
        reject_unsupported(args)
