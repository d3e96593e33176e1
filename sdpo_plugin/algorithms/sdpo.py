"""Self-Distillation Policy Optimization (arXiv 2601.20802): what a rollout's siblings and the environment reveal."""

from __future__ import annotations

from typing import Any

from sdpo_plugin.algorithms.base import SelfDistillation


class SDPO(SelfDistillation):
    """The teacher is shown a successful sibling, or the environment's feedback where there is none.

    Published are two configurations (github.com/lasgroup/SDPO, `experiments/`), both of 32 prompts x 8 samples:

    |  | generalisation (`generalization/`) | rich feedback on code (`rich_feedback/`) |
    | --- | --- | --- |
    | divergence | `alpha` 0.5, `topk` 100 | `alpha` 1, `topk` 20 |
    | EMA of the student | `update_rate` 0.05 | `update_rate` 0.01 |
    | updates per rollout | one | 32, of one prompt each |
    | learning rate | 1e-5 after 10 warm-up steps | 1e-6 |
    | feedback | not shown | shown |

    The option defaults in `config.py` are those of the first column, except that feedback is shown if there is any. The
    recipes are `recipes/sciknoweval`, `recipes/tooluse` and `recipes/livecodebench`. The authors' EMA moves once
    per rollout batch, ours every `--teacher.sync_steps` optimizer steps: 32 for the second.
    """

    name = "sdpo"
    # Neither a critic nor a reference model has any part in the loss. Rollouts are corrected in both configurations
    # (`rollout_is: token`, `rollout_is_threshold: 2.0`).
    defaults: dict[str, Any] = {"algo.advantage.estimator": "reinforce", "algo.kl.init_coef": 0.0}
