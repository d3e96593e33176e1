"""Self-Distilled Policy Gradient (arXiv 2606.04036): verifier advantages, self-distillation and a reference KL.

Read: the abstract, the project page, notes of the rest, and the code (github.com/lauyikfung/SDPG: `core_algos.py`,
and the script `run_qwen3_4b_sdpg_boxed.sh`).

    L = l_clip(A) + beta 1[A > 0] KL(S || T) + alpha / 2 (log S(y_t) - log S_ref(y_t))^2   (5)

A is the group-relative advantage with normalized standard deviation, T the student itself
conditioned on the context, without a gradient, and the KL is over the whole vocabulary. The published values are
beta = alpha = 0.001. Only responses with a
positive advantage are distilled, the opposite of SRPO; the script leaves that gate open (`--no-sdpg.positive_only`).
The last term is OpenRLHF's own, `--algo.kl.use_loss` with the estimator k2 (there: mode `urkl`).

Interpretation: there the context is the row's answer («The correct answer to this problem is: ...»), which is a
column here, {privileged_context} in `--reprompt.template`; what SDPO shows is the default. The paper lets beta rise
for 50 steps and fall for the last 350, the script does not, and nor does this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sdpo_plugin.algorithms.sdpo import SDPO
from sdpo_plugin.config import OptionGroup, option
from sdpo_plugin.interface.micro_batch import MicroBatch


@dataclass(frozen=True)
class SdpgConfig(OptionGroup):
    """How much Self-Distilled Policy Gradient (`--algo sdpg`) distils."""

    prefix = "sdpg"

    beta: float = option(0.001, "weight of the distillation beside OpenRLHF's policy loss")
    positive_only: bool = option(True, "distil only responses with a positive advantage")

    def check(self) -> None:
        self.positive("beta")


class SDPG(SDPO):
    """OpenRLHF's policy loss and KL to the reference model, plus the reverse KL to the self-teacher."""

    name = "sdpg"
    options = (SdpgConfig,)
    defaults: dict[str, Any] = SDPO.defaults | {
        "algo.advantage.estimator": "group_norm", "algo.kl.use_loss": True, "algo.kl.init_coef": 0.001,
        "algo.kl.estimator": "k2", "teacher.kind": "live", "distill.mode": "full", "distill.alpha": 1.0,
    }  # fmt: skip
    uses_policy_loss, supports_hybrid_loss = True, False
    sdpg: SdpgConfig

    def loss_coefficients(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        batch = micro_batch.experience
        ones = torch.ones(len(batch.sequences), device=batch.sequences.device)
        positive = (batch.advantages * batch.action_mask).sum(dim=1) > 0
        return ones, self.sdpg.beta * (positive.float() if self.sdpg.positive_only else ones)
