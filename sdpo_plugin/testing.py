"""The test harness for plugin authors: the real host on CPU for end-to-end tests, a fake worker for units.

As a pytest plugin it offers the fixture `openrlhf`; as a plugin of the host (it names itself in `--plugins`) it
records rollouts and feeds recorded ones back, so that runs can be compared on the very same data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from sdpo_plugin.host.hookspecs import hookimpl

if TYPE_CHECKING:  # pytest loads this module in every project of the environment: it must cost nothing
    import torch

# ── the host's side: record and replay ──


@hookimpl
def openrlhf_add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--testing")
    group.add_argument("--testing.record", metavar="DIR", help="write each step's rewarded samples to DIR")
    group.add_argument("--testing.replay", metavar="DIR", help="train on recorded samples instead of generating")


@hookimpl(tryfirst=True)
def openrlhf_dataset(dataset: Any, args: Any) -> None:
    if args.testing.replay:
        from sdpo_plugin.host import replay

        replay.bind(args.testing.replay)


@hookimpl(tryfirst=True)
def openrlhf_batch(batch: Any) -> None:
    if batch.args.testing.record:
        import torch

        os.makedirs(batch.args.testing.record, exist_ok=True)
        step = len(os.listdir(batch.args.testing.record))
        torch.save(list(batch.samples), os.path.join(batch.args.testing.record, f"{step:05d}.pt"))


# ── the pytest side: runs of the real host ──


class RunFailed(RuntimeError):
    """The launcher ended with an error; the message holds the end of its output."""


@dataclass(frozen=True)
class Run:
    """What a finished run left in `directory`.

    Attributes:
        output: what the launcher printed (Ray forwards the workers' lines).
        seconds: wall time, start-up included.
    """

    directory: Path
    output: str = field(repr=False)
    seconds: float

    @property
    def metrics(self) -> dict[str, list[list[float]]]:
        """Logged scalars, `{"train/policy_loss": [[step, value], ...]}`."""
        from sdpo_plugin.report import read_scalars

        return read_scalars(str(self.directory / "tensorboard"))

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The final model's tensors, as the host saved them."""
        from safetensors.torch import load_file

        return {k: v for file in self.directory.glob("model/*.safetensors") for k, v in load_file(file).items()}

    @property
    def samples(self) -> list[list[Any]]:
        """The rewarded samples of each step (the host's `Experience`, with `record` and `feedback`)."""
        import torch

        return [torch.load(f, weights_only=False) for f in sorted((self.directory / "samples").glob("*.pt"))]


class OpenRLHF:
    """Runs the installed host on CPU, each run in a process of its own. Comes as the fixture `openrlhf`."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.runs = directory, 0
        self.launchers = multiprocessing.get_context("forkserver")
        self.launchers.set_forkserver_preload(["sdpo_plugin.host.warm"])

    def __call__(
        self,
        model: str | Path,
        rows: Sequence[dict[str, Any]],
        reward: str | Path,
        *flags: str,
        replay: Run | None = None,
        plain: bool = False,
        fresh: bool = False,
        timeout: float = 300.0,
    ) -> Run:
        """Train `model` on `rows` (columns `prompt` and `label`) with the reward function in file `reward`.

        One step per pass over the rows, one rank, two samples per prompt, ZeRO-2; `flags` (the host's or a plugin's)
        come last and so win.

        Args:
            replay: train on that run's recorded samples; no engine is started.
            plain: the host's own policy worker, without plugins; needs `replay`.
            fresh: start the run as a user does, every process an interpreter of its own. Other runs are forks of one
                process and inherit its random state and modules. Takes a minute; not with `plain`.

        Raises:
            RunFailed: the launcher ended with an error, or outlasted `timeout` seconds.
        """
        self.runs += 1
        directory = self.directory / f"run{self.runs}"
        directory.mkdir(parents=True)
        (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = [
            f"--actor.model_name_or_path={model}", "--actor.num_gpus_per_node=1", "--ref.num_gpus_per_node=1",
            f"--vllm.num_engines={0 if replay else 1}", "--vllm.enforce_eager", "--vllm.sync_backend=gloo",
            "--vllm.gpu_memory_utilization=0.1", "--ds.attn_implementation=sdpa",
            *([f"--reward.remote_url={reward}"] if reward else []),
            f"--data.prompt_dataset={directory}/rows.jsonl", "--data.input_key=prompt", "--data.label_key=label",
            "--data.apply_chat_template", "--data.max_len=128", "--rollout.max_new_tokens=8",
            f"--rollout.batch_size={len(rows)}", "--rollout.n_samples_per_prompt=2",
            f"--train.batch_size={2 * len(rows)}", "--train.micro_batch_size=8", "--rollout.micro_batch_size=8",
            "--algo.advantage.estimator=group_norm", "--algo.kl.init_coef=0", "--actor.adam.lr=1e-3",
            "--actor.lr_scheduler=constant", "--actor.lr_warmup_ratio=0", f"--ckpt.output_dir={directory}/model",
            f"--ckpt.path={directory}/ckpt", f"--logger.tensorboard_dir={directory}/tensorboard",
        ]  # fmt: skip
        if not plain:
            arguments.append(f"--testing.record={directory}/samples")
            arguments += [f"--testing.replay={replay.directory}/samples"] if replay else []
            flags += () if "--plugins" in flags else ("--plugins", "sdpo_plugin.testing")
        began, output = time.monotonic(), directory / "output.txt"
        if fresh:
            command = [sys.executable, "-m", "sdpo_plugin.host.cli", "train", *arguments, *flags]
            with open(output, "w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
            code = process.returncode
        else:
            process = self.launchers.Process(
                target=_launch,
                args=([*arguments, *flags], f"{replay.directory}/samples" if plain else None, dict(os.environ), output),
            )
            process.start()
            process.join(timeout)
            code = process.exitcode
        status = "no end in time" if code is None else code
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever Ray started ends with the run
        if status != 0:
            raise RunFailed(f"{status}; {output} ends\n{output.read_text()[-4000:]}")
        return Run(directory, output.read_text(), time.monotonic() - began)


def _launch(arguments: list[str], plain_samples: str | None, environment: dict[str, str], output: Path) -> None:
    """The body of a run's process, forked from one that has imported the host (`host/warm.py`)."""
    os.setsid()
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    from sdpo_plugin.host import nursery

    nursery.open_nursery(str(output.parent))
    if plain_samples is None:
        from sdpo_plugin.host import cli

        cli.main(["train", *arguments])
    else:
        from sdpo_plugin.host import replay

        replay.train_plain(plain_samples, arguments)


@pytest.fixture(scope="session")
def openrlhf(tmp_path_factory: pytest.TempPathFactory) -> OpenRLHF:
    """The real host on CPU: `run = openrlhf(model, rows, "reward.py", "--algo", "sdpo")`."""
    return OpenRLHF(tmp_path_factory.mktemp("openrlhf"))


def tiny_model(
    directory: str | Path, *, tied: bool = False, seed: int = 0, hidden: int = 128, layers: int = 2
) -> Path:
    """An untrained Llama with a character tokenizer and a chat template, small enough for a laptop's CPU.

    354,176 parameters untied, if not wider or deeper; head size 64, which vLLM's CPU attention needs.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, "\n", *map(chr, range(32, 127))])}
    characters = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=special[2:5],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocab), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64,
            max_position_embeddings=512, tie_word_embeddings=tied,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


# ── units: a policy worker without the host ──


def fake_worker(vocab: int = 31, hidden: int = 16, **groups: dict[str, Any]) -> Any:
    """A policy worker on one CPU rank with a toy model, for units: what a plugin sees, in milliseconds.

    Args:
        groups: options that differ from their defaults, `fake_worker(distill={"alpha": 1.0}, actor={...})`.

    Returns:
        An object with the attributes of `host.worker.PolicyWorker` that algorithms use, and
        `step(plugin, sequences, attention_mask, action_mask, **data) -> PolicyStep`: one micro-batch through
        `openrlhf_before_forward`, the student's forward pass and `openrlhf_policy_loss`; `data` is what a plugin
        attached on the controller. The host's own policy loss is the mean of -log_probs.
    """
    import copy

    import torch

    from sdpo_plugin.config import GROUPS
    from sdpo_plugin.fused import Head, linear_log_probs
    from sdpo_plugin.step import ATTACHED, PolicyStep, combined_needs, response_rows, undifferentiable
    from sdpo_plugin.teacher import Fragment

    class Actor(torch.nn.Module):
        temperature = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(vocab, hidden)
            self.mix = torch.nn.Linear(hidden, hidden)
            self.lm_head = torch.nn.Linear(hidden, vocab, bias=False)

        def states(self, sequences: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(1, sequences.shape[1] + 1)[:, None]
            return torch.tanh(self.mix(self.embedding(sequences).cumsum(1) / positions.sqrt()))

        @torch.no_grad()
        def hidden_states(self, sequences: Any, attention_mask: Any, rows: torch.Tensor, max_tokens: int) -> Any:
            return self.states(sequences)[rows]

        @contextlib.contextmanager
        def whole_head(self) -> Any:
            yield Head(self.lm_head.weight)

        def tap_head(self) -> None:
            pass

    class Worker:
        rank, ranks = 0, 1

        def __init__(self) -> None:
            defaults = {g.prefix: vars(g()) for g in GROUPS} | {
                "actor": {"entropy_coef": None, "aux_loss_coef": 0.0},
                "algo": {
                    "name": "sdpo", "kl": SimpleNamespace(use_loss=False, init_coef=0.0),
                    "advantage": SimpleNamespace(is_correction_level="off"),
                },
                "rollout": {"batch_size": 2, "n_samples_per_prompt": 2},
                "train": {"batch_size": 4, "max_epochs": 1, "async_enable": False},
                "data": {"apply_chat_template": True, "input_key": "prompt", "chat_template_kwargs": "{}"},
                "reward": {"remote_url": ["reward.py"]},
            }  # fmt: skip
            self.args = SimpleNamespace(
                **{name: SimpleNamespace(**{**values, **groups.get(name, {})}) for name, values in defaults.items()}
            )
            torch.manual_seed(0)
            self.actor, self.masters = Actor(), self

        def fragments(self) -> dict[str, Any]:
            return {name: Fragment(0, p.data.view(-1)) for name, p in self.actor.named_parameters()}

        def images(self, model: Actor) -> dict[str, torch.Tensor]:
            return {name: p.data.view(-1) for name, p in model.named_parameters()}

        def publish(self, model: Actor) -> None:
            pass

        def teacher_model(self, offload: bool, follows: bool) -> Actor:
            return copy.deepcopy(self.actor)

        def step(
            self, plugin: Any, sequences: Any, attention_mask: Any, action_mask: Any,
            old_log_probs: Any = None, rollout_log_probs: Any = None, **data: list[Any],
        ) -> PolicyStep:  # fmt: skip
            info = {ATTACHED + name: values for name, values in data.items()}
            experience = SimpleNamespace(
                sequences=sequences, attention_mask=attention_mask, action_mask=action_mask,
                action_log_probs=old_log_probs, rollout_log_probs=rollout_log_probs, info=info,
            )  # fmt: skip
            needs = combined_needs([plugin.openrlhf_needs(self.args)])
            step = PolicyStep(
                self,
                experience,
                needs,
                lambda loss, mask: (loss * mask).sum() / mask.sum().clamp(min=1),
                lambda loss, mask: ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean(),
                lambda old, rollout, mask: (old - rollout).exp().clamp(max=2.0) * mask,
            )
            plugin.openrlhf_before_forward(step)
            rows = response_rows(step.response, sequences)
            states, targets = self.actor.states(sequences)[rows], torch.roll(sequences, -1, dims=1)[rows]
            with self.actor.whole_head() as head:
                if step.head is not None:
                    step.scores = step.head(states, head, targets)
                    log_probs = step.scores.log_probs
                else:
                    log_probs, _ = linear_log_probs(states, head, targets)
            values = torch.zeros(action_mask.shape).masked_scatter(step.response, log_probs)
            step.log_probs = values if needs["log_probs"] else undifferentiable(values, "log_probs")
            step.loss = -log_probs.mean()
            plugin.openrlhf_policy_loss(step)
            return step

    return Worker()
