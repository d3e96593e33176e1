"""Self-Distillation Fine-Tuning (arXiv 2601.19897): a demonstration from the dataset."""

from __future__ import annotations

from typing import Any

from sdpo_plugin.algorithms.base import SelfDistillation
from sdpo_plugin.config import ConfigError
from sdpo_plugin.hookspecs import hookimpl


class SDFT(SelfDistillation):
    """The teacher is shown the row's demonstration.

    No reward is needed; without a reward function OpenRLHF, which insists on one, is given zeros.

    The defaults are those of the published code (github.com/idanshen/Self-Distillation, `main.py`, `distil_config.py`).
    The paper writes the reverse KL, but its results are of the forward KL, its author says (issue 5 there). Published,
    but left to you, are one sample per prompt (`--rollout.n_samples_per_prompt 1`) and 32 prompts per update at
    learning rate 2e-5. Rollouts are corrected with the cap 2 (`vllm_importance_sampling_correction`), but each token by
    its own factor, as OpenRLHF does it, where theirs gives a response one, the mean of its tokens'.
    """

    name = "sdft"
    needs_reward = False
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

    @hookimpl
    def openrlhf_dataset(self, dataset: Any, evaluation: bool, args: Any) -> None:
        super().openrlhf_dataset(dataset, evaluation, args)
        if not evaluation and args.reprompt.privileged_key not in dataset.column_names:
            raise ConfigError(
                f"--reprompt.privileged_key {args.reprompt.privileged_key}: the dataset has no such column; it has "
                f"{', '.join(dataset.column_names)}"
            )
