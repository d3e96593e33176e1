"""Self-Distillation Policy Optimization (arXiv 2601.20802): what a rollout's siblings and the environment reveal."""

from __future__ import annotations

from typing import Any

from sdpo_plugin.plugin import SelfDistillation


class SDPO(SelfDistillation):
    """The teacher is shown a successful sibling, or the environment's feedback where there is none.

    The option defaults in `config.py` are this algorithm's published settings.
    """

    name = "sdpo"
    # Neither a critic nor a reference model has any part in the loss.
    defaults: dict[str, Any] = {"algo.advantage.estimator": "reinforce", "algo.kl.init_coef": 0.0}
