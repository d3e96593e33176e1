"""The real host on CPU: Ray, vLLM, DeepSpeed, weight sync. What is asserted are weights, tokens and metrics."""

import socket
import threading
from types import SimpleNamespace

import pytest
import torch

from sdpo_plugin.openrlhf_adapter.platform import cpu


def test_the_trainer_is_not_left_waiting_for_an_engine_that_refuses():
    """The engine's and the trainer's side of weight sync, without vLLM between them."""
    cpu.enable()
    from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap

    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    trainer = threading.Thread(target=lambda: cpu._GlooGroup("localhost", port, 0, 2).broadcast(torch.ones(3), 0))
    trainer.daemon = True
    trainer.start()
    engine = WorkerWrap()
    engine._model_update_with_ray, engine.model_config = False, SimpleNamespace(dtype=torch.bfloat16)
    engine._model_update_group = cpu._GlooGroup("localhost", port, 1, 2)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(AssertionError, match="mismatch dtype"):
            engine.update_weight("a", torch.float32, (3,), False)
        trainer.join(10)
    finally:
        torch.distributed.destroy_process_group()
    assert not trainer.is_alive()
