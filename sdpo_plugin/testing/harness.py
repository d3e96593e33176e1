"""Runs of OpenRLHF on CPU, each in a process of its own."""

from __future__ import annotations

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
from typing import TYPE_CHECKING, Any

from sdpo_plugin.openrlhf_adapter.platform.cluster import HIDDEN

if TYPE_CHECKING:
    import torch


class RunFailed(RuntimeError):
    """The launcher ended with an error; the message holds the end of its output.

    Attributes:
        code: its exit code, or None where it did not end in time. output: what it printed. seconds: how long it ran.
    """

    def __init__(self, code: int | None, output: Path, seconds: float) -> None:
        self.code, self.output, self.seconds = code, output.read_text(), seconds
        status = "no end in time" if code is None else code
        super().__init__(f"{status}; {output} ends\n{self.output[-4000:]}")


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
        """The final model's tensors, as OpenRLHF saved them."""
        from safetensors.torch import load_file

        return {k: v for file in self.directory.glob("model/*.safetensors") for k, v in load_file(file).items()}

    @property
    def samples(self) -> list[list[Any]]:
        """The rewarded samples of each step (OpenRLHF's `Experience`, with `record` and `feedback`)."""
        import torch

        return [torch.load(f, weights_only=False) for f in sorted((self.directory / "samples").glob("*.pt"))]


class OpenRLHF:
    """Runs the installed OpenRLHF on CPU, each run in a process of its own. Comes as the fixture `openrlhf`."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.runs = directory, 0
        self.launchers = multiprocessing.get_context("forkserver")
        self.launchers.set_forkserver_preload(["sdpo_plugin.testing.preload"])
        self.environment = {"CUDA_VISIBLE_DEVICES": HIDDEN}  # the harness stays on the CPU, whatever is there

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

        One step per pass over the rows, one rank, two samples per prompt, ZeRO-2; `flags` (OpenRLHF's or a plugin's)
        come last and so win.

        Args:
            replay: train on that run's recorded samples; no engine is started.
            plain: OpenRLHF's own policy worker, without plugins; needs `replay`.
            fresh: start the run as a user does, every process an interpreter of its own. Other runs are forks of one
                process and inherit its random state and modules. Takes a minute; not with `plain`.

        Raises:
            RunFailed: the launcher ended with an error, or outlasted `timeout` seconds.
        """
        directory = self._new_directory()
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
            "--actor.lr_scheduler=constant", "--actor.lr_warmup_ratio=0", *_outputs(directory),
        ]  # fmt: skip
        if not plain:
            arguments += ["--platform=cpu", f"--testing.record={directory}/samples"]
            arguments += [f"--testing.replay={replay.directory}/samples"] if replay else []
            flags = with_plugin(flags)
        return self._run(directory, [*arguments, *flags], replay if plain else None, fresh, timeout)

    def train(self, *flags: str, timeout: float = 300.0) -> Run:
        """`openrlhf-sdpo train` with `flags` alone, as a user gives them: recipes. Outputs go to the run's directory.

        Raises:
            RunFailed: the launcher ended with an error, or outlasted `timeout` seconds.
        """
        from sdpo_plugin.openrlhf_adapter.launcher.launch import early

        directory = self._new_directory()
        own = ["--platform=cpu", f"--testing.record={directory}/samples", *_outputs(directory)]
        plugins = ["--plugins", *(early(list(flags))[0].plugins or []), "sdpo_plugin.testing"]  # a recipe's, too
        return self._run(directory, [*flags, *plugins, *own], None, False, timeout)

    def command(self, *arguments: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `openrlhf-sdpo` with these arguments in `directory`, as a fork like the runs: code, stdout, stderr."""
        own = self._new_directory()
        files = own / "stdout.txt", own / "stderr.txt"
        environment = {**os.environ, **self.environment, **environment}
        process = self.launchers.Process(target=_command, args=(list(arguments), directory, environment, files))
        process.start()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(arguments, process.exitcode, *(file.read_text() for file in files))

    def _new_directory(self) -> Path:
        self.runs += 1
        directory = self.directory / f"run{self.runs}"
        directory.mkdir(parents=True)
        return directory

    def _run(self, directory: Path, arguments: list[str], plain: Run | None, fresh: bool, timeout: float) -> Run:
        began, output = time.monotonic(), directory / "output.txt"
        code = self._start(output, arguments, plain, fresh, timeout)
        if code and "EADDRINUSE" in output.read_text():
            # OpenRLHF chooses a free port and uses it seconds later; another process of this machine may be first.
            output.unlink()
            code = self._start(output, arguments, plain, fresh, timeout)
        seconds = time.monotonic() - began
        if code != 0:
            raise RunFailed(code, output, seconds)
        return Run(directory, output.read_text(), seconds)

    def _start(
        self, output: Path, arguments: list[str], plain: Run | None, fresh: bool, timeout: float
    ) -> int | None:
        """The exit code of a run; None if it outlasted `timeout`."""
        if fresh:
            command = [sys.executable, "-m", "sdpo_plugin", "train", *arguments]
            with open(output, "w") as log:
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **self.environment}
                )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
            code, group = process.returncode, process.pid
        else:
            environment = {**os.environ, **self.environment}
            launcher = self.launchers.Process(
                target=_launch,
                args=(arguments, f"{plain.directory}/samples" if plain else None, environment, output),
            )
            launcher.start()
            assert launcher.pid is not None
            launcher.join(timeout)
            code, group = launcher.exitcode, launcher.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)  # whatever Ray started ends with the run
        return code


def _outputs(directory: Path) -> list[str]:
    return [
        f"--ckpt.output_dir={directory}/model", f"--ckpt.path={directory}/ckpt",
        f"--logger.tensorboard_dir={directory}/tensorboard",
    ]  # fmt: skip


def with_plugin(flags: tuple[str, ...]) -> tuple[str, ...]:
    """`flags` with this package among `--plugins`."""
    if "--plugins" not in flags:
        return (*flags, "--plugins", "sdpo_plugin.testing")
    at = flags.index("--plugins") + 1
    return flags if "sdpo_plugin.testing" in flags[at:] else (*flags[:at], "sdpo_plugin.testing", *flags[at:])


def _enter(environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    """Let this fork be a process of its own, with these variables and files."""
    os.setsid()
    for file, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))


def _command(arguments: list[str], directory: Path, environment: dict[str, str], files: tuple[Path, Path]) -> None:
    _enter(environment, *files)
    os.chdir(directory)
    from sdpo_plugin.openrlhf_adapter.launcher import cli

    cli.main(arguments)


def _launch(arguments: list[str], plain_samples: str | None, environment: dict[str, str], output: Path) -> None:
    """The body of a run's process, forked from one that has imported OpenRLHF (`testing/preload.py`)."""
    _enter(environment, output, output)
    from sdpo_plugin.testing.fork_server import fork_ray, open_nursery

    open_nursery(str(output.parent))
    fork_ray()
    if plain_samples is None:
        from sdpo_plugin.openrlhf_adapter.launcher import cli

        cli.main(["train", *arguments])
    else:
        from sdpo_plugin.testing.replay import train_plain

        train_plain(plain_samples, arguments)
