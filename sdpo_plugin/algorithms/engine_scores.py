"""Teachers that vLLM engines score (`--teacher.scored_by engine`): requests on the controller, tables on the workers.

An engine returns log-probabilities of a text's own tokens and of its top-k tokens there (vLLM's `prompt_logprobs`),
never of tokens that the student chooses: the divergence is over the teacher's top-k.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from sdpo_plugin.config import DistillConfig
from sdpo_plugin.distillation.loss import LOG_ZERO, TeacherTable
from sdpo_plugin.interface.micro_batch import MicroBatch
from sdpo_plugin.interface.rollout_batch import RolloutBatch, Scores, ToScore
from sdpo_plugin.interface.scoring import TeacherPrompt, numbered

SAMPLED, IDS, LOG_PROBS = "teacher_sampled", "teacher_ids", "teacher_log_probs"
TIMING = "timing/teacher_score"


# ── the controller ──


def scored_topk(config: DistillConfig) -> int:
    """How many of the teacher's likeliest tokens the loss needs."""
    return config.topk if config.mode == "topk" and config.topk is not None else 1


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
    assert engines is not None  # `compatibility.reject_unsupported`
    planned = [(i, prompt) for shown in prompts for i, own in enumerate(shown) for prompt in own]
    answers = iter(engines.score([to_score(batch, i, prompt) for i, prompt in planned], topk))
    found = [[_of_sample(batch, i, own, answers, topk) for i, own in enumerate(shown)] for shown in prompts]
    for k, scores in enumerate(found):
        for name, field in ((SAMPLED, "sampled"), (IDS, "ids"), (LOG_PROBS, "log_probs")):
            batch.attach(numbered(name, k), [getattr(own, field) for own in scores])
    batch.metrics[TIMING] = time.monotonic() - began
    return found


def to_score(batch: RolloutBatch, i: int, prompt: TeacherPrompt) -> ToScore:
    """Sample i after a teacher's prompt, up to the last token that is scored."""
    last = int(prompt.position_mask.nonzero()[-1] - batch.response_mask(i).nonzero()[0]) + 1
    return ToScore([*prompt.ids, *batch.response_ids(i)[:last]], len(prompt.ids))


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
