"""The images of the teacher's prompts, on the controller: the student's, and those that only the teacher sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sdpo_plugin.config import ConfigError
from sdpo_plugin.distillation.context import Rollout, TeacherContext
from sdpo_plugin.distillation.images import image_parts, processed, references, with_added_images
from sdpo_plugin.interface.rollout_batch import RolloutBatch
from sdpo_plugin.interface.scoring import attach_teacher_images


def add_teacher_images(
    batch: RolloutBatch, rollouts: Sequence[Rollout], contexts: list[list[TeacherContext]], column: str
) -> None:
    """Show the images of the row's `column` in every context, and alone to a sample that has no context.

    The processor's outputs go to the policy workers with the samples. Replaces entries of `contexts`.
    """
    made: dict[str, tuple[Mapping[str, torch.Tensor], list[str]]] = {}  # siblings have the same
    found: list[Mapping[str, torch.Tensor] | None] = []
    for i, rollout in enumerate(rollouts):
        given = references(batch.samples[i].record.get(column))
        if not given or rollout.response is None or not isinstance(rollout.messages, list):
            found.append(None)
            continue
        key = repr(given)
        if key not in made:
            made[key] = processed(given, batch.processor)
        inputs, runs = made[key]
        prompt = with_added_images(rollout.messages, runs, batch.processor)
        for k, shown in enumerate(contexts):
            if shown[i].active or k == 0:
                shown[i] = TeacherContext(prompt, True, shown[i].sections, prompt)
        found.append(inputs)
    attach_teacher_images(batch, found)


def require_image_tokens(batch: RolloutBatch, i: int, context: TeacherContext, ids: Sequence[int]) -> None:
    """Raise ConfigError unless the teacher's prompt `ids` has as many image tokens as its images."""
    runs = [part["run"] for part in image_parts(context.prompt) if "run" in part]
    if not runs or not ids:
        return
    images = batch.tokenizer("".join(runs), add_special_tokens=False)["input_ids"]
    found, expected = batch.image_tokens(ids), batch.image_tokens(images)
    if found != expected:
        raise ConfigError(
            f"sample {i}: the teacher's prompt has {found} image tokens and its images have {expected}; "
            f"{type(batch.processor).__name__} is not supported"
        )
