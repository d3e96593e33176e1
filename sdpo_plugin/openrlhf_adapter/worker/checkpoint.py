"""OpenRLHF's checkpoints survive a kill, and a restarted run continues as if it had not been stopped."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from sdpo_plugin.config import ConfigError

RANDOM_STATE = "random_state_rank{rank}.pt"
OPTIMIZER_SETTINGS = ("betas", "eps", "weight_decay", "momentum")  # `--actor.adam.*`, `--actor.muon.momentum`
UNIVERSAL = "_universal"  # ends the name of what DeepSpeed's `ds_to_universal` has made of a checkpoint
# A file in a checkpoint that was written to its end: how long the others are, and what they can be read with, as JSON.
WHOLE = "whole"


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

    The learning-rate schedule continues where it was, towards and from the peak that is given now.
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

    Those that are not whole go first, then those without a metric, then those with the worst, then the oldest. Best
    and universal ones stay and do not count.
    """

    def order(path: str) -> tuple[bool, bool, float, int]:
        metric = metric_of(path)
        return os.path.exists(os.path.join(path, WHOLE)), metric is not None, metric or 0.0, step_of(path)

    found = {path.rstrip(os.sep) for path in glob.glob(os.path.join(directory, "*", ""))}
    regular = [p for p in found if not os.path.basename(p).startswith("best") and not p.endswith(UNIVERSAL)]
    others = sorted(set(regular) - {os.path.join(directory, tag)}, key=order)
    for path in others[: max(len(regular) - max_num, 0)]:
        shutil.rmtree(path)


def step_of(path: str) -> int:
    """The global step in a checkpoint's name; times of files are the clock's, which may jump."""
    step = re.search(r"(\d+)$", path)
    return int(step[1]) if step else -1


def written_with(args: Any) -> dict[str, Any]:
    """The flags without which DeepSpeed cannot read what it wrote with them."""
    return {
        "--actor.num_nodes": args.actor.num_nodes, "--actor.num_gpus_per_node": args.actor.num_gpus_per_node,
        "--actor.optim": args.actor.optim, "--ds.zero_stage": args.ds.zero_stage, "--ds.lora.rank": args.ds.lora.rank,
    }  # fmt: skip


def mark_whole(directory: str, tag: str, flags: dict[str, Any]) -> None:
    """Note in `directory/tag` that all of it is written, how long each file is, and with which `flags`."""
    content = {"bytes": _sizes(os.path.join(directory, tag)), "flags": flags}
    _replace(os.path.join(directory, tag, WHOLE), json.dumps(content))


def name_latest(directory: str, tag: str) -> None:
    """Let `directory/tag` be the checkpoint to resume from."""
    _replace(os.path.join(directory, "latest"), tag)


def named_latest(directory: str, universal: bool = False) -> str | None:
    """The checkpoint to resume from, as `latest` names it, or that of which the universal one to load was made.

    A universal one has DeepSpeed's states only: the teacher and the random state are in the other, of the same step.
    """
    try:
        with open(os.path.join(directory, "latest" + UNIVERSAL * universal)) as file:
            return file.read().strip().removesuffix(UNIVERSAL if universal else "")
    except FileNotFoundError:
        return None


def mend_latest(directory: str) -> None:
    """Let `latest` name the newest whole checkpoint where what it names is gone.

    OpenRLHF deletes the checkpoint with the worst metric, be it the one to resume from, before it saves with too little
    room (`--ckpt.max_mem`); a run killed during that save has only older ones left.
    """
    named = named_latest(directory)
    if named is not None and not os.path.isdir(os.path.join(directory, named)):
        if whole := whole_ones(directory):
            name_latest(directory, whole[-1])
        else:
            with suppress(FileNotFoundError):  # another rank was faster
                os.remove(os.path.join(directory, "latest"))


def require_source(directory: str) -> None:
    """Raises ConfigError where there is no universal checkpoint to load, or its source is missing."""
    named = named_latest(directory, universal=True)
    if named is None and os.path.isdir(directory):
        raise ConfigError(
            f"--ds.use_universal_ckpt: {directory} has no latest_universal; convert a checkpoint there to NAME"
            f"{UNIVERSAL} with DeepSpeed's ds_to_universal, or drop the flag"
        )
    if named is not None and not os.path.isdir(os.path.join(directory, named)):
        raise ConfigError(
            f"--ds.use_universal_ckpt: the universal checkpoint is named {named}{UNIVERSAL}, and there is no "
            f"{os.path.join(directory, named)}, which has the teacher and the random state of that step; keep the "
            f"checkpoint that was converted, and call the universal one by its name and {UNIVERSAL}"
        )


def require_readable(directory: str, flags: dict[str, Any], universal: bool = False) -> None:
    """Raises ConfigError where the checkpoint to resume from has lost something, or was written with other `flags`.

    A full or failing disk, an interrupted copy or a loss of power leave files that are not as long as they were. Of
    what was written without this plugin nothing is known.
    """
    named = named_latest(directory, universal)
    if named is None:
        return
    path = os.path.join(directory, named)
    if lacking := missing(path):
        others = [tag for tag in whole_ones(directory) if tag != named]
        fix = f"to continue from {others[-1]}: echo {others[-1]} > {os.path.join(directory, 'latest')}" if others else (
            "no other checkpoint is complete; give another --ckpt.path for a new run"
        )  # fmt: skip
        raise ConfigError(f"--ckpt.load_enable: the checkpoint {path} is damaged: {lacking}; {fix}")
    for flag, value in (_written(path) or {}).get("flags", {}).items():
        if flag in flags and flags[flag] != value:
            raise ConfigError(
                f"{flag} {flags[flag]}: the checkpoint {path} was written with {value} and cannot be loaded with "
                f"another value; give {flag} {value}, or another --ckpt.path for a new run"
            )


def whole_ones(directory: str) -> list[str]:
    """The checkpoints that are whole, the newest last."""
    marked = (os.path.dirname(path) for path in glob.glob(os.path.join(directory, "*", WHOLE)))
    return [os.path.basename(path) for path in sorted(marked, key=step_of) if not missing(path)]


def missing(path: str) -> str:
    """What a checkpoint has lost since it was written, or ""."""
    found = _sizes(path)
    for name, size in (_written(path) or {}).get("bytes", {}).items():
        if found.get(name) != size:
            has = f"has {found[name]:,} bytes of {size:,}" if name in found else "is missing"
            return f"{name} {has}"
    return ""


def _written(path: str) -> dict[str, Any] | None:
    """What `mark_whole` noted; None in a checkpoint that is not whole, or that OpenRLHF wrote alone."""
    try:
        with open(os.path.join(path, WHOLE)) as file:
            return json.loads(file.read() or "{}")  # it was empty once
    except FileNotFoundError:
        return None


def _sizes(path: str) -> dict[str, int]:
    files = [os.path.join(at, name) for at, _, names in os.walk(path) for name in names if name != WHOLE]
    return {os.path.relpath(file, path): os.path.getsize(file) for file in files}


def _replace(path: str, text: str) -> None:
    """Write a file that is there wholly or not at all."""
    new = f"{path}.{os.getpid()}"
    with open(new, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
