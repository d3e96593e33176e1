"""Which of OpenRLHF's options are supported with self-distillation, and what a loss needs of OpenRLHF."""

from __future__ import annotations

import logging
from typing import Any

from sdpo_plugin.config import ConfigError
from sdpo_plugin.distillation.prompts import PROBE
from sdpo_plugin.interface.rollout_batch import has_images

logger = logging.getLogger(__name__)


def policy_loss_needs_log_probs(args: Any) -> bool:
    """Whether a term that OpenRLHF adds to its policy loss backpropagates through the student's log-probabilities."""
    return args.algo.kl.use_loss or bool(args.actor.entropy_coef)


def reads_old_log_probs(args: Any, uses_policy_loss: bool) -> bool:
    """Whether anything needs log-probabilities from before the update that the student's own cannot stand in for."""
    samples = args.rollout.batch_size * args.rollout.n_samples_per_prompt
    several_updates = args.train.max_epochs > 1 or args.train.batch_size < samples
    of_whole_samples = args.algo.advantage.is_correction_level == "seq"
    return uses_policy_loss or args.algo.kl.init_coef > 0.0 or several_updates or of_whole_samples


def reject_unsupported(args: Any) -> None:
    """Raise ConfigError, before anything is loaded, for options that are not supported together."""
    if args.distill.generate_from_teacher and "{privileged_context}" not in args.reprompt.template:
        raise ConfigError(
            "--distill.generate_from_teacher True: before a response is generated, only the dataset can provide the "
            "context; add {privileged_context} to --reprompt.template, or use --algo sdft"
        )
    if args.distill.generate_from_teacher and args.algo.advantage.is_correction_level != "off":
        raise ConfigError(
            f"--algo.advantage.is_correction_level {args.algo.advantage.is_correction_level}: with "
            "--distill.generate_from_teacher the vLLM engines sample from another prompt than the student's, so the "
            "correction does not apply; give off"
        )
    _reject_images(args)
    if args.teacher.save and args.teacher.kind != "ema":
        raise ConfigError(
            f"--teacher.save True: a {args.teacher.kind} teacher has no weights of its own to save; leave it out, or "
            "use --teacher.kind ema"
        )
    if args.train.enable_ema and args.ds.lora.rank > 0:
        raise ConfigError(
            f"--train.enable_ema with --ds.lora.rank {args.ds.lora.rank}: OpenRLHF's EMA pairs weights by position, "
            "which is wrong with LoRA adapters; leave --train.enable_ema out (the EMA teacher is --teacher.kind ema)"
        )
    if args.ds.lora.rank > 0 and args.teacher.kind == "ema" and args.ds.zero_stage == 3 and args.ds.zpg > 1:
        # DeepSpeed renews ZeRO++'s second copies of weights that the optimizer trains, and the teacher's are not.
        raise ConfigError(
            f"--ds.zpg {args.ds.zpg}: with --ds.lora.rank and --ds.zero_stage 3 an ema teacher would stay as it began; "
            "give --ds.zpg 1, or --teacher.kind base"
        )
    if args.teacher.scored_by == "engine":
        _reject_with_engines(args)
    correction = args.algo.advantage
    if correction.is_correction_mode == "clip" and (
        correction.is_correction_level == "seq" or correction.is_correction_gating != "ratio"
    ):
        raise ConfigError(
            f"--algo.advantage.is_correction_level {correction.is_correction_level}, --algo.advantage."
            f"is_correction_gating {correction.is_correction_gating}: these need --algo.advantage.is_correction_mode "
            f"mask, but --algo {args.algo.name} clips by default; give --algo.advantage.is_correction_mode mask"
        )
    for flag, asked, fix in (
        ("--ds.tensor_parallel_size", args.ds.tensor_parallel_size > 1, "give --ds.tensor_parallel_size 1"),
        ("--ds.deepcompile", args.ds.deepcompile, "leave the flag out"),
    ):
        if asked:
            raise ConfigError(f"{flag} is not supported with --algo {args.algo.name} yet; {fix}")


def _reject_with_engines(args: Any) -> None:
    """What a teacher that vLLM engines score cannot do."""
    distill, teacher = args.distill, args.teacher
    if distill.mode == "full" or (distill.mode == "topk" and distill.support != "teacher"):
        flag = "mode full" if distill.mode == "full" else f"support {distill.support}"
        raise ConfigError(
            f"--distill.{flag}: with --teacher.scored_by engine only the teacher's own top-k tokens are known; give "
            "--distill.mode topk --distill.support teacher, or --teacher.scored_by worker"
        )
    if has_images(args):
        raise ConfigError(
            f"--data.max_images_per_prompt {args.data.max_images_per_prompt}: with --teacher.scored_by engine the "
            "teacher is sent token ids, without images; give --teacher.scored_by worker"
        )
    rollout_engines = teacher.kind == "live"
    if rollout_engines and not args.vllm.num_engines:
        raise ConfigError(
            f"--vllm.num_engines {args.vllm.num_engines}: --teacher.kind live is scored by the rollout's engines, and "
            "there are none; give --teacher.scored_by worker"
        )
    if args.rollout.temperature != 1.0 and (rollout_engines or teacher.url is not None):
        which = "the rollout's engines" if rollout_engines else "a server"
        raise ConfigError(
            f"--rollout.temperature {args.rollout.temperature}: vLLM scores at temperature 1 whatever is asked, and "
            f"{which} cannot be changed; give --rollout.temperature 1, or --teacher.scored_by worker"
        )
    wanted = args.reprompt.max_len + (args.rollout.max_new_tokens or 0)
    if rollout_engines and wanted >= args.data.max_len:
        logger.warning(
            f"--data.max_len {args.data.max_len}: the rollout's engines score prompts and responses up to it, so "
            f"teacher prompts are truncated there; give {wanted + 1} for prompts of --reprompt.max_len"
        )
    ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
    shared = args.train.colocate_all and not args.train.async_enable and not rollout_engines
    if shared and teacher.num_engines * teacher.tensor_parallel_size > ranks:
        raise ConfigError(
            f"--teacher.num_engines {teacher.num_engines}: with --train.colocate_all the engines share the policy's "
            f"{ranks} GPUs; give at most {ranks // teacher.tensor_parallel_size}"
        )
    if teacher.kind == "ema" and getattr(args.vllm, "sync_with_ray", False):
        raise ConfigError(
            "--vllm.sync_with_ray: the teacher's engines get the EMA's weights without it; leave it out"
        )


def _reject_images(args: Any) -> None:
    if args.reprompt.teacher_images is not None and (not has_images(args) or args.train.agent_func_path):
        raise ConfigError(
            f"--reprompt.teacher_images {args.reprompt.teacher_images}: needs --data.max_images_per_prompt, and no "
            "--train.agent_func_path, whose images would come before the teacher's"
        )
    if not has_images(args):
        return
    of_images = f"--data.max_images_per_prompt {args.data.max_images_per_prompt}"
    if not args.data.apply_chat_template:
        raise ConfigError(f"{of_images}: images are parts of a chat; give --data.apply_chat_template")
    if args.distill.generate_from_teacher:
        raise ConfigError(
            f"{of_images}: --distill.generate_from_teacher samples after a prompt of token ids alone, without images; "
            "leave it out"
        )


def require_same_tokenizer(student: str, teacher: str) -> None:
    """Raise ConfigError unless the tokenizers at both paths give the same tokens for the same texts."""
    from transformers import AutoTokenizer

    tokenizers = [AutoTokenizer.from_pretrained(path, trust_remote_code=True) for path in (student, teacher)]
    names = [{i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in tokenizers]
    differing = sorted(i for i in names[0].keys() | names[1].keys() if names[0].get(i) != names[1].get(i))
    split = [tokenizer(PROBE, add_special_tokens=False)["input_ids"] for tokenizer in tokenizers]
    if not differing and split[0] == split[1]:
        return
    found = (
        f"token {differing[0]} is {names[0].get(differing[0])!r} in the student and "
        f"{names[1].get(differing[0])!r} in the teacher" if differing
        else "their vocabularies are equal, but they split text differently"
    )  # fmt: skip
    raise ConfigError(
        f"--teacher.model_name_or_path {teacher}: another tokenizer than that of --actor.model_name_or_path {student} "
        f"({found}), so the teacher cannot score the student's tokens; give a model of the same family"
    )
