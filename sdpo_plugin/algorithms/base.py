"""`SelfDistillation`, the base class of every `--algo`: a paper's choices and the hooks that implement them.

Start with `choices.py` for the algorithm, then follow a batch through `controller_side.py` and `worker_side.py`.
"""

from __future__ import annotations

import logging
from typing import Any

from sdpo_plugin.algorithms import no_reward
from sdpo_plugin.algorithms.choices import Choices
from sdpo_plugin.algorithms.compatibility import reject_unsupported, require_same_tokenizer
from sdpo_plugin.algorithms.controller_side import ControllerSide
from sdpo_plugin.algorithms.worker_side import WorkerSide
from sdpo_plugin.config import ConfigError, is_server
from sdpo_plugin.distillation.chat_arguments import teacher_chat_template_kwargs
from sdpo_plugin.distillation.consensus import CONSENSUS
from sdpo_plugin.hookspecs import hookimpl

logger = logging.getLogger(__name__)

# Each token is weighted by min(policy before the update / vLLM engine, 2) (fengyao.notion.site/off-policy-rl): trainer
# and engine compute slightly different probabilities, and an asynchronous run samples from an older policy.
TRUNCATED_IMPORTANCE_SAMPLING: dict[str, Any] = {
    "algo.advantage.is_correction_level": "token",
    "algo.advantage.is_correction_mode": "clip",
    "algo.advantage.is_correction_threshold": [0.0, 2.0],
}


class SelfDistillation(ControllerSide, WorkerSide):
    """The common base of SDPO, SDFT and their variants; a variant overrides members of `Choices`.

    Each process of a run creates one instance from OpenRLHF's nested arguments and registers its hooks. With
    `--distill.weight 0` no instance is created, and OpenRLHF runs unchanged.
    """

    @classmethod
    def is_enabled(cls, args: Any) -> bool:
        return args.distill.weight > 0.0

    @classmethod
    def defaults_for(cls, args: Any) -> dict[str, Any]:
        """Defaults that depend on other arguments, by dotted flag name.

        The rollout correction is off at weight 0, where OpenRLHF's loss is unchanged, and with
        `generate_from_teacher`, where the engine's probabilities differ from the student's on purpose.
        """
        corrected = cls.uses_rollout_correction and cls.is_enabled(args) and not args.distill.generate_from_teacher
        found = dict(TRUNCATED_IMPORTANCE_SAMPLING) if corrected else {}
        if args.teacher.scored_by == "engine":
            found["distill.support"] = "teacher"
        if not cls.needs_reward or cls._is_label_free(args):
            reward = args.reward.remote_url or args.reward.model_name_or_path or args.train.agent_func_path
            found |= {} if reward else {"reward.remote_url": no_reward.PATH}
        return found

    @classmethod
    def _is_label_free(cls, args: Any) -> bool:
        """Whether a consensus of answers takes the place of the reward, and no policy loss needs one."""
        return args.reprompt.demonstration == CONSENSUS and cls.supports_hybrid_loss and args.distill.weight == 1.0

    @hookimpl
    def openrlhf_configure(self, args: Any) -> None:
        reject_unsupported(args)
        teacher_chat_template_kwargs(args)  # raises for what is no JSON object
        if self.recorder is not None and not args.logger.tensorboard_dir:
            fix = "samples are written to the directory of the event files; give --logger.tensorboard_dir"
            self.diagnostics.fail("log_samples", fix)
        if self.teacher_config.kind == "model":
            for source in self.teacher_config.sources("").values():
                if not is_server(source):
                    require_same_tokenizer(args.actor.model_name_or_path, source)
        if self.teacher_config.scored_by == "engine":
            self._require_tables_suffice()
        if not self.supports_hybrid_loss and self.distill.weight != 1.0:
            raise ConfigError(
                f"--distill.weight {self.distill.weight}: --algo {self.name} combines distillation and OpenRLHF's "
                "policy loss in its own way; give 1, or 0 for OpenRLHF alone"
            )
        if not self.uses_policy_loss and args.algo.kl.init_coef > 0.0 and not args.algo.kl.use_loss:
            logger.warning(
                f"--algo.kl.init_coef {args.algo.kl.init_coef}: a penalty on rewards, which has no effect with "
                "--distill.weight 1; give --algo.kl.use_loss to keep the student near the reference model, or 0"
            )

    def _require_tables_suffice(self) -> None:
        cls = type(self)
        if cls.reads_distributions or cls.token_loss is not Choices.token_loss:
            raise ConfigError(
                f"--teacher.scored_by engine: --algo {self.name} reads the teacher's whole distribution, and an engine "
                "returns its top-k tokens; give --teacher.scored_by worker"
            )
        if cls.make_teacher is not Choices.make_teacher:
            raise ConfigError(
                f"--teacher.scored_by engine: --algo {self.name} makes a teacher of its own on the policy workers; "
                "give --teacher.scored_by worker"
            )
