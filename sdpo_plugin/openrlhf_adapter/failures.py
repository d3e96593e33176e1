"""How a run that fails ends: one message (what, where, what to do), a file with everything, an exit code.

| code | whose                                                             |
| ---- | ----------------------------------------------------------------- |
| 0    | the run is over                                                   |
| 1    | this software's: this package, OpenRLHF, or a plugin              |
| 2    | your settings or your data                                        |
| 3    | your reward function or agent                                     |
| 4    | the machine's: memory, disk, a process or node that died          |
| 5    | nobody's: a plugin stopped the run, and its last step is saved    |
"""

from __future__ import annotations

import errno
import re
import tempfile
import time
import traceback
from dataclasses import dataclass

from sdpo_plugin.config import ConfigError, StopTraining
from sdpo_plugin.distillation.context import FeedbackError
from sdpo_plugin.monitoring.masking import masked
from sdpo_plugin.openrlhf_adapter.patch_points import TESTED, SeamError

SOFTWARE, SETTINGS, REWARD, MACHINE, STOPPED = 1, 2, 3, 4, 5
# Ray's, of an exception that cannot be pickled: its type, and its traceback, which ends with its words.
UNSENT = re.compile(r"Exception (\S+) isn't serializable: .*?\nOriginal exception details:\n(.*)", re.DOTALL)
FRAME = re.compile(r'File "(.+?)", line (\d+), in (\S+)')
LOST = re.compile("Connection (closed|reset) by peer|Broken pipe|ncclRemoteError|remote process exited")
# What torch, DeepSpeed and numpy say where a file cannot be written to its end, and torch of one that has none.
UNWRITTEN = re.compile(
    r"PytorchStreamWriter failed|inline_container\S* \. unexpected pos|No space left on device|Disk quota exceeded|"
    r"File too large|\d+ requested and \d+ written"
)
UNREAD = re.compile("PytorchStreamReader failed|unexpected EOF|pickle data was truncated")
NO_ROOM = (
    "lower --train.micro_batch_size and --rollout.micro_batch_size, --teacher.max_tokens_per_gpu or "
    "--vllm.gpu_memory_utilization, or use --teacher.offload; openrlhf-sdpo doctor --config RECIPE shows what takes it"
)
NO_DISK = (
    "make room, or give another --ckpt.path and --ckpt.output_dir; --ckpt.load_enable goes on from the last checkpoint"
)


class RewardError(RuntimeError):
    """A reward function or an agent failed; OpenRLHF alone would go on without a reward.

    The first line says what happened, the rest is the traceback.
    """


class NotFinite(RuntimeError):
    """A loss or a gradient is infinite or NaN, and with it the weights."""


class MetricsDiffer(RuntimeError):
    """Ranks report metrics of different names, which OpenRLHF would add up without end, or to the wrong one."""


@dataclass(frozen=True)
class Failure:
    """`what` went wrong, `where` (of the last frame, or of the actor) and what to do (`fix`), "" where unknown."""

    code: int
    what: str
    where: str = ""
    fix: str = ""


def causes(error: BaseException) -> list[BaseException]:
    """`error`, and what is inside, to what was raised first: Ray wraps an error once for every actor it goes through.

    Of an actor whose constructor raised, it says that the actor died, and keeps the constructor's error in `args`.
    """
    found = [error]
    while True:
        died_of = found[-1].args[:1] if getattr(found[-1], "_actor_init_failed", False) else ()
        inner = getattr(found[-1], "cause", None) or next(iter(died_of), None)
        if not isinstance(inner, BaseException):
            return found
        found.append(inner)


def explain(error: BaseException) -> Failure:
    """An error of the launcher, or one that Ray brought from an actor."""
    chain, text = causes(error), "".join(traceback.format_exception(error))
    cause = chain[-1]
    kind, said = type(cause).__name__, str(cause).strip() or "(no message)"
    if unsent := UNSENT.fullmatch(said):
        kind, said = unsent[1].rpartition(".")[2], " ".join(unsent[2].rpartition(f"{unsent[1]}: ")[2].split())
    raised_in = next((e for e in chain if hasattr(e, "traceback_str")), None)
    actor = str(getattr(raised_in, "proctitle", getattr(raised_in, "function_name", "")))
    if isinstance(cause, ConfigError):
        return Failure(SETTINGS, said, actor)
    if isinstance(cause, StopTraining):
        return Failure(STOPPED, f"stopped: {said}")
    if isinstance(cause, RewardError):
        first, _, trace = said.partition("\n")
        return Failure(REWARD, first, last_frame(trace), "correct it, or --reward.on_error skip")
    if isinstance(cause, FeedbackError):
        return Failure(REWARD, said)
    if isinstance(cause, SeamError):
        return Failure(SOFTWARE, said, fix=f"pip install openrlhf=={TESTED[-1]}")
    if found := re.search(r"CPU mode was asked for.*", text):
        return Failure(SETTINGS, found[0])
    if kind == "OutOfMemoryError" or "out of memory" in said.lower():
        return Failure(MACHINE, f"out of memory: {said.splitlines()[0]}", actor or last_frame(text), NO_ROOM)
    if actor.endswith("Engine.__init__"):
        reason = " ".join(said[:500].split())
        return Failure(
            SETTINGS, f"vLLM cannot serve --actor.model_name_or_path with these flags: {kind}: {reason}", actor,
            "correct the --vllm.* flag or the model that it names; vLLM's own lines are above",
        )  # fmt: skip
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return Failure(MACHINE, said, last_frame(text), NO_DISK)
    if UNWRITTEN.search(said):
        what = f"a file could not be written to its end (is the disk full?): {said.splitlines()[0][:300]}"
        return Failure(MACHINE, what, last_frame(text), NO_DISK)
    if UNREAD.search(said):
        return Failure(
            MACHINE, f"a file of the checkpoint is damaged: {said.splitlines()[0][:300]}", last_frame(text),
            "write the name of an older checkpoint into the file `latest` beside it",
        )  # fmt: skip
    if isinstance(cause, RuntimeError) and "loading state_dict" in said:
        begins = [line.strip() for line in said.splitlines()[:2]]
        return Failure(
            SETTINGS, f"--ckpt.load_enable: the checkpoint is of another model: {' '.join(begins)[:300]}", actor,
            "give its --actor.model_name_or_path, or another --ckpt.path",
        )  # fmt: skip
    if isinstance(cause, NotFinite):
        return Failure(
            SETTINGS, said, actor,
            "lower --actor.adam.lr or --actor.max_norm, or look at what plugins add to the loss; --ckpt.load_enable "
            "goes on from the last checkpoint",
        )  # fmt: skip
    if isinstance(cause, MetricsDiffer):
        return Failure(
            SOFTWARE, said, actor,
            "let the plugin give every micro-batch the same names on every rank (of no tokens: mean(name, 0, 0))",
        )  # fmt: skip
    if kind in ("EngineDeadError", "EngineGenerateError"):
        return Failure(
            MACHINE, f"a rollout engine died: {said.splitlines()[0]}", actor,
            "its own last lines are above; lower --vllm.gpu_memory_utilization if it had no memory",
        )  # fmt: skip
    if kind in ("ActorDiedError", "ActorUnavailableError", "RayActorError", "WorkerCrashedError", "NodeDiedError"):
        who = re.search(r"class_name: (\S+)", said)
        why = re.search(r"(?:The actor died because|Worker exit detail:|The actor is dead because) *(.*)", said)
        name, reason = who[1] if who else "a worker", why[1] if why else said.splitlines()[0]
        return Failure(
            MACHINE, f"{name} died: {reason.partition(' Some common causes')[0][:300]}", "",
            "look at the node's memory (dmesg); --ckpt.load_enable goes on from the last checkpoint",
        )  # fmt: skip
    if isinstance(cause, RuntimeError) and LOST.search(said):
        return Failure(
            MACHINE, f"a process died that {actor or 'the run'} was talking to: {said.splitlines()[0][:200]}", "",
            "its own last lines are above; look at the node's memory (dmesg)",
        )  # fmt: skip
    if isinstance(cause, AssertionError) and "openrlhf/cli" in text:
        return Failure(SETTINGS, said, last_frame(text))  # OpenRLHF's launcher checks flags in this way
    what = f"{kind}: {said.splitlines()[0][:500]}"
    return Failure(SOFTWARE, what, last_frame(text) or actor, "report it, with the file below")


def last_frame(text: str) -> str:
    """`file, line n, in function` of the innermost frame in a traceback."""
    frames = FRAME.findall(text)
    return "{}, line {}, in {}".format(*frames[-1]) if frames else ""


def told(error: BaseException) -> tuple[int, str]:
    """The exit code and the message of an error; what came out of a run also goes to a file, whole but for secrets."""
    failure = explain(error)
    lines = [f"openrlhf-sdpo: {'' if failure.code == STOPPED else 'error: '}{failure.what}"]
    if failure.where:
        lines.append(f"  where: {failure.where}")
    if failure.fix:
        lines.append(f"  fix:   {failure.fix}")
    if failure.code not in (STOPPED, SETTINGS) or hasattr(error, "traceback_str"):
        lines.append(f"  all:   {_kept(error)}")
    return failure.code, masked("\n".join(lines))


def _kept(error: BaseException) -> str:
    """The path of a file with the traceback, for its owner only, or the traceback where none can be written."""
    text = masked("".join(traceback.format_exception(error)))
    try:
        number, path = tempfile.mkstemp(".log", f"openrlhf-sdpo-{time.strftime('%Y%m%d-%H%M%S')}-")
        with open(number, "w", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return f"\n{text}"
    return path
