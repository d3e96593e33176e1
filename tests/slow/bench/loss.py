"""Time and memory of the distillation loss against TRL 1.16's functions; `make bench`.

    python tests/slow/bench/loss.py [--tokens 512 2048 16384] [--vocab 32000 151936] [--dtypes float32] [--repeat 3]

One forward and backward pass from hidden states of width 1024 and one head for student and teacher, beside the four
matrix products that it cannot do without. Times alternate in one process; memory is the peak above what the inputs
take, each in a process of its own. A case that would not fit is left out. On CUDA, Liger's fused JSD takes part where
it is installed; tests/gpu/losses.py measures more there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdpo_plugin.config import DistillConfig
from sdpo_plugin.distillation.fused import linear_distillation_loss

HIDDEN, TOPK, MIB = 1024, 100, 2**20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT = Path(__file__).parents[3] / "runs" / "bench"


def contestants(case: dict[str, Any]) -> tuple[dict[str, Callable[[], torch.Tensor]], list[torch.Tensor]]:
    """A function per implementation that returns the loss, and the tensors that get gradients."""
    from trl.experimental.sdpo import loss_utils as trl
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    torch.manual_seed(0)
    n, v, dtype = case["tokens"], case["vocab"], getattr(torch, case["dtype"])
    head = (0.03 * torch.randn(v, HIDDEN, device=DEVICE)).to(dtype).requires_grad_()
    student = torch.randn(n, HIDDEN, device=DEVICE).to(dtype).requires_grad_()
    teacher = (student.detach() + 0.3 * torch.randn(n, HIDDEN, device=DEVICE)).to(dtype)
    ids, mask = torch.randint(v, (n,), device=DEVICE), torch.ones(n, device=DEVICE)
    config = DistillConfig(mode=case["mode"], alpha=0.5, topk=TOPK)

    def by_trl() -> torch.Tensor:
        student_logits = (student @ head.T).float()
        with torch.no_grad():
            teacher_logits = (teacher @ head.T).float()
        if case["mode"] == "full":
            return trl.compute_full_logit_self_distillation_loss(
                student_logits, teacher_logits, distillation_alpha=0.5
            ).mean()
        return trl.compute_topk_self_distillation_loss(
            student_logits, teacher_logits, distillation_topk=TOPK, distillation_alpha=0.5, distillation_add_tail=True
        ).mean()

    found = {
        "ours": lambda: linear_distillation_loss(student, head, teacher, head.detach(), ids, mask, config),
        "trl": by_trl,
    }
    if case["mode"] == "full":
        found["trl_distillation"] = lambda: ChunkedDivergenceFunction.apply(
            student, head, None, teacher, head.detach(), None, 0.5
        )[0].mean()
    if DEVICE == "cuda" and case["mode"] == "full":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
        found["liger"] = lambda: liger(student, head, teacher, head.detach(), ids)
    return found, [head, student]


def products(leaves: list[torch.Tensor]) -> Callable[[], None]:
    """Both heads' logits and two gradients, over all tokens at once."""
    head, states = (leaf.detach() for leaf in leaves)
    logits = torch.empty(len(states), len(head), dtype=head.dtype, device=DEVICE)
    gradient = torch.randn_like(logits)

    def run() -> None:
        for _ in ("student", "teacher"):
            torch.mm(states, head.T, out=logits)
        torch.mm(gradient, head)
        torch.mm(gradient.T, states)

    return run


def synchronised_seconds() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_case(case: dict[str, Any]) -> dict[str, Any]:
    found, leaves = contestants(case)
    runs: dict[str, Callable[[], Any]] = {name: lambda loss=loss: loss().backward() for name, loss in found.items()}
    runs["products"] = products(leaves)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(case["repeat"] + 1):
        for name, run in runs.items():
            for leaf in leaves:
                leaf.grad = None
            began = synchronised_seconds()
            run()
            seconds[name].append(synchronised_seconds() - began)
    counted = {name: times[1:] for name, times in seconds.items()}  # the first of each warms up
    ratios = [a / b for a, b in zip(counted["ours"], counted["trl"], strict=True)]
    over_products = [a / b for a, b in zip(counted["ours"], counted["products"], strict=True)]
    return {
        "over_products": statistics.median(over_products),
        "seconds": {name: statistics.median(times) for name, times in counted.items()},
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
    }  # fmt: skip


def memory_case(case: dict[str, Any]) -> float:
    """Peak MiB above the inputs, with the gradients of head and hidden states taken off: both must exist."""
    found, leaves = contestants(case)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        base = _resident("VmRSS")
    found[case["memory"]]().backward()
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else _resident("VmHWM")
    return (peak - base - sum(leaf.grad.nbytes for leaf in leaves)) / MIB


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def in_a_process(case: dict[str, Any]) -> Any:
    done = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def fits(case: dict[str, Any]) -> bool:
    """TRL holds about eight float32 tensors of [tokens, vocabulary] at its peak."""
    free = torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else os.sysconf("SC_AVPHYS_PAGES") * resource.getpagesize()
    return 8 * 4 * case["tokens"] * case["vocab"] < 0.5 * free


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for key, cases in itertools.groupby(rows, key=lambda r: (r["vocab"], r["mode"], r["dtype"])):
        group, label = list(cases), " ".join(map(str, key))
        (line,) = left.plot([r["tokens"] for r in group], [r["mib"]["ours"] for r in group], marker="o", label=label)
        with_trl = [r for r in group if r["mib"].get("trl")]
        left.plot([r["tokens"] for r in with_trl], [r["mib"]["trl"] for r in with_trl], "--", color=line.get_color())
        timed = [r for r in group if r.get("ratio")]
        right.plot([r["tokens"] for r in timed], [r["ratio"] for r in timed], marker="o", color=line.get_color())
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="MiB above inputs and gradients (dashed: TRL)")
    right.set(xscale="log", xlabel="tokens", ylabel="time, ours / TRL")
    right.axhline(1.0, color="grey", linewidth=1)
    left.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 16384])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 151936])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"] if DEVICE == "cuda" else ["float32"])
    parser.add_argument("--modes", nargs="+", default=["full", "topk"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(memory_case(args.case) if "memory" in args.case else time_case(args.case)))
        return
    from tqdm import tqdm

    rows = []
    for vocab, mode, dtype, tokens in tqdm(list(itertools.product(args.vocab, args.modes, args.dtypes, args.tokens))):
        case = {"vocab": vocab, "mode": mode, "dtype": dtype, "tokens": tokens, "repeat": args.repeat}
        row = dict(case, mib={"ours": in_a_process(case | {"memory": "ours"})})
        if fits(case):
            row["mib"]["trl"] = in_a_process(case | {"memory": "trl"})
            row.update(in_a_process(case) or {})
        rows.append(row)
        tqdm.write(json.dumps(row))
        sys.stdout.flush()
    OUT.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    (OUT / "loss.json").write_text(json.dumps({"machine": machine, "torch": torch.__version__, "rows": rows}, indent=1))
    plot(rows, OUT / "loss.png")
    print(f"wrote {OUT / 'loss.json'} and {OUT / 'loss.png'}")


if __name__ == "__main__":
    main()
