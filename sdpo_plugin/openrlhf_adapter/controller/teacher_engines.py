"""The vLLM engines that score for the teacher: the rollout's, or engines of the teacher's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from openrlhf.trainer.ray import vllm_engine

from sdpo_plugin.config import TeacherConfig, from_namespace, is_server
from sdpo_plugin.interface.rollout_batch import Scores, TeacherEngines, ToScore
from sdpo_plugin.openrlhf_adapter.controller.rollout import max_seq_len
from sdpo_plugin.openrlhf_adapter.controller.teacher_servers import Requests, TeacherServers
from sdpo_plugin.openrlhf_adapter.engine.scoring import TeacherEngine
from sdpo_plugin.openrlhf_adapter.patch_points import patch_point

_ENGINES = "openrlhf.trainer.ray.vllm_engine"
create_vllm_engines = patch_point(
    f"{_ENGINES}:create_vllm_engines", "num_engines", "tensor_parallel_size", "pretrain", "seed",
    "full_determinism", "enable_prefix_caching", "enforce_eager", "max_model_len", "shared_pg",
    "gpu_memory_utilization", "vllm_enable_sleep",
)  # fmt: skip
batch_vllm_engine_call = patch_point(f"{_ENGINES}:batch_vllm_engine_call", "engines", "method_name")


def teacher_engines(args: Any, rollout_engines: Sequence[Any], policy: Any) -> TeacherEngines | None:
    """What scores for the teacher, or None where the policy workers do.

    Args:
        args: OpenRLHF's nested arguments. policy: the policy workers, OpenRLHF's `RayActorGroup`.
    """
    config: TeacherConfig = from_namespace(TeacherConfig, args)
    if config.scored_by == "worker":
        return None
    if config.kind == "live":
        return RolloutEngines(rollout_engines, args)
    found: dict[str | None, TeacherEngines] = {
        route: (
            TeacherServers(source.split(","), args) if is_server(source) else OwnEngines(source, config, args, policy)
        )
        for route, source in config.sources(args.actor.model_name_or_path).items()
    }
    return found[None] if None in found else SeveralTeachers(found)


class SeveralTeachers:
    """Teachers by route (`--teacher.routes`)."""

    def __init__(self, teachers: Mapping[str | None, TeacherEngines]) -> None:
        self.teachers = teachers
        self.max_tokens = min(teacher.max_tokens for teacher in teachers.values())

    def begin(self, requests: Sequence[ToScore], topk: int) -> None:
        for route, teacher in self.teachers.items():
            teacher.begin([request for request in requests if request.route == route], topk)

    def score(self, requests: Sequence[ToScore], topk: int) -> list[Scores]:
        self.begin(requests, topk)  # else each would wait for the one before
        found: list[Any] = [None] * len(requests)
        for route, teacher in self.teachers.items():
            places = [i for i, request in enumerate(requests) if request.route == route]
            for i, scores in zip(places, teacher.score([requests[i] for i in places], topk), strict=True):
                found[i] = scores
        return found


class RayEngines(Requests):
    """Engines that are Ray actors. Each request goes to the one that has been sent the fewest tokens.

    Attributes:
        engines: with a method `score(ids, start, topk, alone)`. alone: one request at a time each.
        sleeps: whether they sleep but when they score, so that others can use the GPUs.
    """

    engines: Sequence[Any]

    def __init__(self, engines: Sequence[Any], max_tokens: int, args: Any, sleeps: bool) -> None:
        super().__init__()
        self.engines, self.max_tokens, self.sent = engines, max_tokens, [0] * len(engines)
        self.alone, self.sleeps = args.rollout.deterministic, sleeps

    @contextmanager
    def awake(self, **tags: Any) -> Iterator[None]:
        if self.sleeps:
            batch_vllm_engine_call(self.engines, "wake_up", **tags)
        try:
            yield
        finally:
            if self.sleeps:
                batch_vllm_engine_call(self.engines, "sleep")

    def begin(self, requests: Sequence[ToScore], topk: int) -> None:
        if not self.sleeps:
            super().begin(requests, topk)

    def score(self, requests: Sequence[ToScore], topk: int) -> list[Scores]:
        with self.awake():
            super().begin(requests, topk)
            return super().score(requests, topk)

    def _send(self, request: ToScore, topk: int) -> Any:
        least = self.sent.index(min(self.sent))
        self.sent[least] += len(request.ids)
        return self.engines[least].score.remote(list(request.ids), request.start, topk, self.alone)

    def _received(self, sent: Sequence[Any]) -> list[Scores]:
        return [Scores(*map(torch.tensor, answer)) for answer in ray.get(list(sent))]


class RolloutEngines(RayEngines):
    """The rollout's own engines, whose weights are the student's that sampled (`--teacher.kind live`)."""

    def __init__(self, engines: Sequence[Any], args: Any) -> None:
        super().__init__(engines, args.data.max_len - 1, args, args.vllm.enable_sleep)  # vLLM samples one token more


class OwnEngines(RayEngines):
    """Engines of the teacher's own, with the weights of the model that teaches.

    They have GPUs of their own, or with `--train.colocate_all` share those of the policy and the rollout's engines,
    and sleep with `--vllm.enable_sleep`.
    """

    def __init__(self, model: str, config: TeacherConfig, args: Any, policy: Any) -> None:
        longest = int(min(max_seq_len(model), args.data.max_len + args.reprompt.max_len + 1))
        shared, sleeps = None, False
        if args.train.colocate_all and not args.train.async_enable:
            shared, sleeps = ray.get(policy.async_run_method(method_name="placement_group"))[0], args.vllm.enable_sleep
        rollouts, vllm_engine.RolloutRayActor = vllm_engine.RolloutRayActor, ray.remote(TeacherEngine)
        try:
            engines = create_vllm_engines(
                config.num_engines, config.tensor_parallel_size, model, args.train.seed,
                full_determinism=args.train.full_determinism_enable, enable_prefix_caching=False,
                enforce_eager=args.vllm.enforce_eager, max_model_len=longest, shared_pg=shared,
                gpu_memory_utilization=config.gpu_memory_utilization, vllm_enable_sleep=sleeps,
            )  # fmt: skip
        finally:
            vllm_engine.RolloutRayActor = rollouts
        super().__init__(engines, longest - 1, args, sleeps)
        temperature = args.rollout.temperature
        self.tempered = [engine.divide_logits.remote(temperature) for engine in engines if temperature != 1.0]

    def score(self, requests: Sequence[ToScore], topk: int) -> list[Scores]:
        ray.get(self.tempered)
        return super().score(requests, topk)
