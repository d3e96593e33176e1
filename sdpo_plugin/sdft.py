"""Self-distillation from what the data set knows: a demonstration (SDFT) or a verified solution (OPSD)."""

from __future__ import annotations

from typing import Any

from sdpo_plugin import no_reward
from sdpo_plugin.algorithm import SelfDistillation
from sdpo_plugin.config import ConfigError
from sdpo_plugin.hookspecs import hookimpl


class SDFT(SelfDistillation):
    """Self-Distillation Fine-Tuning (arXiv 2601.19897): the teacher is shown the row's demonstration.

    No reward is needed; without a reward function OpenRLHF, which insists on one, is given zeros.

    The defaults are those of the published code (github.com/idanshen/Self-Distillation, `main.py`, `distil_config.py`).
    The paper writes the reverse KL, but its results are of the forward KL, its author says (issue 5 there). Published,
    but left to you, are one sample per prompt (`--rollout.n_samples_per_prompt 1`) and 32 prompts per update at
    learning rate 2e-5. Rollouts are corrected with the cap 2 (`vllm_importance_sampling_correction`), but each token by
    its own factor, as OpenRLHF does it, where theirs gives a response one, the mean of its tokens'.
    """

    name = "sdft"
    defaults: dict[str, Any] = {
        "algo.advantage.estimator": "reinforce",
        "algo.kl.init_coef": 0.0,
        "teacher.kind": "ema",
        "teacher.update_rate": 0.01,  # `ref_model_mixup_alpha`
        "distill.mode": "full",
        "distill.alpha": 0.0,  # KL(teacher||student)
        "distill.skip_tokens": 3,  # `num_loss_tokens_to_skip`
        "reprompt.template": "{prompt}\n\nThis is an example for a response to the question:\n{privileged_context}\n\n"
        "Now answer with a response of your own, including the thinking process.",
    }

    @classmethod
    def defaults_for(cls, args: Any) -> dict[str, Any]:
        rewarded = args.reward.remote_url or args.reward.model_name_or_path or args.train.agent_func_path
        return super().defaults_for(args) | ({} if rewarded else {"reward.remote_url": no_reward.PATH})

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

    Forward KL over the whole vocabulary, each entry's share clipped, against the initial weights: as published later in
    github.com/siyan-zhao/OPSD. The first version of the paper has the Jensen-Shannon divergence without a clip
    (`--distill.alpha 0.5 --distill.kl_clip none`).

    Published samples are also of the 20 likeliest tokens only (`top_k`), for which OpenRLHF 0.11.2 has no flag. With
    `top_p` the engine's log-probabilities are not of the distribution that the trainer scores, so there is no rollout
    correction by default, as there is none in the published code.
    """

    name = "opsd"
    corrects_rollouts = False
    defaults: dict[str, Any] = SDFT.defaults | {
        "teacher.kind": "base",  # `fixed_teacher`
        "distill.kl_clip": 0.05,  # `jsd_token_clip`
        "distill.skip_tokens": 0,
        "rollout.temperature": 1.1,  # of the distributions that are compared, too
        "rollout.top_p": 0.95,
        "reprompt.template": "{prompt}\n\nHere is a reference solution:\n{privileged_context}\n\n"
        "After understanding the reference solution, solve the problem with your own reasoning.",
    }
