"""`openrlhf-sdpo doctor --smoke-test`: the loss, the EMA teacher, gradients, a step and a resume, on this hardware.

    python -m sdpo_plugin.testing.selfcheck cpu|cuda [FLAGS OF THE TRAINING COMMAND]

A small model is trained with the launch options of the given flags (placement, sleep, ZeRO, LoRA, engines). Prints a
line of JSON for each finding. As a plugin it computes the EMA teacher in float64.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sdpo_plugin import plugins
from sdpo_plugin.config import DistillConfig
from sdpo_plugin.hookspecs import hookimpl

LAUNCH = (
    "ds.", "actor.num_", "ref.num_", "vllm.num_engines", "vllm.tensor_parallel_size", "vllm.enable_sleep",
    "vllm.sync_backend", "vllm.gpu_memory_utilization", "vllm.enforce_eager", "train.colocate_", "train.async_enable",
    "teacher.kind", "teacher.offload", "teacher.update_rate", "actor.gradient_checkpointing_enable",
)  # fmt: skip
REWARD = '''
import torch

def reward_func(queries, prompts, labels):
    rewards = torch.tensor([float(sum(map(ord, query)) % 2) for query in queries])
    return {"rewards": rewards, "scores": rewards, "feedback": [f"expected {label}" for label in labels]}
'''
TIMEOUT = 600.0


# ── the plugin ──


@hookimpl
def openrlhf_add_arguments(parser: Any) -> None:
    parser.add_argument("--selfcheck.out", help="file for the distance of the EMA teacher from one in float64")


def _follows(worker: Any) -> Any:
    teacher = plugins.algorithm().teacher if plugins.algorithm() is not None else None
    return teacher if hasattr(teacher, "weights") else None


@hookimpl(trylast=True)
def openrlhf_worker_setup(worker: Any) -> None:
    if _follows(worker):
        worker.selfcheck = {name: f.values.double().cpu() for name, f in worker.master_weights.fragments().items()}
        worker.selfcheck_start = {name: values.clone() for name, values in worker.selfcheck.items()}


@hookimpl(trylast=True)
def openrlhf_optimizer_step(worker: Any) -> None:
    if _follows(worker):
        for name, fragment in worker.master_weights.fragments().items():
            worker.selfcheck[name].lerp_(fragment.values.double().cpu(), worker.args.teacher.update_rate)


@hookimpl
def openrlhf_save_model(worker: Any, path: str) -> None:
    if not _follows(worker) or not worker.args.selfcheck.out:
        return
    average: dict[str, list[torch.Tensor]] = {}
    for name, values in _follows(worker).weights():
        average.setdefault(name, []).append(values.cpu())
    error = sum((torch.cat(average[name]) - true).square().sum().item() for name, true in worker.selfcheck.items())
    start = worker.selfcheck_start
    motion = sum((true - start[name]).square().sum().item() for name, true in worker.selfcheck.items())
    Path(f"{worker.args.selfcheck.out}.{worker.rank}").write_text(json.dumps([error, motion]))


# ── the loss ──


def losses(device: str) -> Iterator[tuple[str, bool | None, str]]:
    from sdpo_plugin.distillation.fused import linear_distillation_loss
    from sdpo_plugin.distillation.loss import distillation_loss

    tokens, hidden, vocab = (2048, 2048, 65536) if device == "cuda" else (1024, 256, 16384)
    config = DistillConfig()
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)):
        torch.manual_seed(0)
        states, other = (torch.randn(tokens, hidden, device=device).to(dtype) for _ in range(2))
        head = (torch.randn(vocab, hidden, device=device) / hidden**0.5).to(dtype)
        ids = torch.randint(vocab, (tokens,), device=device)
        mask = torch.ones(tokens, device=device)

        def dense(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
            student = (states @ head.T).float()[None]
            teacher = (other.to(head.dtype) @ head.detach().T).float()[None]  # noqa: B023
            return distillation_loss(student, teacher, ids[None], mask[None], config)  # noqa: B023

        def fused(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
            return linear_distillation_loss(states, head, other, head.detach(), ids, mask, config)  # noqa: B023

        scale = 2.0**14 if dtype == torch.float16 else 1.0  # as DeepSpeed does, so that gradients have their digits
        whole, ours = (_measured(f, states, head, device, scale) for f in (dense, fused))
        exact = _measured(lambda s, h: dense(s.float(), h.float()), states, head, device, scale)  # noqa: B023
        errors = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(ours[0], exact[0], strict=True)]
        name, memory = str(dtype).removeprefix("torch."), ""
        if device == "cuda":
            memory = f", peak {ours[2] / 2**20:.0f} beside {whole[2] / 2**20:.0f} MiB"
        found = f"value {errors[0]:.1e}, gradients {errors[1]:.1e} and {errors[2]:.1e} from those in float32; "
        found += f"{ours[1] / whole[1]:.2f} of plain logits' time{memory}"
        yield f"loss in {name}", bool(max(errors) < tolerance and exact[0][0] > 0), found
        if device == "cuda" and dtype == torch.bfloat16:
            yield from _liger(states, head, other, whole)


def _measured(
    loss: Callable[..., torch.Tensor], states: torch.Tensor, head: torch.Tensor, device: str, scale: float = 1.0
) -> Any:
    """Value and both gradients, seconds, and bytes at the peak on CUDA."""
    for _ in range(2):  # the first one warms up
        states, head = (t.detach().clone().requires_grad_() for t in (states, head))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began, before = time.monotonic(), torch.cuda.memory_allocated() if device == "cuda" else 0
        value = loss(states, head)
        (value * scale).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    return [value.detach(), states.grad, head.grad], seconds, peak


def _liger(
    states: torch.Tensor, head: torch.Tensor, other: torch.Tensor, whole: Any
) -> Iterator[tuple[str, None, str]]:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        return
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compute_ce_loss=False)
    labels = torch.zeros(len(states), dtype=torch.long, device=states.device)
    _, seconds, peak = _measured(lambda s, h: loss(s, h, other, h.detach(), labels), states, head, "cuda")
    yield "Liger, full JSD", None, f"{seconds / whole[1]:.2f} of plain logits' time, peak {peak / 2**20:.0f} MiB"


# ── runs ──


class Runs:
    """Launches of a small model with the user's launch options."""

    def __init__(self, platform: str, recipe: list[str], directory: Path) -> None:
        from sdpo_plugin.openrlhf_adapter.launcher import launch
        from sdpo_plugin.testing.models import tiny_model

        self.directory, self.number = directory, 0
        self.options: list[str] = []
        ranks = 1
        if recipe:
            args, defaults = launch.parsed(recipe, platform == "cpu")
            ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
            for name, value in launch.flat(args).items():
                if name.startswith(LAUNCH) and (name not in defaults or value != defaults[name]) and value is not None:
                    self.options += flags_of(name, value)
            self.options += [f"--actor.num_gpus_per_node={args.actor.num_gpus_per_node}"]
            self.options += [f"--ref.num_gpus_per_node={args.ref.num_gpus_per_node}"]
        else:
            self.options += ["--actor.num_gpus_per_node=1", "--ref.num_gpus_per_node=1", "--vllm.num_engines=1"]
        rows = max(8, ranks)
        (directory / "reward.py").write_text(REWARD)
        (directory / "rows.jsonl").write_text(
            "".join(json.dumps({"prompt": f"say {i}", "label": str(i)}) + "\n" for i in range(rows))
        )
        self.batch = ["--rollout.n_samples_per_prompt=2", f"--rollout.batch_size={rows}",
                      f"--train.batch_size={2 * rows}", "--rollout.micro_batch_size=2"]  # fmt: skip
        self.micro = max(1, 2 * rows // ranks)
        self.common = [
            f"--actor.model_name_or_path={tiny_model(directory / 'model')}", f"--platform={platform}",
            f"--reward.remote_url={directory}/reward.py", f"--data.prompt_dataset={directory}/rows.jsonl",
            "--data.input_key=prompt", "--data.label_key=label", "--data.apply_chat_template", "--data.max_len=128",
            "--rollout.max_new_tokens=8", "--algo.advantage.estimator=group_norm", "--algo.kl.init_coef=0",
            "--actor.adam.lr=1e-3", "--actor.lr_scheduler=constant", "--actor.lr_warmup_ratio=0",
        ]  # fmt: skip

    def command(self, *flags: str) -> tuple[list[str], Path]:
        self.number += 1
        out = self.directory / f"run{self.number}"
        out.mkdir()
        plugins = ["--plugins", "sdpo_plugin.testing", "sdpo_plugin.testing.selfcheck"]
        return [
            sys.executable, "-m", "sdpo_plugin", "train", *self.common, *self.batch, *self.options,
            f"--train.micro_batch_size={self.micro}", f"--ckpt.output_dir={out}/model", f"--ckpt.path={out}/ckpt",
            f"--logger.tensorboard_dir={out}/tensorboard", *flags, *plugins,
        ], out  # fmt: skip

    def __call__(self, *flags: str) -> Path:
        """Run to the end. Raises RuntimeError with the message it ended with."""
        command, out = self.command(*flags)
        with open(out / "log.txt", "w") as log:
            done = subprocess.run(command, stdout=log, stderr=log, timeout=TIMEOUT, start_new_session=True)
        if done.returncode:
            lines = (out / "log.txt").read_text().rstrip().splitlines()
            errors = [i for i, line in enumerate(lines) if line.startswith("openrlhf-sdpo: error:")]
            raise RuntimeError(" ".join(lines[errors[-1] if errors else -1 :])[:500])
        return out

    def killed(self, *flags: str) -> Path:
        """Run until the first checkpoint is named, and kill everything that this process started."""
        command, out = self.command(*flags)
        with open(out / "log.txt", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + TIMEOUT
        while not (out / "ckpt" / "_actor" / "latest").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("ended before its first checkpoint")
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return out


def flags_of(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}"] if value else []
    if isinstance(value, (list, tuple)):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


def scalar(out: Path, tag: str) -> list[float]:
    from sdpo_plugin.report import read_scalars

    return [value for _, value in read_scalars(str(out / "tensorboard")).get(tag, [])]


def runs(platform: str, recipe: list[str], directory: Path) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
    """Names of findings and what finds them, in order: the later ones build on the first."""
    launch = Runs(platform, recipe, directory)
    sdpo = ("--algo=sdpo", "--distill.topk=20")
    found: dict[str, Path] = {}

    def step() -> tuple[bool, str]:
        found["sdpo"] = out = launch(
            *sdpo, "--train.num_episodes=2", f"--selfcheck.out={directory}/average",
            f"--testing.record={directory}/samples",
        )
        loss, seconds = scalar(out, "train/self_distillation/loss"), scalar(out, "train/timing/step_total")
        return len(loss) == 2 and loss[0] > 0, f"loss {loss[0]:.4f}, {loss[1]:.4f}; second step {seconds[1]:.2f} s"

    def average() -> tuple[bool, str]:
        parts = [json.loads(file.read_text()) for file in directory.glob("average.*")]
        if not parts:
            return True, "there is no EMA with this --teacher.kind"
        error, motion = (sum(values) ** 0.5 for values in zip(*parts, strict=True))
        return 0 < motion and error < 1e-5 * motion, f"{error / motion:.1e} of its motion from float64's"

    def grpo() -> tuple[bool, str]:
        out = launch()
        norm = scalar(out, "train/actor_grad_norm")
        return len(norm) == 1, f"gradient norm {norm[0]:.4f}"

    def gradients() -> tuple[bool, str]:
        launch.micro = max(1, launch.micro // 4)
        replay = (*sdpo, f"--testing.replay={directory}/samples")
        out = launch(*replay, *(() if "--ds.adam_offload" in launch.options else ("--ds.adam_offload",)))
        whole, parts = scalar(found["sdpo"], "train/actor_grad_norm")[0], scalar(out, "train/actor_grad_norm")[0]
        return abs(parts / whole - 1) < 0.05, f"norm {parts:.5f} in parts with adam_offload, {whole:.5f} at once"

    def resume() -> tuple[bool, str]:
        flags = (*sdpo, "--train.num_episodes=3", "--ckpt.save_steps=1")
        killed = launch.killed(*flags)
        out = launch(*flags, f"--ckpt.path={killed}/ckpt", "--ckpt.load_enable")
        steps = len(scalar(out, "train/self_distillation/loss"))
        return 0 < steps < 3, f"killed after its first checkpoint, the run went on for {steps} of 3 steps"

    yield "two steps of SDPO", step
    yield "the EMA teacher", average
    yield "a step of GRPO", grpo
    yield "accumulated gradients", gradients
    yield "resume after a kill", resume


def record(about: str, passed: bool | None, found: str) -> None:
    status = "pass" if passed or passed is None else "fail"
    print(json.dumps({"about": about, "status": status, "found": found}), flush=True)


def main() -> None:
    platform, *recipe = sys.argv[1:]
    if platform == "cpu":
        from sdpo_plugin.openrlhf_adapter.platform import cluster, cpu

        os.environ["CUDA_VISIBLE_DEVICES"] = cluster.HIDDEN
        cpu.enable()
    for finding in losses(platform):
        record(*finding)
    with tempfile.TemporaryDirectory(prefix="openrlhf-sdpo-doctor-") as directory:
        for about, find in runs(platform, recipe, Path(directory)):
            try:
                record(about, *find())
            except Exception as error:
                record(about, False, f"{type(error).__name__}: {error}")
                if about == "two steps of SDPO":
                    break  # the others would end alike


if __name__ == "__main__":
    main()
