"""What the teacher saw, for people to read: a few samples of every rollout batch (`--diagnostics.log_samples`).

The controller chooses them and has their texts; the policy workers that train on them report the numbers of each token.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdpo_plugin.distillation.context import Rollout, joined
from sdpo_plugin.distillation.fused import linear_distillation
from sdpo_plugin.distillation.head import Head, TeacherStates
from sdpo_plugin.distillation.loss import TeacherTable, TokenBatch
from sdpo_plugin.distillation.prompts import rendered, text_tokenizer
from sdpo_plugin.interface.micro_batch import MicroBatch
from sdpo_plugin.interface.rollout_batch import RolloutBatch
from sdpo_plugin.interface.scoring import TeacherPrompt
from sdpo_plugin.monitoring.sample_file import SampleFile

RECORDED = "recorded_sample"  # the name of the report
ALTERNATIVES = 5
DIGITS = 4  # of a log-probability
logger = logging.getLogger(__name__)


# ── the controller ──


def chosen(rollouts: Sequence[Rollout], number: int) -> list[int]:
    """The indices of the samples to record: one of each prompt, then a second of each, until there are enough.

    Prompts come in the order of their hashes, so one that is recorded once is most likely recorded when it comes again.
    """
    of_prompt: dict[Any, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        of_prompt.setdefault(rollout.group, []).append(i)
    order = sorted(of_prompt.values(), key=lambda own: _hash(repr(rollouts[own[0]].messages)))
    turns = range(max(map(len, order), default=0))
    return [own[turn] for turn in turns for own in order if turn < len(own)][:number]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()


class Recorder:
    """Writes the samples of a run into `samples.jsonl`, in the directory of the run's event files."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.lines: list[dict[str, Any]] = []  # of the batch that is trained on

    def begin(self, step: int) -> None:
        """The run starts after global step `step`."""
        # As OpenRLHF's `TensorboardLogger`, so that one directory is one run.
        self.file = SampleFile(os.path.join(self.args.logger.tensorboard_dir, self.args.logger.wandb.run_name))
        self.file.begin(step)

    def choose(
        self,
        batch: RolloutBatch,
        rollouts: Sequence[Rollout],
        prompts: Sequence[TeacherPrompt | None],
        masks: Sequence[Tensor],
    ) -> None:
        """Choose samples of the batch, and request their tokens' numbers from the policy workers.

        Args:
            prompts: for each sample, the first teacher prompt of its first context; None: no teacher scores it.
            masks: bool [A_i], the tokens in the loss.
        """
        samples = chosen(rollouts, self.args.diagnostics.log_samples)
        self.lines = [self._line(batch, i, rollouts[i], prompts[i], masks[i]) for i in samples]
        batch.request(RECORDED, samples)

    def _line(
        self,
        batch: RolloutBatch,
        i: int,
        rollout: Rollout,
        prompt: TeacherPrompt | None,
        mask: Tensor,
    ) -> dict[str, Any]:
        def text(ids: Sequence[int]) -> str:
            return batch.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        actions = batch.response_mask(i).nonzero()[:, 0]
        ids = batch.samples[i].sequences[0][actions + 1].tolist()
        said = [None if own is None else str(own) for own in (rollout.feedback, *rollout.turn_feedback)]
        return {
            "step": batch.step,
            "sample": i,
            "prompt": rollout.messages if isinstance(rollout.messages, list) else rendered(rollout.messages, None),
            "response": text(batch.response_ids(i)),
            "reward": None if rollout.reward is None or not math.isfinite(rollout.reward) else rollout.reward,
            "feedback": joined(said) or None,
            "active": prompt is not None,
            "truncated": bool(batch.samples[i].truncated),
            "teacher_prompt": None if prompt is None else text(prompt.ids),
            "truncated_at": {} if prompt is None else {
                name: [len(text(prompt.ids[:offset])) for offset in offsets]
                for name, offsets in prompt.truncated_at.items()
            },
            "tokens": token_texts(ids, batch.tokenizer),
            "token_ids": ids,
            "in_loss": mask[actions].tolist(),
            "student": [],
            "teacher": [],
            "alternatives": [],
        }

    def write(self, batch: RolloutBatch) -> None:
        """Add the lines of the samples that were chosen from the batch, which was trained on."""
        for line in self.lines:
            line |= _numbers(batch.reports[RECORDED].get(line["sample"], {}), batch.tokenizer)
        try:
            self.file.append(self.lines)
        except OSError as error:
            logger.warning(
                f"--diagnostics.log_samples {self.args.diagnostics.log_samples}: the samples of step {batch.step} are "
                f"not recorded, {self.file.path} cannot be written to ({error.strerror}); the run continues"
            )
        self.lines = []


def _numbers(stats: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """What `report_token_stats` found, in the form of a line."""
    both = [name for name in ("student", "teacher") if name in stats]
    found: dict[str, Any] = {name: [_rounded(x) for x in stats[name]] for name in both}
    if "ids" in stats:
        found["alternatives"] = [
            [[piece, _rounded(x)] for piece, x in zip(token_texts(ids, tokenizer), log_probs, strict=True)]
            for ids, log_probs in zip(stats["ids"], stats["log_probs"], strict=True)
        ]
    return found


def _rounded(log_prob: float | None) -> float | None:
    """JSON has no infinity and no nan."""
    return round(log_prob, DIGITS) if log_prob is not None and math.isfinite(log_prob) else None


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token alone; a part of a character is U+FFFD."""
    tokenizer = text_tokenizer(tokenizer)
    texts = [tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False) for i in ids]
    # SentencePiece marks a word's first token, and its decoders strip the space at the start of a text.
    names = tokenizer.convert_ids_to_tokens(list(ids))
    marked = [name is not None and name.startswith("\u2581") for name in names]
    return [" " + text if m and not text.startswith(" ") else text for text, m in zip(texts, marked, strict=True)]


# ── the policy worker ──


def report_token_stats(
    micro_batch: MicroBatch, student: Tensor, teacher: TeacherStates | TeacherTable, token_ids: Tensor,
    active: Tensor, temperature: float,
) -> None:
    """Report the numbers of the samples that the controller requested, each once in a rollout batch.

    Where the student skips a sample, its log-probabilities are those of the rollout, if there are any.

    Args:
        student: [N], the student's log-probabilities of the N response tokens `token_ids` (int64 [N]).
        teacher: its hidden states at these tokens and its head, or its table.
        active: bool [N], whether the teacher scored them.
    """
    rows = micro_batch.requested_rows(RECORDED)
    if not rows:
        return
    batch = micro_batch.experience
    row_of = micro_batch.to_response_tokens(torch.arange(len(batch.sequences)))
    wanted = active & torch.isin(row_of, torch.tensor(rows, device=row_of.device))
    if isinstance(teacher, TeacherTable):
        local = (teacher.sampled[wanted], *(x[wanted, :ALTERNATIVES] for x in (teacher.ids, teacher.log_probs)))
    else:
        local = likeliest(teacher.hidden[wanted], teacher.head, token_ids[wanted], temperature)
    spread = [x.new_zeros(len(wanted), *x.shape[1:]) for x in local]
    for every, x in zip(spread, local, strict=True):
        every[wanted] = x
    row_of, student, wanted, *spread = (micro_batch.of_ring(x) for x in (row_of, student, wanted, *spread))
    found = [x[wanted].tolist() for x in spread]
    places = wanted.cumsum(0) - 1  # in what was found
    for row in rows:
        own = (row_of == row).nonzero()[:, 0].tolist()
        stats: dict[str, Any] = {}
        if own:
            stats["student"] = student[own].tolist()
        elif batch.rollout_log_probs is not None:
            stats["student"] = batch.rollout_log_probs[row][batch.action_mask[row].bool()].tolist()
        if wanted[own].any():
            scored = wanted[own].tolist()
            at = [place if its else None for place, its in zip(places[own].tolist(), scored, strict=True)]
            nothing: Any
            for name, values, nothing in zip(("teacher", "ids", "log_probs"), found, (None, [], []), strict=True):
                stats[name] = [nothing if place is None else values[place] for place in at]
        micro_batch.report(RECORDED, row, stats)


@torch.no_grad()
def likeliest(hidden: Tensor, head: Head, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of hidden states [n, H] the log-probabilities of `token_ids` [n], and the likeliest tokens: ids and
    log-probabilities, [n, `ALTERNATIVES`] each (fewer in a smaller vocabulary).
    """
    k = min(ALTERNATIVES, len(head.effective(temperature).weight))
    ids = torch.zeros(len(hidden), k, dtype=torch.long, device=hidden.device)
    log_probs = torch.zeros(len(hidden), k, device=hidden.device)

    def collect(tokens: TokenBatch) -> Tensor:
        values, ids[tokens.rows] = tokens.student.topk(k)
        log_probs[tokens.rows] = values.to(log_probs.dtype)
        return tokens.log_probs

    every = torch.ones(len(hidden), device=hidden.device)
    scores = linear_distillation(hidden, head, [], token_ids, every, collect, temperature=temperature)
    return scores.log_probs, ids, log_probs
