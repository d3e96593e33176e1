"""`openrlhf-sdpo doctor`: checks of this machine or cluster, and of a run on it, before anything is started.

With `--smoke-test`, `testing/selfcheck.py` trains a small model, in processes of its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sdpo_plugin import plugins
from sdpo_plugin.config import (
    ConfigError,
    RepromptConfig,
    flat,
    from_namespace,
)
from sdpo_plugin.distillation.chat_arguments import chat_template_kwargs, teacher_chat_template_kwargs
from sdpo_plugin.monitoring.masking import masked
from sdpo_plugin.openrlhf_adapter import patch_points
from sdpo_plugin.openrlhf_adapter.launcher import memory
from sdpo_plugin.openrlhf_adapter.platform import cluster

TESTED = {
    "openrlhf": patch_points.TESTED[0], "vllm": "0.29.0", "ray": "2.55.0", "deepspeed": "0.19.6", "torch": "2.13.0",
    "transformers": "5.15.0",
}  # fmt: skip
PASS, WARN, FAIL = "pass", "warn", "fail"
COLOURS = {PASS: "green", WARN: "yellow", FAIL: "red"}
GIB = 2**30
SHOWN_ROWS, LENGTH_ROWS, SHOWN_CHARACTERS = 3, 1000, 600


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    about: str
    status: str
    found: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its own flags; all others are those of `train`."""
    own = "[--smoke-test] [--json FILE] [--rows]"
    parser.usage = f"{parser.prog} {own} [--config RECIPE.yaml ...] [OPTION of train ...]"
    parser.add_argument(
        "--smoke-test", action="store_true", help="also train a small model with the launch options of the recipe or "
        "the flags, which takes minutes",
    )  # fmt: skip
    parser.add_argument("--json", default="doctor.json", metavar="FILE", help="file for the results as JSON")
    parser.add_argument(
        "--rows", action="store_true", help="include the teacher's prompts in the JSON file; they contain your data"
    )


def doctor(parsed: argparse.Namespace, recipe: list[str]) -> None:
    """Print what was found, write `doctor.json`, and exit with 2 if a check failed.

    Args:
        parsed: the values of `add_arguments`. recipe: the flags of `train`.
    """
    console = Console(highlight=False)
    report: dict[str, Any] = {"checks": []}

    def show(title: str, checks: Iterable[Check]) -> None:
        table = Table("", "", "", title=title, title_justify="left", show_header=False, box=None)
        for check in checks:
            table.add_row(f"[{COLOURS[check.status]}]{check.status}", check.about, escape(masked(check.found)))
            report["checks"].append({"title": title, **asdict(check)})
        console.print(table)

    show("This machine", [*versions(), *machine()])
    joined, cpu = None, True
    try:
        joined = cluster.joined()
        from sdpo_plugin.openrlhf_adapter.launcher import launch

        cpu = cluster.on_cpu(launch.early(recipe)[0].platform, joined)
        show("Ray", [ray_view(joined, cpu)])
    except ConfigError as error:
        show("Ray", [Check("cluster", FAIL, str(error))])
    show("OpenRLHF", openrlhf(cpu))
    failed = any(check["status"] == FAIL for check in report["checks"])
    if recipe and not failed:
        show("The run", run(recipe, joined, cpu, console, report))
    if parsed.smoke_test and not failed:
        smoke_test(recipe, cpu, report, show)
    write(report, parsed.json, parsed.rows)
    failures = sum(check["status"] == FAIL for check in report["checks"])
    console.print(f"failed checks: {failures}; details are in {parsed.json}")
    if failures:
        sys.exit(2)


def write(report: dict[str, Any], path: str, rows: bool) -> None:
    """The report as JSON, without secrets and, unless `rows`, without the user's data; for its owner only."""
    prompts = report.get("teacher_prompts", [])
    shown = [{name: value for name, value in one.items() if rows or name != "prompt"} for one in prompts]
    try:
        with open(path, "w", opener=lambda name, how: os.open(name, how, 0o600)) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # one that was there keeps its mode
                os.fchmod(file.fileno(), 0o600)
            json.dump(masked(report | {"teacher_prompts": shown}), file, indent=1, default=lambda x: masked(str(x)))
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written to ({error.strerror}); give another file") from error


# ── the machine ──


def versions() -> Iterable[Check]:
    yield Check("python", PASS, f"{platform.python_version()} on {platform.platform()}")
    for name, tested in TESTED.items():
        found = next((v for v in map(_version, (name, f"{name}-cpu")) if v is not None), None)
        if found is None:
            yield Check(name, FAIL, f"not installed; tested with {tested}")
        elif found.split("+")[0] == tested:
            yield Check(name, PASS, found)
        else:
            yield Check(name, WARN, f"{found}; tested with {tested}")
    hook = Path(sysconfig.get_paths()["purelib"]) / "sdpo_plugin_startup.pth"
    if hook.exists():
        yield Check("start-up hook", PASS, "python -m openrlhf.cli.train_ppo_ray --algo works")
    else:
        yield Check(
            "start-up hook", WARN, f"{hook} does not exist, so python -m openrlhf.cli.train_ppo_ray has no --algo; use "
            "openrlhf-sdpo train, or install the package (a checkout that is not installed has no hook)",
        )  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> Iterable[Check]:
    import psutil

    try:
        import torch

        devices = range(torch.cuda.device_count())
    except ImportError:
        devices = range(0)
    for i in devices:
        free, size = torch.cuda.mem_get_info(i)
        capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
        name = f"{torch.cuda.get_device_name(i)} (sm {capability}), {free / GIB:.1f} of {size / GIB:.1f} GiB free"
        yield Check(f"GPU {i}", PASS if free > 0.9 * size else WARN, name)
    if not devices:
        yield Check("GPU", PASS, "none with CUDA: OpenRLHF runs on the CPU here, for trying and testing")
    elif (flash_attn := _version("flash-attn")) is None:
        yield Check("flash-attn", WARN, "not installed; OpenRLHF imports it, and --ds.packing_samples needs it")
    else:
        yield Check("flash-attn", PASS, flash_attn)
    free = psutil.virtual_memory()
    enough = PASS if free.available > 8 * GIB else WARN
    text = f"{free.available / GIB:.1f} of {free.total / GIB:.1f} GiB free, {os.cpu_count()} CPUs"
    yield Check("memory", enough, text)
    for path, least in ((".", 20), ("/dev/shm", 2), ("/tmp", 5)):
        if os.path.exists(path):
            left = shutil.disk_usage(path).free / GIB
            text = f"{left:.1f} GiB free at {os.path.abspath(path)}"
            yield Check("disk", PASS if left > least else WARN, text if left > least else f"{text}, below {least} GiB")


def ray_view(joined: cluster.Cluster | None, cpu: bool) -> Check:
    where = "on the CPU" if cpu else "on CUDA"
    if joined is None:
        return Check("cluster", PASS, f"no running cluster: the run starts one on this machine, {where}")
    found = f"{joined.address}, {joined.nodes} nodes, {joined.gpus} GPUs: the run joins it, {where}"
    if not joined.gpus:
        return Check("cluster", FAIL, f"{found}; declare GPUs, on the CPU made-up ones: ray start --num-gpus N")
    return Check("cluster", PASS, found)


def openrlhf(cpu: bool) -> Iterable[Check]:
    if cpu:
        from sdpo_plugin.openrlhf_adapter.platform import cpu as cpu_mode

        cpu_mode.enable()
    try:
        from sdpo_plugin.openrlhf_adapter.launcher import install  # noqa: F401

        patch_points.check()
        yield Check("patch points", PASS, f"all {len(patch_points.PATCH_POINTS)} found")
    except (ImportError, AttributeError, patch_points.IncompatibleOpenRLHF) as error:
        yield Check("patch points", FAIL, str(error))
    for found in plugins.load()[1]:
        yield Check("plugin", PASS if found.problem is None else WARN, str(found))


# ── a recipe ──


def run(
    recipe: list[str], joined: cluster.Cluster | None, cpu: bool, console: Console, report: dict[str, Any]
) -> Iterable[Check]:
    from sdpo_plugin.openrlhf_adapter.launcher import launch, preflight, ring

    try:
        args, defaults = launch.parsed(recipe, cpu)
    except ConfigError as error:
        yield Check("flags", FAIL, str(error))
        return
    except SystemExit:
        yield Check("flags", FAIL, "rejected by OpenRLHF's parser; see its message above")
        return
    given = flat(args)
    report["flags"] = given
    changed = {name: value for name, value in given.items() if name not in defaults or value != defaults[name]}
    table = Table("flag", "value", title="Flags that differ from OpenRLHF's defaults", title_justify="left", box=None)
    for name, value in sorted(changed.items()):
        table.add_row(f"--{name}", escape(_cut(repr(masked(value, name)), 100)))
    console.print(table)
    checks: dict[str, Callable[[], Any]] = {
        "GPUs": lambda: cluster.require_gpus(args, joined, cpu),
        "output": lambda: preflight.writable("--ckpt.output_dir", args.ckpt.output_dir),
        "reward": lambda: preflight.reward(args),
        "model": lambda: preflight.model("--actor.model_name_or_path", args.actor.model_name_or_path),
        "tokenizer": lambda: preflight.tokenizer(args),
        "data": lambda: preflight.data(args),
    }
    if args.ds.ring_attn_size > 1 and args.algo.name is not None:
        checks["ring attention"] = lambda: ring.check(args, cpu)
    results = {}
    for name, check in checks.items():
        try:
            results[name] = check()
            yield Check(name, PASS, _said(name, args, results[name]))
        except ConfigError as error:
            yield Check(name, FAIL, str(error))
    if {"tokenizer", "data"} <= results.keys():
        try:
            preflight.chats(args, results["tokenizer"])
            yield from prompts(args, results["tokenizer"], console, report)
        except ConfigError as error:
            yield Check("prompts", FAIL, str(error))
    if "model" in results:
        try:
            yield memory_table(args, results["model"], cpu, console, report)
        except Exception as error:  # a configuration that transformers cannot build
            yield Check("memory", WARN, f"not estimated: {type(error).__name__}: {error}")


def _said(name: str, args: Any, result: Any) -> str:
    if name == "GPUs":
        return ", ".join(f"{part} {count}" for part, count in cluster.gpus_needed(args).items())
    return {
        "output": args.ckpt.output_dir, "reward": str(args.reward.remote_url or args.reward.model_name_or_path),
        "model": f"{args.actor.model_name_or_path}, {type(result).__name__}", "tokenizer": type(result).__name__,
        "data": args.data.prompt_dataset, "ring attention": f"rings of {args.ds.ring_attn_size} ranks",
    }[name]  # fmt: skip


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def prompts(args: Any, tokenizer: Any, console: Console, report: dict[str, Any]) -> Iterable[Check]:
    """The teacher's prompts for the first rows of the dataset; rollouts do not exist yet, so they are made up."""
    from sdpo_plugin.distillation.context import Rollout, build_teacher_contexts
    from sdpo_plugin.distillation.prompts import rendered
    from sdpo_plugin.distillation.teacher_prompt import teacher_prompt_ids
    from sdpo_plugin.interface.rollout_batch import prompt_messages
    from sdpo_plugin.openrlhf_adapter.launcher import preflight

    rows = preflight.load(args, "--data.prompt_dataset", args.data.prompt_dataset.split(",")[0], args.data.prompt_split)
    chat = chat_template_kwargs(args)
    lengths = []
    for i in range(min(len(rows), LENGTH_ROWS)):
        text = rendered(prompt_messages(rows[i], args), tokenizer, chat)
        lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    room = args.data.max_len - (args.rollout.max_new_tokens or 1)
    cut = sum(length > room for length in lengths)
    text = f"{len(rows)} rows; of the first {len(lengths)}, {min(lengths)} to {max(lengths)} tokens"
    if cut:
        text += f"; OpenRLHF truncates {cut} of them to {room} (--data.max_len - --rollout.max_new_tokens)"
    yield Check("prompts", WARN if cut else PASS, text)
    if args.algo.name is None or not getattr(plugins.algorithm(), "uses_template", True):
        return
    config: RepromptConfig = replace(from_namespace(RepromptConfig, args), demonstration="first")  # there is one
    key, made_up = config.privileged_key, "(your reward function's feedback)"
    shown = []
    for i in range(min(len(rows), SHOWN_ROWS)):
        row = rows[i]
        label = row.get(args.data.label_key)
        success = "(a response that succeeded)" if label in (None, "") else str(label)
        attempts = [
            Rollout(0, prompt_messages(row, args), "(a failed response)", 0.0, made_up, row.get(key)),
            Rollout(0, prompt_messages(row, args), success, max(1.0, config.success_threshold), None, row.get(key)),
        ]
        context = build_teacher_contexts(attempts, config)[0]
        ids, cuts = teacher_prompt_ids(context, tokenizer, config, teacher_chat_template_kwargs(args))
        shown.append({"row": i, "tokens": len(ids), "truncated": bool(cuts), "prompt": tokenizer.decode(ids)})
        console.print(f"Teacher's prompt for row {i}: {len(ids)} tokens{', truncated' * bool(cuts)}", style="bold")
        console.print(escape(_cut(shown[-1]["prompt"], SHOWN_CHARACTERS)))
    report["teacher_prompts"] = shown
    longest = max(one["tokens"] for one in shown)
    text = f"at most {longest} tokens in {len(shown)} rows (--reprompt.max_len {config.max_len}), "
    text += f"{sum(one['truncated'] for one in shown)} truncated"
    yield Check("teacher's prompts", WARN if any(one["truncated"] for one in shown) else PASS, text)
    if "{privileged_context}" in config.template and key in rows.column_names:
        has = sum(bool(value) for value in rows[key])
        yield Check("contexts", PASS if has else FAIL, f"{has} of {len(rows)} rows have a {key}")
    elif "{privileged_context}" not in config.template:
        text = f"from successes among {args.rollout.n_samples_per_prompt} samples per prompt"
        text += f"{', or from feedback' * config.use_feedback}; known after the first rollout"
        yield Check("contexts", PASS if args.rollout.n_samples_per_prompt > 1 or config.use_feedback else FAIL, text)


def memory_table(args: Any, config: Any, cpu: bool, console: Console, report: dict[str, Any]) -> Check:
    shape = memory.shape_of(config, args.ds.lora.rank, args.ds.lora.target_modules)
    other = None
    if args.algo.name is not None and args.teacher.model_name_or_path is not None:
        from sdpo_plugin.openrlhf_adapter.launcher import preflight

        other = memory.shape_of(preflight.model("--teacher.model_name_or_path", args.teacher.model_name_or_path))
    import torch

    seen = {} if cpu or not torch.cuda.is_available() else {"device_bytes": torch.cuda.mem_get_info(0)[1]}
    parts = memory.policy_worker(args, shape, other, cpu, **seen)
    unit, scale = ("MiB", 2**20) if memory.total(parts)[0] < 10 * GIB else ("GiB", GIB)
    title = f"Memory of a policy worker, {unit}"
    table = Table("", "GPU", "CPU", "", title=title, title_justify="left", box=None)
    for part in parts:
        meanwhile = "in CPU memory while the engines generate" if part.sleeps and args.ds.enable_sleep else ""
        table.add_row(part.name, f"{part.gpu / scale:.1f}", f"{part.cpu / scale:.1f}", meanwhile)
    if args.train.colocate_all and not args.train.async_enable:
        meanwhile = "discarded while the policy trains" if args.vllm.enable_sleep else ""
        table.add_row("a vLLM engine on the same GPU", f"{args.vllm.gpu_memory_utilization:.0%} of it", "", meanwhile)
    gpu, cpu_bytes = memory.total(parts)
    table.add_row("peak", f"{gpu / scale:.1f}", f"{cpu_bytes / scale:.1f}", style="bold")
    asleep = memory.total(parts, asleep=True)
    if args.ds.enable_sleep:
        table.add_row("while the engines generate", *(f"{size / scale:.1f}" for size in asleep), style="bold")
    console.print(table)
    report["memory"] = {"shape": asdict(shape), "parts": [asdict(part) for part in parts], "gpu": gpu, "cpu": cpu_bytes}
    return _fits(args, gpu, asleep[0] if args.ds.enable_sleep else gpu, cpu)


def _fits(args: Any, training: float, generating: float, cpu: bool) -> Check:
    import torch

    text = f"{training / GIB:.1f} GiB per GPU for the policy"
    if cpu or not torch.cuda.is_available():
        return Check("memory", PASS, f"{text}; this machine has no GPU to compare with")
    size = torch.cuda.mem_get_info(0)[1]
    engine = args.vllm.gpu_memory_utilization * size if args.train.colocate_all and not args.train.async_enable else 0.0
    both = max(training + (0.0 if args.vllm.enable_sleep else engine), generating + engine)
    text += f", {both / GIB:.1f} GiB with an engine on the same GPU, of {size / GIB:.1f} GiB"
    return Check("memory", PASS if both < 0.92 * size else FAIL, text)


# ── the smoke test ──


def smoke_test(
    recipe: list[str], cpu: bool, report: dict[str, Any], show: Callable[[str, Iterable[Check]], None]
) -> None:
    command = [sys.executable, "-m", "sdpo_plugin.testing.selfcheck", "cpu" if cpu else "cuda", *recipe]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    report["smoke_test"] = []
    for line in process.stdout or ():
        if line.startswith("{"):
            found = json.loads(line)
            report["smoke_test"].append(found)
            show("", [Check(found["about"], found["status"], found["found"])])
    if process.wait():
        show("", [Check("--smoke-test", FAIL, f"ended with exit code {process.returncode}")])
