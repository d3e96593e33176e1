"""Teachers that vLLM engines score (`--teacher.scored_by engine`): requests on the controller, tables on the workers.

An engine returns log-probabilities of a text's own tokens and of its top-k tokens there (vLLM's `prompt_logprobs`),
never of tokens that the student chooses: the divergence is over the teacher's top-k.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdpo_plugin.config import DistillConfig, TeacherConfig
from sdpo_plugin.distillation.loss import LOG_ZERO, MIN_TAIL, TeacherTable, token_divergence
from sdpo_plugin.interface.micro_batch import MicroBatch
from sdpo_plugin.interface.rollout_batch import RolloutBatch, Scores, ToScore
from sdpo_plugin.interface.scoring import TeacherPrompt, numbered
from sdpo_plugin.monitoring.collapse import CONTEXT_KL

SAMPLED, IDS, LOG_PROBS = "teacher_sampled", "teacher_ids", "teacher_log_probs"


# ── the controller ──


def scored_topk(config: DistillConfig) -> int:
    """How many of the teacher's likeliest tokens the loss needs."""
    return config.topk if config.mode == "topk" and config.topk is not None else 1


def require_routes(dataset: Any, config: TeacherConfig) -> None:
    """Raise ConfigError unless every row names one of `--teacher.routes`."""
    if config.route_key is None:
        return
    if config.route_key not in dataset.column_names:
        config.fail("route_key", f"the dataset has no such column; it has {', '.join(dataset.column_names)}")
    known = config.sources("")
    for row, route in enumerate(dataset[config.route_key]):
        if str(route) not in known:
            fix = f"row {row} has {route!r} there, which --teacher.routes does not name; add it, or correct the row"
            config.fail("route_key", fix)


def attach_engine_scores(
    batch: RolloutBatch, prompts: Sequence[Sequence[Sequence[TeacherPrompt]]], topk: int
) -> list[list[Scores]]:
    """Have the teacher's engines score every sample after its teacher prompts, and send the scores along.

    Attached for teacher context k, over sample i's n_i response tokens (0 where no prompt covers the token):
    `teacher_sampled` float32 [n_i], `teacher_ids` int32 [n_i, topk], `teacher_log_probs` float32 [n_i, topk].

    Args:
        prompts: of each teacher context, of each sample.

    Returns:
        The same by teacher context and sample.
    """
    engines, began = batch.teacher_engines, time.monotonic()
    assert engines is not None  # `--teacher.scored_by engine`
    answers = iter(engines.score(_requests(batch, prompts), topk))
    found = [[_of_sample(batch, i, own, answers, topk) for i, own in enumerate(shown)] for shown in prompts]
    for k, scores in enumerate(found):
        for name, field in ((SAMPLED, "sampled"), (IDS, "ids"), (LOG_PROBS, "log_probs")):
            batch.attach(numbered(name, k), [getattr(own, field) for own in scores])
    batch.metrics["timing/teacher_score"] = time.monotonic() - began
    return found


def begin_scoring(batch: RolloutBatch, prompts: Sequence[Sequence[Sequence[TeacherPrompt]]], topk: int) -> None:
    """Send ahead what `attach_engine_scores` will ask for, if the same prompts are made of the whole batch."""
    assert batch.teacher_engines is not None
    batch.teacher_engines.begin(_requests(batch, prompts), topk)


def _requests(batch: RolloutBatch, prompts: Sequence[Sequence[Sequence[TeacherPrompt]]]) -> list[ToScore]:
    return [to_score(batch, i, prompt) for shown in prompts for i, own in enumerate(shown) for prompt in own]


def context_kl(batch: RolloutBatch, prompts: Mapping[int, list[int]]) -> dict[str, float]:
    """The context KL (`monitoring/collapse.py`) of a few samples, per scored token, as the tables show it.

    It is computed over the tokens that are in both top-k, with all others as one: a lower bound.

    Args:
        prompts: of these samples, the teacher's prompt without a context.
    """
    engines, scores = batch.teacher_engines, batch.engine_scores
    assert engines is not None and scores is not None
    asked = {i: ToScore([*ids, *batch.response_ids(i)], len(ids), batch.route(i)) for i, ids in prompts.items()}
    asked = {i: request for i, request in asked.items() if len(request.ids) <= engines.max_tokens}
    if not asked:
        return {}
    kls = []
    topk = scores[next(iter(asked))].ids.shape[1]
    for i, bare in zip(asked, engines.score(list(asked.values()), topk), strict=True):
        response = batch.response_mask(i)
        own, scored = scores[i], scores[i].log_probs[:, 0] > LOG_ZERO
        at = (response.nonzero()[:, 0] - response.nonzero()[0])[scored]
        kls.append(_shared_kl(own.ids[scored], own.log_probs[scored], bare.ids[at], bare.log_probs[at]))
    found = torch.cat(kls)
    return {CONTEXT_KL: float(found.mean())} if len(found) else {}


def _shared_kl(p_ids: Tensor, p: Tensor, q_ids: Tensor, q: Tensor) -> Tensor:
    """[n]: KL(P || Q) of top-k tables, [n, K] ids and log-probabilities, over the shared tokens and the rest."""
    same = p_ids[:, :, None] == q_ids[:, None, :]
    shared = same.any(dim=2)
    q = torch.where(shared, torch.where(same, q[:, None, :], LOG_ZERO).amax(dim=2), LOG_ZERO)
    p = torch.where(shared, p, LOG_ZERO)
    rests = [(1.0 - x.exp().sum(dim=1, keepdim=True)).clamp(min=MIN_TAIL).log() for x in (p, q)]
    return token_divergence(torch.cat([q, rests[1]], dim=1), torch.cat([p, rests[0]], dim=1), alpha=0.0)


def to_score(batch: RolloutBatch, i: int, prompt: TeacherPrompt) -> ToScore:
    """Sample i after a teacher's prompt, up to the last token that is scored."""
    last = int(prompt.position_mask.nonzero()[-1] - batch.response_mask(i).nonzero()[0]) + 1
    return ToScore([*prompt.ids, *batch.response_ids(i)[:last]], len(prompt.ids), batch.route(i))


def _of_sample(
    batch: RolloutBatch, i: int, prompts: Sequence[TeacherPrompt], answers: Iterator[Scores], topk: int
) -> Scores:
    """Sample i's scores over its response tokens, from the answers to its prompts."""
    response = batch.response_mask(i)
    number = response.cumsum(0) - 1  # of a response token, by action position
    n = int(response.sum())
    found = Scores(torch.zeros(n), torch.zeros(n, topk, dtype=torch.int32), torch.full((n, topk), LOG_ZERO))
    first = int(response.nonzero()[0]) if n else 0
    for prompt in prompts:
        answer, scored = next(answers), prompt.position_mask.nonzero()[:, 0]
        for every, values in zip(found, answer, strict=True):
            rows = values[scored - first]
            every[number[scored]] = rows if rows.ndim == 1 else torch.nn.functional.pad(
                rows, (0, topk - rows.shape[1]), value=LOG_ZERO if rows.is_floating_point() else 0
            )  # fmt: skip
    return found


# ── the policy worker ──


def teacher_tables(micro_batch: MicroBatch) -> list[TeacherTable]:
    """Of each teacher context, the scores of the N response tokens."""
    chosen = micro_batch.response[micro_batch.experience.action_mask.bool()]
    device, found = chosen.device, list[TeacherTable]()
    while (name := numbered(SAMPLED, len(found))) in micro_batch.data:
        k = len(found)
        values = [torch.cat(micro_batch.data[numbered(name, k)]).to(device)[chosen] for name in (IDS, LOG_PROBS)]
        sampled = torch.cat(micro_batch.data[name]).to(device)[chosen]
        found.append(TeacherTable(sampled, values[0].long(), values[1]))
    return found
