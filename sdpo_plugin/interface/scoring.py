"""What each teacher scores: planned on the controller, sent along with the samples, carried out on the policy worker.

B samples, S tokens of a sequence, A = S - 1 action positions: those that predict a token, aligned from the right.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from sdpo_plugin.distillation.teacher_prompt import TruncationOffsets
from sdpo_plugin.interface.micro_batch import MicroBatch
from sdpo_plugin.interface.models import Images
from sdpo_plugin.interface.rollout_batch import RolloutBatch

TEACHER_IMAGE = "teacher_image/"  # begins the names of what the processor made of them


def numbered(name: str, k: int) -> str:
    """The name for teacher context k, from 0: the first has no number."""
    return f"{name}/{k}" if k else name


class TeacherPrompt(NamedTuple):
    """A teacher's prompt for one sample, and the response tokens that it scores after it.

    Attributes:
        ids: the prompt's token ids.
        truncated_at: where they lack a part of a section.
        position_mask: bool [A_i], the action positions that predict these tokens.
    """

    ids: list[int]
    truncated_at: TruncationOffsets
    position_mask: torch.Tensor


def attach_scoring_requests(
    batch: RolloutBatch, k: int, prompts: Sequence[Sequence[TeacherPrompt]], by_turn: bool
) -> None:
    """Send along, with each sample, the prompts of teacher context k and what is scored after each.

    `teacher_prompt` holds a sample's prompts, one after the other (int64 [P_i]). Where turns are scored separately,
    `teacher_spans` says where in it the prompt of each action position begins and ends (int64 [A_i, 2]; 0, 0: none).
    """
    tensors = {id(prompt.ids): torch.from_numpy(np.array(prompt.ids)) for own in prompts for prompt in own}
    nothing = torch.zeros(0, dtype=torch.long)
    ids = [torch.cat([nothing, *(tensors[id(prompt.ids)] for prompt in own)]) for own in prompts]
    batch.attach(numbered("teacher_prompt", k), ids)
    if not by_turn:
        return
    every_span = []
    for i, own in enumerate(prompts):
        spans, begin = torch.zeros(len(batch.response_mask(i)), 2, dtype=torch.long), 0
        for prompt in own:
            spans[prompt.position_mask] = torch.tensor([begin, begin := begin + len(prompt.ids)])
        every_span.append(spans)
    batch.attach(numbered("teacher_spans", k), every_span)


def attach_teacher_images(batch: RolloutBatch, inputs: Sequence[Mapping[str, torch.Tensor] | None]) -> None:
    """Send along, with each sample, what the processor made of the images that only its teacher sees."""
    for name in sorted({name for own in inputs for name in own or ()}):
        batch.attach(TEACHER_IMAGE + name, [torch.zeros(0) if own is None else own[name] for own in inputs])


def teacher_images(micro_batch: MicroBatch) -> Images | None:
    """Of each sample: its own images, then those that only its teacher sees; None if no sample has any."""
    added = {name.removeprefix(TEACHER_IMAGE): v for name, v in micro_batch.data.items() if TEACHER_IMAGE in name}
    if not added:
        return micro_batch.images
    found: list[Mapping[str, torch.Tensor] | None] = []
    for i, own in enumerate(micro_batch.images or [None] * len(micro_batch.experience.sequences)):
        own = own or {}
        more = {name: values[i] for name, values in added.items() if values[i].numel()}
        both = {name: [inputs[name].cpu() for inputs in (own, more) if name in inputs] for name in {**own, **more}}
        found.append({name: torch.cat(values) for name, values in both.items()} or None)
    return found


class ScoringRequest(NamedTuple):
    """One row of a teacher's forward pass: a sample of the micro-batch, rewritten.

    Attributes:
        sample: the number of its row.
        prompt_ids: int64 [P], in place of the sample's own prompt.
        position_mask: bool [A], the action positions that are scored; at least one.
    """

    sample: int
    prompt_ids: torch.Tensor
    position_mask: torch.Tensor


def scoring_requests(micro_batch: MicroBatch) -> list[list[ScoringRequest]]:
    """For each teacher context, what `attach_scoring_requests` sent along."""
    action_mask = micro_batch.experience.action_mask.bool()
    found: list[list[ScoringRequest]] = []
    names = (numbered("teacher_prompt", k) for k in itertools.count())
    for k, name in enumerate(itertools.takewhile(micro_batch.data.__contains__, names)):
        found.append(requests := [])
        spans = micro_batch.data.get(numbered("teacher_spans", k))
        for i, prompts in enumerate(micro_batch.data[name]):
            if spans is None:
                requests += [ScoringRequest(i, prompts, action_mask[i])] if len(prompts) else []
                continue
            for begin, end in spans[i].unique(dim=0).tolist():
                if end:
                    mask = torch.zeros_like(action_mask[i])
                    mask[: len(spans[i])] = spans[i][:, 1] == end
                    requests.append(ScoringRequest(i, prompts[begin:end], mask))
    return found


def teacher_inputs(
    sequences: torch.Tensor,
    action_mask: torch.Tensor,
    requests: Sequence[ScoringRequest],
    lengths: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """The teacher's input, a row for each request, up to the last token that it scores.

    Everything after the student's prompt is replayed unchanged, so response tokens keep their order and number.
    Without any request there is a stand-in: other ranks may wait for this one (ZeRO-3).

    Args:
        sequences: [B, S], right-padded. action_mask: [B, A].
        lengths: of the sequences, if they have images: all tokens of an image must be there. None: without images.

    Returns:
        sequences, attention_mask [R, S'], rows bool [R, S'] of the N' positions that predict tokens to score, and
        the sample and action position of each, int64 [N'] and [N'].
    """
    if not requests:
        stand_in, none = sequences[:1, : 2 if lengths is None else lengths[0]], sequences.new_zeros(0)
        return stand_in, torch.ones_like(stand_in), torch.zeros_like(stand_in, dtype=torch.bool), (none, none)
    replayed, predicting, samples, positions = [], [], [], []
    # Places and lengths are found on the CPU: two waits for the device, rather than some for each request.
    action, masks = action_mask.cpu(), torch.stack([request.position_mask for request in requests]).cpu()
    for (i, prompt_ids, _), position_mask in zip(requests, masks, strict=True):
        first = int(action[i].nonzero()[0]) + 1  # action position p predicts token p + 1
        scored = position_mask.nonzero()[:, 0]
        end = int(scored[-1]) + 2 if lengths is None else lengths[i]
        replayed.append(torch.cat([prompt_ids, sequences[i, first:end]]))
        predicting.append(scored - first + len(prompt_ids))
        samples.append(torch.full_like(scored, i))
        positions.append(scored)
    pad = torch.nn.utils.rnn.pad_sequence
    batch = pad(replayed, batch_first=True)
    mask = pad([torch.ones_like(r) for r in replayed], batch_first=True)
    rows = torch.zeros(batch.shape, dtype=torch.bool, device="cpu")
    for row, at in zip(rows, predicting, strict=True):
        row[at] = True
    device = batch.device
    return batch, mask, rows.to(device), (torch.cat(samples).to(device), torch.cat(positions).to(device))
