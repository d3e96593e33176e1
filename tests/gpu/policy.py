"""The policy worker at ZeRO 1 to 3: two optimizer steps on made-up rollouts, the average against float64, what sleeps
and what waits in host memory, and its memory beside the doctor's estimate. One rank; no engine, Ray or vLLM.

Needs OpenRLHF and DeepSpeed to be installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import CUDA, MIB, milliseconds, reserved_mib, row, tell
from stand_ins import FLASH_ATTENTION, stand_in

stand_in()
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from sdpo_plugin import plugins  # noqa: E402
from sdpo_plugin.interface.rollout_batch import RolloutBatch  # noqa: E402
from sdpo_plugin.openrlhf_adapter.launcher import launch, memory  # noqa: E402
from sdpo_plugin.openrlhf_adapter.platform import cpu  # noqa: E402
from sdpo_plugin.testing import selfcheck  # noqa: E402
from sdpo_plugin.testing.models import tiny_model  # noqa: E402

PROMPTS, SAMPLES = 4, 2  # of a prompt
LENGTH = 1024 if CUDA else 96  # tokens of a sample, at most
CASES: dict[str, tuple[str, ...]] = {
    "ZeRO-1, ema": ("--ds.zero_stage=1",),
    "ZeRO-2, ema": ("--ds.zero_stage=2",),
    "ZeRO-3, ema": ("--ds.zero_stage=3",),
    "ZeRO-2, ema, sleep": ("--ds.zero_stage=2", "--ds.enable_sleep"),
    "ZeRO-3, ema, sleep": ("--ds.zero_stage=3", "--ds.enable_sleep"),
    "ZeRO-2, ema, teacher offloaded": ("--ds.zero_stage=2", "--teacher.offload"),
    "ZeRO-3, ema, teacher offloaded": ("--ds.zero_stage=3", "--teacher.offload"),
    "ZeRO-2, ema, Adam offloaded": ("--ds.zero_stage=2", "--ds.adam_offload"),
    "ZeRO-2, ema, checkpointing": ("--ds.zero_stage=2", "--actor.gradient_checkpointing_enable"),
    "ZeRO-2, ema, dynamic batches": (
        "--ds.zero_stage=2", "--train.dynamic_batch_enable", f"--train.max_tokens_per_gpu={4 * LENGTH}"
    ),
    "ZeRO-2, base, beside the policy loss": ("--ds.zero_stage=2", "--teacher.kind=base", "--distill.weight=0.5"),
    "ZeRO-2, live": ("--ds.zero_stage=2", "--teacher.kind=live"),
    "ZeRO-2, trust_region": ("--ds.zero_stage=2", "--teacher.kind=trust_region"),
    "ZeRO-2, ema, LoRA": ("--ds.zero_stage=2", "--ds.lora.rank=16", "--ds.lora.target_modules", "q_proj", "down_proj"),
    "ZeRO-3, ema, LoRA": ("--ds.zero_stage=3", "--ds.lora.rank=16", "--ds.lora.target_modules", "q_proj", "down_proj"),
}  # fmt: skip
LARGER = {
    "vocab_size": 32_768, "hidden_size": 512, "initializer_range": 0.1, "num_attention_heads": 8,
    "num_key_value_heads": 8, "intermediate_size": 2048, "num_hidden_layers": 6,
    "max_position_embeddings": 2 * LENGTH,
}  # fmt: skip
FEW = ("ZeRO-3, ema, sleep",)


class Launched(Exception):  # noqa: N818
    """Ends OpenRLHF's launcher where it has its arguments."""


def arguments(directory: Path, model: Path, *flags: str) -> Any:
    """OpenRLHF's nested arguments, as its launcher hands them to its strategy."""
    import openrlhf.utils
    (directory / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {i}", "label": str(i)}) + "\n" for i in range(PROMPTS))
    )
    (directory / "reward.py").touch()
    batch = PROMPTS * SAMPLES
    given = [
        f"--actor.model_name_or_path={model}", "--actor.num_gpus_per_node=1", "--ref.num_gpus_per_node=1",
        "--vllm.num_engines=1", "--vllm.sync_backend=gloo", "--ds.attn_implementation=sdpa",
        f"--reward.remote_url={directory}/reward.py", f"--data.prompt_dataset={directory}/rows.jsonl",
        "--data.input_key=prompt", "--data.label_key=label", "--data.apply_chat_template",
        f"--data.max_len={LENGTH}", f"--rollout.max_new_tokens={LENGTH - 16}", f"--rollout.batch_size={PROMPTS}",
        f"--rollout.n_samples_per_prompt={SAMPLES}", f"--train.batch_size={batch}",
        f"--train.micro_batch_size={batch // 2}", "--algo.advantage.estimator=group_norm", "--algo.kl.init_coef=0",
        "--actor.adam.lr=1e-4", "--actor.lr_scheduler=constant", "--actor.lr_warmup_ratio=0", "--algo=sdpo",
        f"--ckpt.output_dir={directory}/out", f"--ckpt.path={directory}/ckpt",
        "--plugins", "sdpo_plugin.plugin", "sdpo_plugin.testing", "sdpo_plugin.testing.selfcheck", *flags,
    ]  # fmt: skip

    def end(args: Any) -> None:
        raise Launched(args)

    get_strategy, openrlhf.utils.get_strategy = openrlhf.utils.get_strategy, end
    try:
        launch._launch(given, not CUDA, lambda *_: None)
    except Launched as launched:
        (args,) = launched.args
    finally:
        openrlhf.utils.get_strategy = get_strategy
    args.local_rank = 0
    if not (CUDA and FLASH_ATTENTION):
        args.ds.attn_implementation = "sdpa"  # packed samples are told apart by their position ids
    return args


def rollouts(args: Any, tokenizer: Any, seed: int) -> Any:
    """A rewarded batch of made-up responses, after the algorithm has seen it: what a policy worker trains on."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    g = torch.Generator().manual_seed(seed)
    samples: list[Any] = []
    for i in range(PROMPTS * SAMPLES):
        chat = [{"role": "user", "content": f"say {i // SAMPLES}"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        length = LENGTH - len(prompt)
        ids = torch.cat([torch.tensor(prompt), torch.randint(10, 90, (length,), generator=g)])[None]
        action = torch.zeros(1, ids.shape[1] - 1, dtype=torch.bool)
        action[:, len(prompt) - 1 :] = True
        sample = Experience(
            sequences=ids, attention_mask=torch.ones_like(ids), action_mask=action, index=[i], prompts=[text],
            rollout_log_probs=-4.6 * action.float(), rewards=torch.tensor([float(i % SAMPLES == 0)]),
            truncated=torch.tensor([False]), info={},
        )  # fmt: skip
        extra: Any = sample
        extra.record, extra.feedback, extra.turns, extra.skipped = {"prompt": chat}, None, [], None
        samples.append(sample)

    def padded(name: str) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([getattr(s, name)[0] for s in samples], batch_first=True)

    experience = Experience(
        **{n: padded(n) for n in ("sequences", "attention_mask", "action_mask", "rollout_log_probs")},
        action_log_probs=padded("rollout_log_probs"), advantages=padded("action_mask").float(),
        returns=padded("action_mask").float(), rewards=torch.cat([s.rewards for s in samples]),
        scores=torch.cat([s.rewards for s in samples]), truncated=torch.cat([s.truncated for s in samples]),
        response_length=padded("action_mask").sum(1).float(), total_length=padded("attention_mask").sum(1).float(),
        index=list(range(len(samples))), prompts=["?"] * len(samples), labels=["?"] * len(samples), info={},
    )  # fmt: skip
    batch = RolloutBatch(samples, [experience], args, tokenizer, 2 * LENGTH, seed)
    plugins.active().hook.openrlhf_rollout_batch(batch=batch)
    return experience


class Run:
    """A policy worker in this process."""

    def __init__(self, directory: Path, model: Path, *flags: str) -> None:
        from openrlhf.utils import get_strategy

        from sdpo_plugin.openrlhf_adapter.worker.worker import PolicyWorker

        directory.mkdir()
        self.args = args = arguments(directory, model, *flags)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        strategy = get_strategy(args)
        strategy.print = lambda *_: None
        self.worker = PolicyWorker(1, 0, "127.0.0.1", None)
        self.worker.init_model_from_pretrained(strategy, str(model), 10)

    def step(self, seed: int) -> dict[str, float]:
        """As OpenRLHF's controller has a worker train."""
        self.worker.append(rollouts(self.args, self.tokenizer, seed))
        if self.args.ds.enable_sleep:
            self.worker.reload_states()
        status = self.worker.fit(0.0)
        if self.args.ds.enable_sleep:
            self.worker.offload_states()
        return status

    def average_error(self) -> float | None:
        """Of the teacher's average from one in float64, relative to how far that one has moved."""
        teacher = plugins.algorithm().teacher
        if not hasattr(self.worker, "selfcheck"):
            return None
        found: dict[str, list[torch.Tensor]] = {}
        for name, values in teacher.weights():
            found.setdefault(name, []).append(values.cpu())
        true, start = self.worker.selfcheck, self.worker.selfcheck_start
        error = sum((torch.cat(found[name]) - true[name]).square().sum() for name in true)
        motion = sum((true[name] - start[name]).square().sum() for name in true)
        return float((error / motion) ** 0.5)


def case(name: str, directory: Path, model: Path) -> None:
    with row("policy", case=name, adam=built_adam()) as found:
        run = Run(directory, model, *CASES[name])
        status = [run.step(1)]
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        status.append(run.step(2))
        found["loss"] = [s["self_distillation/loss"] for s in status]
        found["norm"] = [s["actor_grad_norm"] for s in status]
        if CUDA:
            found["peak_mib"] = torch.cuda.max_memory_allocated() / MIB
            tuned = run.args.ds.lora
            shape = memory.shape_of(AutoConfig.from_pretrained(model), tuned.rank, tuned.target_modules)
            found["estimated_mib"] = memory.total(memory.policy_worker(run.args, shape))[0] / MIB
        if run.args.ds.enable_sleep:
            asleep = reserved_mib()
            run.worker.reload_states()
            found |= {"asleep_mib": asleep, "awake_mib": reserved_mib()}
        found["average_error"] = error = run.average_error()
        found["ok"] = error is None or error < 1e-5
        plugins.active().unregister(selfcheck)  # which works in host memory
        found["step_ms"] = milliseconds(partial(run.step, 3), least=2, most=2)


def built_adam() -> str:
    """DeepSpeed's Adam kernels, or torch's Adam in their place where they cannot be built; which."""
    if not CUDA:
        return "torch's"  # as CPU mode has it
    try:
        from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

        for builder in (FusedAdamBuilder(), CPUAdamBuilder()):
            builder.load(verbose=False)
        return "DeepSpeed's"
    except Exception as error:
        import deepspeed.ops.adam
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

        cpu._plain_adam(deepspeed.ops.adam)
        import deepspeed.runtime.engine as engine

        engine.FusedAdam = engine.DeepSpeedCPUAdam = deepspeed.ops.adam.FusedAdam
        ZERO_SUPPORTED_OPTIMIZERS.append(engine.FusedAdam)
        return f"torch's ({type(error).__name__}: {error})".splitlines()[0][:300]


def in_a_process(name: str, directory: Path) -> dict[str, Any]:
    """A case's row; each has a process of its own, so that none sees another's memory."""
    own = directory / str(list(CASES).index(name))
    command = [sys.executable, __file__, "--case", name, "--directory", str(own), "--model", str(directory / "model")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith('{"what"')]
    return json.loads(rows[-1]) if rows else {"case": name, "error": f"ended with {done.returncode}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        case(given.case, given.directory, given.model)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as name:
        model = tiny_model(Path(name) / "model")
        if not given.tiny:
            config = AutoConfig.from_pretrained(model)
            config.update(LARGER)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
        tell("adam", kernels=built_adam())  # once, before several processes want them
        first: dict[tuple[str, bool], list[float]] = {}
        with ThreadPoolExecutor(3 if CUDA else 1) as pool:
            for found in pool.map(partial(in_a_process, directory=Path(name)), FEW if given.tiny else CASES):
                if "loss" in found:
                    expected = first.setdefault(kind_of(found["case"]), found["loss"])
                    alike = all(abs(a / b - 1) < 0.02 for a, b in zip(found["loss"], expected, strict=True))
                    found["ok"] &= alike  # not so where one is NaN
                tell("policy", **{key: value for key, value in found.items() if key != "what"})


def kind_of(name: str) -> tuple[str, bool]:
    """Cases of one kind are the same training."""
    return name.split(", ")[1], "LoRA" in name


if __name__ == "__main__":
    main()
