"""How a run that fails ends: one message (what, where, how to fix it), a file with the traceback, an exit code."""

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
from sdpo_plugin.openrlhf_adapter.patch_points import TESTED, IncompatibleOpenRLHF

SOFTWARE, SETTINGS, REWARD, MACHINE, STOPPED = 1, 2, 3, 4, 5
EXIT_CODES = {
    0: "success",
    SOFTWARE: "a fault of the software: this package, OpenRLHF or a plugin",
    SETTINGS: "a fault in your settings or data",
    REWARD: "a fault in your reward function or agent",
    MACHINE: "a fault of the machine: memory, disk, or a process or node that died",
    STOPPED: "stopped by the collapse monitor or a plugin, after its last step was saved",
    130: "interrupted (Ctrl-C)",
}
# Ray's message for an exception that cannot be pickled: its type, and its traceback, which ends with its message.
UNSENT = re.compile(r"Exception (\S+) isn't serializable: .*?\nOriginal exception details:\n(.*)", re.DOTALL)
FRAME = re.compile(r'File "(.+?)", line (\d+), in (\S+)')
LOST = re.compile("Connection (closed|reset) by peer|Broken pipe|ncclRemoteError|remote process exited")
# Messages of torch, DeepSpeed and numpy if a file cannot be written completely, and of torch if one is incomplete.
UNWRITTEN = re.compile(
    r"PytorchStreamWriter failed|inline_container\S* \. unexpected pos|No space left on device|Disk quota exceeded|"
    r"File too large|\d+ requested and \d+ written"
)
UNREAD = re.compile("PytorchStreamReader failed|unexpected EOF|pickle data was truncated")
NO_ROOM = (
    "lower --train.micro_batch_size and --rollout.micro_batch_size, --teacher.max_tokens_per_gpu or "
    "--vllm.gpu_memory_utilization, or use --teacher.offload; openrlhf-sdpo doctor --config RECIPE.yaml estimates "
    "the memory of each part"
)
NO_DISK = (
    "make room, or give another --ckpt.path and --ckpt.output_dir; --ckpt.load_enable resumes from the last checkpoint"
)


class RewardError(RuntimeError):
    """A reward function or an agent failed; OpenRLHF alone would continue without a reward.

    The first line describes what happened, the rest is the traceback.
    """


class TeacherError(RuntimeError):
    """A server that scores for the teacher (`--teacher.url`) failed, after all attempts."""


class NotFinite(RuntimeError):
    """A loss or a gradient is infinite or NaN, and with it the weights."""


class MetricsDiffer(RuntimeError):
    """Ranks report metrics of different names; OpenRLHF would wait forever, or add up different metrics."""


@dataclass(frozen=True)
class Failure:
    """`what` went wrong, `where` (the last frame, or the actor) and how to fix it (`fix`); "" where unknown."""

    code: int
    what: str
    where: str = ""
    fix: str = ""


def causes(error: BaseException) -> list[BaseException]:
    """`error` and the errors in it, down to the one raised first: Ray wraps an error once for every actor it passes.

    If an actor's constructor raised, Ray reports that the actor died; the constructor's error is in `args`.
    """
    found = [error]
    while True:
        died_of = found[-1].args[:1] if getattr(found[-1], "_actor_init_failed", False) else ()
        inner = getattr(found[-1], "cause", None) or next(iter(died_of), None)
        if not isinstance(inner, BaseException):
            return found
        found.append(inner)


# Long: a list of known errors, in the order in which they are checked.
def classify_error(error: BaseException) -> Failure:
    """What happened, from an error of the launcher or one that Ray passed on from an actor."""
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
        return Failure(REWARD, first, last_frame(trace), "correct the function, or give --reward.on_error skip")
    if isinstance(cause, TeacherError):
        return Failure(MACHINE, said, fix="start the server again; --ckpt.load_enable resumes from the last checkpoint")
    if isinstance(cause, FeedbackError):
        return Failure(REWARD, said)
    if isinstance(cause, IncompatibleOpenRLHF):
        return Failure(SOFTWARE, said, fix=f"pip install openrlhf=={TESTED[-1]}")
    if found := re.search(r"CPU mode was requested.*", text):
        return Failure(SETTINGS, found[0])
    if kind == "OutOfMemoryError" or "out of memory" in said.lower():
        return Failure(MACHINE, f"out of memory: {said.splitlines()[0]}", actor or last_frame(text), NO_ROOM)
    if actor.endswith("Engine.__init__"):
        reason, what = " ".join(said[:500].split()), "vLLM cannot serve --actor.model_name_or_path with these flags"
        if "TeacherEngine" in actor:
            what = "vLLM cannot serve the teacher of --teacher.scored_by engine with these flags"
        return Failure(
            SETTINGS, f"{what}: {kind}: {reason}", actor,
            "correct the --vllm.* or --teacher.* flag or the model; vLLM's own messages are above",
        )  # fmt: skip
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return Failure(MACHINE, said, last_frame(text), NO_DISK)
    if UNWRITTEN.search(said):
        what = f"a file could not be written completely (is the disk full?): {said.splitlines()[0][:300]}"
        return Failure(MACHINE, what, last_frame(text), NO_DISK)
    if UNREAD.search(said):
        return Failure(
            MACHINE, f"a file of the checkpoint is damaged: {said.splitlines()[0][:300]}", last_frame(text),
            "write the name of an older checkpoint into the file `latest` in the same directory",
        )  # fmt: skip
    if isinstance(cause, RuntimeError) and "loading state_dict" in said:
        begins = [line.strip() for line in said.splitlines()[:2]]
        return Failure(
            SETTINGS, f"--ckpt.load_enable: the checkpoint belongs to another model: {' '.join(begins)[:300]}", actor,
            "give the checkpoint's --actor.model_name_or_path, or another --ckpt.path",
        )  # fmt: skip
    if isinstance(cause, NotFinite):
        return Failure(
            SETTINGS, said, actor,
            "lower --actor.adam.lr or --actor.max_norm, or check what plugins add to the loss; --ckpt.load_enable "
            "resumes from the last checkpoint",
        )  # fmt: skip
    if isinstance(cause, MetricsDiffer):
        return Failure(
            SOFTWARE, said, actor,
            "in the plugin, report the same names for every micro-batch on every rank: log_mean(name, 0, 0) if there "
            "are no tokens",
        )  # fmt: skip
    if kind in ("EngineDeadError", "EngineGenerateError"):
        return Failure(
            MACHINE, f"a vLLM engine died: {said.splitlines()[0]}", actor,
            "see its last lines above; if it ran out of memory, lower --vllm.gpu_memory_utilization",
        )  # fmt: skip
    if kind in ("ActorDiedError", "ActorUnavailableError", "RayActorError", "WorkerCrashedError", "NodeDiedError"):
        who = re.search(r"class_name: (\S+)", said)
        why = re.search(r"(?:The actor died because|Worker exit detail:|The actor is dead because) *(.*)", said)
        name, reason = who[1] if who else "a worker", why[1] if why else said.splitlines()[0]
        return Failure(
            MACHINE, f"{name} died: {reason.partition(' Some common causes')[0][:300]}", "",
            "check the node's memory (dmesg); --ckpt.load_enable resumes from the last checkpoint",
        )  # fmt: skip
    if isinstance(cause, RuntimeError) and LOST.search(said):
        return Failure(
            MACHINE, f"a process died that {actor or 'the run'} was talking to: {said.splitlines()[0][:200]}", "",
            "see its last lines above, and check the node's memory (dmesg)",
        )  # fmt: skip
    if isinstance(cause, AssertionError) and "openrlhf/cli" in text:
        return Failure(SETTINGS, said, last_frame(text))  # OpenRLHF's launcher checks flags with assertions
    what = f"{kind}: {said.splitlines()[0][:500]}"
    return Failure(SOFTWARE, what, last_frame(text) or actor, "report it, with the file below")


def last_frame(text: str) -> str:
    """`file, line n, in function` of the innermost frame in a traceback."""
    frames = FRAME.findall(text)
    return "{}, line {}, in {}".format(*frames[-1]) if frames else ""


def format_error(error: BaseException) -> tuple[int, str]:
    """The exit code and the message of an error. A traceback goes to a file, without secrets."""
    failure = classify_error(error)
    lines = [f"openrlhf-sdpo: {'' if failure.code == STOPPED else 'error: '}{failure.what}"]
    if failure.where:
        lines.append(f"  where: {failure.where}")
    if failure.fix:
        lines.append(f"  fix:   {failure.fix}")
    if failure.code not in (STOPPED, SETTINGS) or hasattr(error, "traceback_str"):
        lines.append(f"  all:   {_kept(error)}")
    return failure.code, masked("\n".join(lines))


def _kept(error: BaseException) -> str:
    """The path of a file with the traceback, readable by its owner only; the traceback if none can be written."""
    text = masked("".join(traceback.format_exception(error)))
    try:
        number, path = tempfile.mkstemp(".log", f"openrlhf-sdpo-{time.strftime('%Y%m%d-%H%M%S')}-")
        with open(number, "w", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return f"\n{text}"
    return path
