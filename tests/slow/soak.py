"""The quickstart's model trained for hours, with checkpoints, evaluations and kills: `make soak`.

    python tests/slow/soak.py [--minutes 120] [--kill-minutes 40]

Every 10 s it measures memory, open files and CPU time of each kind of process, and disk usage, into
runs/soak/noted.jsonl. Every `--kill-minutes` all processes of the run are killed, and the run is resumed with
`--ckpt.load_enable`. If this script is stopped and started again, it continues until there are `--minutes` of training
in total. Writes docs/validation/soak.md and docs/validation/soak.png from all measurements.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy
import psutil
from matplotlib import pyplot

from sdpo_plugin.report import read_scalars

ROOT = Path(__file__).parents[2]
OUT = ROOT / "runs" / "soak"
NOTED = OUT / "noted.jsonl"
# Ray's sockets are below it, and a socket's path is short. It holds all that a run writes outside of OUT.
TEMPORARY = Path(tempfile.gettempdir()) / "openrlhf-sdpo-soak"
EVERY_S = 10.0
LEAST_STEPS = 200  # of a start whose growth is counted
MIB = 2**20
STEPPED = re.compile(r"Global step (\d+):")
# By what a process calls itself; the first that fits. What fits none is "other".
KINDS = {
    "controller": "ray::Controller", "policy worker": "ray::PolicyWorker", "engine": "ray::Engine|VLLM::|EngineCore",
    "other Ray workers": "ray::|default_worker.py", "raylet": "raylet/raylet", "GCS": "gcs_server",
    "Ray's agents": "ray/dashboard|log_monitor.py|runtime_env|ray_process_reaper", "launcher": "-m sdpo_plugin train",
}  # fmt: skip
FLAGS = (
    "--teacher.kind", "ema", "--teacher.update_rate", "0.005", "--train.num_episodes", "1000000",
    "--ckpt.save_steps", "50", "--ckpt.max_num", "3", "--ckpt.load_enable", "--eval.steps", "50",
    f"--ckpt.path={OUT / 'checkpoints'}", f"--ckpt.output_dir={OUT / 'model'}",
    f"--logger.tensorboard_dir={OUT / 'tensorboard'}",
)  # fmt: skip


def kind_of(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, command)), "other")


def held(group: int) -> dict[str, dict[str, float]]:
    """By kind of process: how many there are, and their sums of MiB of their own, open files, threads, CPU seconds."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) != group and not _below(process, group):
                continue
            kind, cpu = kind_of(process), process.cpu_times()
            values = {
                "processes": 1, "mib": process.memory_full_info().uss / MIB, "files": process.num_fds(),
                "threads": process.num_threads(), "cpu_s": cpu.user + cpu.system,
            }  # fmt: skip
            for name, value in values.items():
                found[kind][name] += value
    return found


def _below(process: psutil.Process, group: int) -> bool:
    return any(parent.pid == group for parent in process.parents())


def size(directory: Path) -> float:
    """MiB of all files below it that are still there when they are looked at."""
    total = 0
    for at, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(at, name)).st_size
    return total / MIB


def on_disk() -> dict[str, float]:
    checkpoints = OUT / "checkpoints" / "_actor"
    return {
        "checkpoints": size(checkpoints), "number of checkpoints": len(list(checkpoints.glob("global_step*"))),
        "TensorBoard": size(OUT / "tensorboard"), "Ray's session directories": size(TEMPORARY / "ray"),
        "other temporary files": size(TEMPORARY) - size(TEMPORARY / "ray"),
    }  # fmt: skip


def noted() -> list[dict[str, Any]]:
    if not NOTED.exists():
        return []
    lines = NOTED.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}}")]  # the last one may be half


def minutes(notes: list[dict[str, Any]]) -> float:
    """Of training, all starts together."""
    return sum({note["start"]: note["seconds"] for note in notes}.values()) / 60


def end(group: int) -> None:
    """Kill every process of the run, Ray's included, as a machine that goes down does."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(group).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def follow(log: Any, path: Path, at: dict[str, int]) -> None:
    with open(path, "w") as file:
        for line in log:
            file.write(line)
            file.flush()
            if step := STEPPED.search(line):
                at["step"] = int(step[1])


def train(start: int, seconds: float) -> None:
    """One start of the run, killed after `seconds`; it ends by itself only if it fails."""
    command = [sys.executable, "-m", "sdpo_plugin", "train", "--platform", "cpu", "--config",
               str(ROOT / "recipes" / "quickstart" / "sdpo.yaml"), *FLAGS]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(TEMPORARY)}
    environment.pop("RAY_ADDRESS", None)
    began, at = time.monotonic(), {}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    (OUT / "pid").write_text(str(process.pid))
    log = OUT / f"log{start}.txt"
    threading.Thread(target=follow, args=(process.stdout, log, at), daemon=True).start()
    try:
        while process.poll() is None and time.monotonic() - began < seconds:
            time.sleep(EVERY_S)
            if at:
                note = {"start": start, "seconds": time.monotonic() - began, "step": at["step"],
                        "load": os.getloadavg()[0], "processes": held(process.pid), "disk": on_disk()}  # fmt: skip
                with open(NOTED, "a") as file:
                    file.write(json.dumps(note) + "\n")
                print(f"start {start}, {note['seconds']:.0f} s: step {at['step']}", flush=True)
        if process.poll() is not None:
            sys.exit(f"the run ended by itself with {process.returncode}; see {log}")
    finally:
        end(process.pid)
        process.wait()


def later_halves(notes: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The measurements in the second half of each start's steps; in the first half, caches fill."""
    starts = defaultdict(list)
    for note in notes:
        starts[note["start"]].append(note)
    found = {}
    for start, of in starts.items():
        first, last = of[0]["step"], of[-1]["step"]
        if last - first >= LEAST_STEPS:
            found[start] = [note for note in of if note["step"] >= (first + last) / 2]
    if not found:
        sys.exit(f"{NOTED}: no start of {LEAST_STEPS} steps yet")
    return found


def slope(starts: list[tuple[list[float], list[float]]]) -> tuple[float, float]:
    """Of y over x by least squares, each start with a level of its own; per 1000, and its standard error.

    The error is that of independent residuals. Neighbours in time are alike, so it is a lower bound.
    """
    x = numpy.concatenate([numpy.asarray(x) - numpy.mean(x) for x, _ in starts]) / 1000
    y = numpy.concatenate([numpy.asarray(y) - numpy.mean(y) for _, y in starts])
    rate = (x @ y) / (x @ x)
    residual = y - rate * x
    return rate, float(numpy.sqrt((residual @ residual) / max(len(x) - len(starts) - 1, 1) / (x @ x)))


def growth(starts: dict[int, list[dict[str, Any]]], value: Any) -> tuple[float, float, float]:
    """Median of `value(note)`, its slope per 1000 steps and that slope's standard error."""
    points = [([note["step"] for note in of], [value(note) for note in of]) for of in starts.values()]
    return statistics.median(v for _, values in points for v in values), *slope(points)


def step_times(starts: dict[int, list[dict[str, Any]]]) -> list[tuple[int, int, float, float, float]]:
    """Between two notes of one start: start, step, seconds a step, CPU seconds a step, machine's load."""
    found = []
    for start, notes in starts.items():
        for before, after in zip(notes, notes[1:], strict=False):
            if steps := after["step"] - before["step"]:
                cpu = [sum(kind["cpu_s"] for kind in note["processes"].values()) for note in (before, after)]
                wall = after["seconds"] - before["seconds"]
                found.append((start, after["step"], wall / steps, (cpu[1] - cpu[0]) / steps, after["load"]))
    return found


def page(notes: list[dict[str, Any]]) -> str:
    starts = later_halves(notes)
    last, used = notes[-1], sum(len(of) for of in starts.values())
    accuracy = read_scalars(str(OUT / "tensorboard"))["eval/eval_default_pass1"]
    lines = [
        "# Long runs", "",
        "Generated by `make soak`, which trains the quickstart's model on CPU (EMA teacher, a checkpoint and an",
        "evaluation every 50 steps), and repeatedly kills all its processes and resumes it with",
        "`--ckpt.load_enable`.", "",
        f"{minutes(notes):.0f} minutes of training, {last['step']} steps, {last['start']} starts, {len(accuracy)} "
        "evaluations.", "",
        f"The tables cover the second half of each start of at least {LEAST_STEPS} steps: {used} measurements, one "
        f"every {EVERY_S:.0f} s.",
        "Growth is per 1000 steps: a least-squares slope with one level per start, ± its standard error.", "",
        "![Memory, open files and step time over the steps](soak.png)", "",
        "## Memory and open files", "",
        "| process | number | own memory (USS), MiB | growth, MiB | open files | growth |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for kind in [k for k in [*KINDS, "other"] if k in last["processes"]]:
        at = lambda name: lambda note: note["processes"].get(kind, {}).get(name, 0.0)  # noqa: B023, E731
        number, memory, files = (growth(starts, at(name)) for name in ("processes", "mib", "files"))
        lines.append(
            f"| {kind} | {number[0]:.0f} | {memory[0]:.0f} | {memory[1]:+.2f} ± {memory[2]:.2f} | {files[0]:.0f} | "
            f"{files[1]:+.2f} ± {files[2]:.2f} |"
        )
    times = step_times(starts)
    by_start = {start: [t for t in times if t[0] == start] for start in starts}
    lines += ["", "## Step time", "", "| per step | median | growth |", "| --- | --- | --- |"]
    for name, column in (("seconds", 2), ("CPU seconds, all processes", 3)):
        points = [([t[1] for t in of], [t[column] for t in of]) for of in by_start.values() if len(of) > 2]
        rate, error = slope(points)
        lines.append(f"| {name} | {statistics.median(t[column] for t in times):.2f} | {rate:+.3f} ± {error:.3f} |")
    load = f"{statistics.median(t[4] for t in times):.1f} on {os.cpu_count()} cores"
    lines += ["", f"The machine's load was {load}; the run had {len(os.sched_getaffinity(0))} of them.", ""]
    lines += ["## Disk", "", "| on disk | at the end, MiB | growth, MiB |", "| --- | --- | --- |"]
    for name in last["disk"]:
        rate = growth(starts, lambda note: note["disk"][name])  # noqa: B023
        lines.append(f"| {name} | {last['disk'][name]:.1f} | {rate[1]:+.2f} ± {rate[2]:.2f} |")
    kept = FLAGS[FLAGS.index("--ckpt.max_num") + 1]
    lines += [
        "", f"{kept} checkpoints are kept (`--ckpt.max_num`), and one more while a checkpoint is saved. TensorBoard's",
        "files and Ray's logs grow with the number of steps. Each start leaves a session directory of Ray (in",
        "`/tmp/ray`, or `$TMPDIR/ray`). Ray's GCS stores the last 100,000 tasks",
        "(`RAY_task_events_max_num_task_in_gcs`) and grows until then. The memory of a vLLM engine grows to the size",
        "of its KV cache as the cache fills.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(notes: list[dict[str, Any]], path: Path) -> None:
    starts = {start: [note for note in notes if note["start"] == start] for start in later_halves(notes)}
    figure, (memory, files, speed) = pyplot.subplots(3, 1, figsize=(8, 9), layout="constrained", sharex=True)
    shown = [kind for kind in KINDS if kind in notes[-1]["processes"]]
    for color, kind in enumerate(shown):
        for number, of in enumerate(starts.values()):
            at = [note["step"] for note in of]
            for axes, name in ((memory, "mib"), (files, "files")):
                values = [note["processes"].get(kind, {}).get(name, numpy.nan) for note in of]
                axes.plot(at, values, color=f"C{color}", label=kind if number == 0 else None)
    times = step_times(starts)
    speed.plot([t[1] for t in times], [t[2] for t in times], ".", markersize=3, label="seconds")
    speed.plot([t[1] for t in times], [t[3] for t in times], ".", markersize=3, label="seconds of CPU")
    memory.set(ylabel="own memory (USS), MiB", yscale="log")
    files.set(ylabel="open files", yscale="log")
    speed.set(ylabel="a step", xlabel="step", ylim=(0, 4 * statistics.median(t[2] for t in times)))
    for axes in (memory, files, speed):
        for of in list(starts.values())[1:]:
            axes.axvline(of[0]["step"], color="gray", linewidth=0.5, linestyle=":")  # a start after a kill
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120, help="minutes of training, including earlier calls")
    parser.add_argument("--kill-minutes", type=float, default=40)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the next call continues"))
    OUT.mkdir(parents=True, exist_ok=True)
    TEMPORARY.mkdir(exist_ok=True)
    if (OUT / "pid").exists():  # the run of a call that was killed
        pid = int((OUT / "pid").read_text())
        with contextlib.suppress(psutil.NoSuchProcess):
            if str(OUT) in " ".join(psutil.Process(pid).cmdline()):
                end(pid)
    subprocess.run([sys.executable, ROOT / "recipes/quickstart/vault.py", ROOT / "runs/quickstart"], check=True)
    try:
        while (left := args.minutes - minutes(notes := noted())) > 0.1:
            train(max((note["start"] for note in notes), default=0) + 1, min(left, args.kill_minutes) * 60)
    finally:
        if notes := noted():
            (ROOT / "docs/validation/soak.md").write_text(page(notes))
            plot(notes, ROOT / "docs/validation/soak.png")
            print(page(notes))


if __name__ == "__main__":
    main()
