"""What makes OpenRLHF's checkpoints survive a kill, and a restart go on as if there had been none."""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

RANDOM_STATE = "random_state_rank{rank}.pt"
OPTIMIZER_SETTINGS = ("betas", "eps", "weight_decay", "momentum")  # `--actor.adam.*`, `--actor.muon.momentum`
WHOLE = "whole"  # an empty file in a checkpoint that was written to its end


def save_random_state(directory: str, rank: int) -> None:
    """OpenRLHF draws the order of micro-batches from this state and does not keep it."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    torch.save({"cpu": torch.get_rng_state(), **cuda}, os.path.join(directory, RANDOM_STATE.format(rank=rank)))


def load_random_state(directory: str, rank: int) -> None:
    """Does nothing for a checkpoint of fewer ranks, or one that was written without this plugin."""
    path = os.path.join(directory, RANDOM_STATE.format(rank=rank))
    if os.path.exists(path):
        state = torch.load(path)
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])


def flags_win(load: Callable[..., Any]) -> Callable[..., Any]:
    """OpenRLHF's `load_ckpt`, after which the optimizer's settings are the flags', where DeepSpeed restores the old.

    The schedule of the learning rate goes on where it was, towards and from the peak that is given now.
    """

    def call(engine: Any, *args: Any, **kwargs: Any) -> Any:
        scheduler = engine.lr_scheduler
        given = [{name: g[name] for name in OPTIMIZER_SETTINGS if name in g} for g in engine.optimizer.param_groups]
        peaks = list(scheduler.base_lrs)
        result = load(engine, *args, **kwargs)
        groups = engine.optimizer.param_groups
        for group, settings, peak, share in zip(groups, given, peaks, scheduler.lr_lambdas, strict=True):
            group.update(settings, initial_lr=peak, lr=peak * share(scheduler.last_epoch))
        scheduler.base_lrs, scheduler._last_lr = peaks, [group["lr"] for group in groups]
        return result

    return call


@contextmanager
def latest_withheld(engine: Any) -> Iterator[None]:
    """DeepSpeed's `save_checkpoint` without the file that names it the latest."""
    save = engine.save_checkpoint
    engine.save_checkpoint = lambda *args, **kwargs: save(*args, **{**kwargs, "save_latest": False})
    try:
        yield
    finally:
        del engine.save_checkpoint


@contextmanager
def all_kept(args: Any) -> Iterator[int]:
    """While OpenRLHF saves a checkpoint it deletes none; yields `--ckpt.max_num`, for `prune` afterwards.

    OpenRLHF makes room before it saves: killed in that save, a run with `--ckpt.max_num 1` has nothing left.
    """
    max_num = args.ckpt.max_num
    args.ckpt.max_num = sys.maxsize
    try:
        yield max_num
    finally:
        args.ckpt.max_num = max_num


def prune(directory: str, max_num: int, tag: str, metric_of: Callable[[str], float | None]) -> None:
    """Delete all but `max_num` checkpoints, `tag` being the newest of them, in OpenRLHF's order.

    Those without a metric go first, then those with the worst, then the oldest. Best ones stay and do not count.
    """

    def order(path: str) -> tuple[bool, float, float]:
        metric = metric_of(path)
        return metric is not None, metric or 0.0, os.path.getmtime(path)

    found = {path.rstrip(os.sep) for path in glob.glob(os.path.join(directory, "*", ""))}
    regular = [path for path in found if not os.path.basename(path).startswith("best")]
    others = sorted(set(regular) - {os.path.join(directory, tag)}, key=order)
    for path in others[: max(len(regular) - max_num, 0)]:
        shutil.rmtree(path)


def name_latest(directory: str, tag: str) -> None:
    """Mark `directory/tag` as whole, and as the checkpoint to resume from."""
    open(os.path.join(directory, tag, WHOLE), "w").close()
    path = os.path.join(directory, f"latest.{os.getpid()}")
    with open(path, "w") as file:
        file.write(tag)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path, os.path.join(directory, "latest"))


def mend_latest(directory: str) -> None:
    """Let `latest` name the newest whole checkpoint where what it names is gone.

    OpenRLHF deletes the checkpoint with the worst metric, be it the one to resume from, before it saves with too little
    room (`--ckpt.max_mem`); a run killed during that save has only older ones left.
    """
    try:
        with open(os.path.join(directory, "latest")) as file:
            named = file.read().strip()
    except FileNotFoundError:
        return
    if not os.path.isdir(os.path.join(directory, named)):
        whole = glob.glob(os.path.join(directory, "*", WHOLE))
        if whole:
            name_latest(directory, os.path.basename(os.path.dirname(max(whole, key=os.path.getmtime))))
        else:
            with suppress(FileNotFoundError):  # another rank was faster
                os.remove(os.path.join(directory, "latest"))
