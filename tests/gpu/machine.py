"""The accelerator that a section of `run.py` measures on: clocks, memory, and rows that are printed as they come."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
MIB = 2**20


def tell(what: str, **found: Any) -> None:
    """A row of the section: one line of JSON."""
    print(json.dumps({"what": what, **found}), flush=True)


@contextmanager
def row(what: str, **known: Any) -> Iterator[dict[str, Any]]:
    """Fill the dictionary with what is found; an exception becomes the row's `error`, and the section goes on."""
    found: dict[str, Any] = dict(known)
    try:
        yield found
    except Exception as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    tell(what, **found)
    if CUDA:
        torch.cuda.empty_cache()


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], least: int = 3, most: int = 20, budget: float = 0.4) -> float:
    """The median of `least` to `most` runs, as many as fit into `budget` seconds, after one that warms up."""
    run()
    synchronize()
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < least or (len(found) < most and time.perf_counter() - began < budget):
        started = time.perf_counter()
        run()
        synchronize()
        found.append(1e3 * (time.perf_counter() - started))
    return statistics.median(found)


def peak_mib(run: Callable[[], Any]) -> float | None:
    """The most that `run` held above what was there before, by the allocator; None without CUDA."""
    if not CUDA:
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def milliseconds_of(run: Callable[[], Any]) -> float:
    """Of a single run, the first one."""
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return 1e3 * (time.perf_counter() - began)


def used_mib() -> float | None:
    """Of the device's memory, what is taken by anyone, by the driver; None without CUDA."""
    if not CUDA:
        return None
    synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / MIB


def reserved_mib() -> float | None:
    """Of the device's memory, what this process has taken from the driver; None without CUDA."""
    synchronize()
    return torch.cuda.memory_reserved() / MIB if CUDA else None


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, relative to the expected norm; inf where something is not finite."""
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    return float(error) if error.isfinite() else float("inf")


def facts() -> dict[str, Any]:
    """Of the machine, with the two rates that bound everything: copies and bf16 products."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": "CPU"}
    if CUDA:
        free, total = torch.cuda.mem_get_info()
        found |= {
            "device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "memory_gib": round(total / 2**30, 1),
            "free_gib": round(free / 2**30, 1),
        }  # fmt: skip
        source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        found["copy_gb_per_s"] = round(2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6)
        for dtype, n in ((torch.bfloat16, 8192), (torch.float32, 4096)):
            a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
            name = str(dtype).removeprefix("torch.")
            found[f"{name}_tflop_per_s"] = round(2 * n**3 / milliseconds(lambda: a @ b) / 1e9)  # noqa: B023
    return found
