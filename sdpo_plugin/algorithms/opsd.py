"""On-Policy Self-Distillation (arXiv 2601.18734): a verified solution from the dataset."""

from __future__ import annotations

from typing import Any

from sdpo_plugin.algorithms.sdft import SDFT


class OPSD(SDFT):
    """The teacher is shown the row's verified solution.

    Forward KL over the whole vocabulary against the initial weights, each entry's contribution clipped: as published
    later in github.com/siyan-zhao/OPSD. The first version of the paper has the Jensen-Shannon divergence without a clip
    (`--distill.alpha 0.5 --distill.kl_clip none`).

    Published samples are also of the 20 likeliest tokens only (`top_k`), for which OpenRLHF 0.11.2 has no flag. With
    `top_p` the engine's log-probabilities are not of the distribution that the trainer scores, so there is no rollout
    correction by default, as there is none in the published code.
    """

    name = "opsd"
    uses_rollout_correction = False
    defaults: dict[str, Any] = SDFT.defaults | {
        "teacher.kind": "base",  # `fixed_teacher`
        "distill.kl_clip": 0.05,  # `jsd_token_clip`
        "distill.skip_tokens": 0,
        "rollout.temperature": 1.1,  # of the distributions that are compared, too
        "rollout.top_p": 0.95,
        "reprompt.template": "{prompt}\n\nHere is a reference solution:\n{privileged_context}\n\n"
        "After understanding the reference solution, solve the problem with your own reasoning.",
    }
