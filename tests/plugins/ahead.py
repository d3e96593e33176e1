"""A plugin for test_teacher_engines.py: of the samples that the teacher scores, how many were sent ahead."""

from sdpo_plugin import hookimpl


@hookimpl(tryfirst=True)
def openrlhf_rollout_batch(batch):
    batch.sent_ahead = len(batch.teacher_engines.begun)


@hookimpl
def openrlhf_after_training_step(batch):
    scored = {scores.sampled.numpy().tobytes() for scores in batch.engine_scores if scores.sampled.any()}
    batch.metrics["ahead/sent"], batch.metrics["ahead/scored"] = float(batch.sent_ahead), float(len(scored))
