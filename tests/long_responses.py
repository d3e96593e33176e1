"""One sample of n tokens through each part of a step, for scaling tests and the benchmark of lengths."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from sdpo_plugin.algorithms.sdpo import SDPO
from sdpo_plugin.interface.rollout_batch import RolloutBatch, Turn
from sdpo_plugin.interface.transport import REQUESTED
from sdpo_plugin.monitoring.recorder import RECORDED
from sdpo_plugin.testing import fake_worker

TEXT = "The sum of 17 and 25 is 42, since 10 and 20 make 30, and 7 and 5 make 12. "


def recording(directory: Path, **groups: dict[str, Any]) -> Any:
    logger = {"tensorboard_dir": str(directory), "wandb": SimpleNamespace(run_name="run")}
    reprompt = {"max_len": 10**9, **groups.pop("reprompt", {})}
    return fake_worker(diagnostics={"log_samples": 2}, logger=logger, reprompt=reprompt, **groups)


def controller(n: int, tokenizer: Any, directory: Path) -> RolloutBatch:
    """Two siblings, a success of n tokens that is shown to a failure of n; both are recorded, and written."""
    args = recording(directory).args
    prompt = tokenizer("<|user|>Q?<|assistant|>", add_special_tokens=False)["input_ids"]
    ids = tokenizer(TEXT * (2 * n // len(TEXT) + 2), add_special_tokens=False)["input_ids"]
    samples = []
    for start in (0, 1):
        sequence = torch.tensor([prompt + ids[start : start + n]])
        mask = torch.ones(1, sequence.shape[1] - 1, dtype=torch.long)
        mask[0, : len(prompt) - 1] = 0
        samples.append(SimpleNamespace(
            sequences=sequence, action_mask=mask, truncated=torch.tensor([False]), feedback=None,
            record={"prompt": "Q?"}, turns=[Turn(len(prompt) - 1, sequence.shape[1] - 1)],
        ))  # fmt: skip
    experience = SimpleNamespace(index=[0, 1], rewards=torch.tensor([1.0, 0.0]), info={})
    batch = RolloutBatch(samples, [experience], args, tokenizer, float("inf"))
    algorithm = SDPO(args)
    algorithm.recorder.begin(0)
    algorithm.openrlhf_rollout_batch(batch)
    stats = {"student": [-1.0] * n, "teacher": [-2.0] * n, "ids": [[7] * 5] * n, "log_probs": [[-1.0] * 5] * n}
    batch.reports[RECORDED] = {0: stats, 1: stats}
    algorithm.openrlhf_after_training_step(batch)
    return batch


def worker(n: int, vocab: int = 40, hidden: int = 8, topk: int = 8) -> Any:
    """Loss and gradient of a failure with n tokens, behind a teacher's prompt of n, and what is recorded of it."""
    made = recording(Path("unused"), vocab=vocab, hidden=hidden, distill={"topk": topk})
    plugin = SDPO(made.args)
    plugin.openrlhf_worker_setup(made)
    torch.manual_seed(0)
    sequences = torch.randint(vocab, (1, 4 + n))
    action = torch.ones(1, 3 + n, dtype=torch.long)
    action[0, :3] = 0
    data = {
        "teacher_prompt": [torch.randint(vocab, (n,))], "loss_mask": [action[0].bool()],
        "failed": [torch.tensor(True)], REQUESTED + RECORDED: [torch.tensor([1, 0])],
        "reward": [torch.tensor(0.0)],
    }  # fmt: skip
    got = made.micro_batch(plugin, sequences, torch.ones_like(sequences), action, **data)
    got.loss.backward()
    return made


def report(directory: Path, out: Path) -> None:
    """The page of a run whose samples are in `directory`."""
    from sdpo_plugin.monitoring.sample_file import read_samples
    from sdpo_plugin.report import page
    from sdpo_plugin.report.events import read_run

    page.write([(read_run("run", str(directory)), read_samples(directory))], out)
