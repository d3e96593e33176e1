"""Self-distillation from what the data set knows: a demonstration (SDFT) or a verified solution (OPSD)."""

from __future__ import annotations

import os
from typing import Any

from sdpo_plugin import no_reward
from sdpo_plugin.config import ConfigError
from sdpo_plugin.host.hookspecs import hookimpl
from sdpo_plugin.plugin import SelfDistillation


class SDFT(SelfDistillation):
    """Self-Distillation Fine-Tuning (arXiv 2601.19897): the teacher is shown the row's demonstration.

    No reward is needed; without a reward function the host, which insists on one, is given zeros.
    """

    name = "sdft"
    defaults: dict[str, Any] = {
        "algo.advantage.estimator": "reinforce",
        "algo.kl.init_coef": 0.0,
        "teacher.kind": "base",
        "distill.alpha": 1.0,
        "reprompt.template": "{prompt}\n\nThis is an example for a response to the question:\n{privileged_context}\n\n"
        "Now answer with a response of your own, including the thinking process.",
    }

    @hookimpl
    def openrlhf_configure(self, args: Any) -> None:
        super().openrlhf_configure(args)
        if not (args.reward.remote_url or args.reward.model_name_or_path or args.train.agent_func_path):
            args.reward.remote_url = os.path.abspath(no_reward.__file__)

    @hookimpl
    def openrlhf_dataset(self, dataset: Any, evaluation: bool, args: Any) -> None:
        super().openrlhf_dataset(dataset, evaluation, args)
        if not evaluation and args.reprompt.privileged_key not in dataset.column_names:
            raise ConfigError(
                f"--reprompt.privileged_key {args.reprompt.privileged_key}: the data set has no such column; it has "
                f"{', '.join(dataset.column_names)}"
            )


class OPSD(SDFT):
    """On-Policy Self-Distillation (arXiv 2601.18734): the teacher is shown the verified solution.

    Jensen-Shannon divergence over the whole vocabulary, each entry's share clipped, against the initial weights.
    """

    name = "opsd"
    defaults: dict[str, Any] = SDFT.defaults | {
        "distill.mode": "full",
        "distill.alpha": 0.5,
        "distill.kl_clip": 0.05,
        "reprompt.template": "{prompt}\n\nHere is a reference solution:\n{privileged_context}\n\n"
        "After understanding the reference solution, solve the problem with your own reasoning.",
    }
