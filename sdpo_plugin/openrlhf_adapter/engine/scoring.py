"""An engine as a teacher: log-probabilities of given tokens, and of its top-k tokens at their positions."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Any

import numpy as np
from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap
from vllm import SamplingParams
from vllm.inputs import TokensPrompt
from vllm.utils import random_uuid

from sdpo_plugin.openrlhf_adapter.patch_points import patch_point

RolloutRayActor: Any = patch_point("openrlhf.trainer.ray.vllm_engine:RolloutRayActor")
# vLLM makes float32 logits of a whole prefill at once for `prompt_logprobs`: 1.2 GB of 2,048 tokens at V=151,936.
MAX_BATCHED_TOKENS = 2048


async def score(
    engine: Any, ids: list[int], start: int, topk: int, alone: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What an engine gives the n tokens of `ids` from position `start` (at least 1) on.

    Args:
        alone: with the engine to itself (`--rollout.deterministic`): other requests change the last bits.

    Returns:
        `interface.rollout_batch.Scores` as arrays: float32 [n], int32 [n, K], float32 [n, K].
    """
    params = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=topk, flat_logprobs=True, detokenize=False
    )
    final: Any = None
    async with engine.alone if alone else nullcontext():
        async for output in engine.llm.generate(TokensPrompt(prompt_token_ids=ids), params, request_id=random_uuid()):
            final = output
    found = final.prompt_logprobs  # of every position but the first, the token itself and then the top-k
    columns = len(found.token_ids) // (len(ids) - 1)
    rows = slice(start - 1, len(ids) - 1)
    tokens = np.array(found.token_ids, dtype=np.int32).reshape(-1, columns)[rows]
    log_probs = np.array(found.logprobs, dtype=np.float32).reshape(-1, columns)[rows]
    return log_probs[:, 0], tokens[:, 1:], log_probs[:, 1:]


class TeacherEngine(RolloutRayActor):
    """vllm_engine.py: `RolloutRayActor`, for scoring alone."""

    async def __init__(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[misc]  # Ray awaits it
        kwargs |= {
            "worker_extension_cls": f"{TemperedWorker.__module__}.{TemperedWorker.__name__}",
            "max_logprobs": -1, "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        }  # fmt: skip
        await super().__init__(*args, **kwargs)
        self.alone = asyncio.Lock()

    async def divide_logits(self, temperature: float) -> None:
        """Score at this temperature from here on; vLLM does not apply a request's to `prompt_logprobs`."""
        await self.llm.collective_rpc("divide_logits", args=(temperature,))

    async def score(self, *request: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return await score(self, *request)


class TemperedWorker(WorkerWrap):
    """vllm_worker_wrap.py: `WorkerWrap`, in vLLM's worker process."""

    model_runner: Any

    def divide_logits(self, temperature: float) -> None:
        model = self.model_runner.model
        compute = model.compute_logits

        def tempered(*args: Any, **kwargs: Any) -> Any:
            logits = compute(*args, **kwargs)
            # With tensor parallelism some ranks have none. In place: they are the largest tensor here.
            return None if logits is None else logits.div_(temperature)

        model.compute_logits = tempered
