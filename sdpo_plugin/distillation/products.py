"""The matrix products of `fused.py`, in dtypes that a device is fast in, and how many rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MIB = 2**20


def head_products(states: Tensor, head: Any, buffer: Tensor) -> Tensor:
    """What `head.logits` takes `[r, V]`, in the first rows of `buffer`."""
    width = head.weight.shape[1]
    out = _multiply(states[:, :width], head.weight, buffer)
    return out if head.second_weight is None else _multiply(states[:, width:], head.second_weight, buffer, add=True)


def _multiply(states: Tensor, weight: Tensor, buffer: Tensor, add: bool = False) -> Tensor:
    """`states @ weight.T` `[r, V]`, in the first rows of `buffer`, or added to what is there."""
    out, dtype = buffer[: len(states)], factor_dtype(weight)
    states = states.to(dtype)
    for columns, block in _blocks(weight, dtype):
        if add:
            _add_product(out[:, columns], states, block.t())
        elif dtype == out.dtype:
            torch.mm(states, block.t(), out=out[:, columns])
        elif out.device.type != "cpu":  # float32 sums as they are, without rounding to 16 bits
            torch.mm(states, block.t(), out_dtype=out.dtype, out=out[:, columns])
        else:
            out[:, columns] = states @ block.t()
    return out


def accumulate(
    gradient: Tensor, states: Tensor, weight: Tensor, rows: Tensor,
    grad_hidden: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None,
) -> None:
    """Add the gradients of hidden states, weight and bias that follow from a chunk's gradient of logits `[r, V]`."""
    vocab, dtype = len(weight), states.dtype
    if grad_bias is not None:
        grad_bias[:vocab] += gradient.sum(dim=0)
    gradient = gradient.to(dtype)
    with tf32(weight.dtype == torch.float16):
        if grad_weight is not None:
            _add_product(grad_weight[:vocab], gradient.t(), states)
        if grad_hidden is not None:
            total = torch.zeros_like(states, dtype=sum_dtype(weight))
            for columns, block in _blocks(weight, dtype):
                _add_product(total, gradient[:, columns], block)
            grad_hidden[rows] = total.to(grad_hidden.dtype)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """On a GPU, products of float32 factors with 11 bits of each: weights and states that were fp16 are exact so."""
    before = torch.get_float32_matmul_precision()
    if allowed:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type != "cpu":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def sum_dtype(weight: Tensor) -> torch.dtype:
    """Of logits, losses and sums of gradients."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Of the factors of logits: the weight's own on a GPU, whose products of 16 bits have float32 sums.

    Products of bf16 took a CPU 6 to 400 times as long as float32.
    """
    return weight.dtype if weight.device.type != "cpu" else sum_dtype(weight)


def product_dtype(weight: Tensor) -> torch.dtype:
    """Of the factors of gradients: as of logits, but never fp16, which cannot hold the gradient of a mean."""
    return sum_dtype(weight) if weight.dtype == torch.float16 else factor_dtype(weight)


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in the dtype of the product: as it is, or cast 16 MiB at a time rather than whole."""
    step = len(weight) if weight.dtype == dtype else max(1, 16 * MIB // (weight.shape[1] * dtype.itemsize))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield rows, weight[rows].to(dtype)


def rows_at_a_time(device: torch.device, row_bytes: int) -> tuple[int, int]:
    """Rows of a chunk, whose products exist at a time, and of a tile of it, for elementwise work in general.

    A chunk of c rows reads and writes the sum of the head's gradient once, 8 V H bytes, for 2 c V H operations: c/4 of
    them per byte. A CPU does some 10 in the time a byte takes, so 256 rows are plenty; a GPU does some 300. Two and a
    half float32 tensors `[c, V]` exist at a time, more with more teachers.

    Some fifteen temporaries of a tile are alive at once, which is what bounds it. Also, glibc takes fresh pages for
    every tensor from 32 MiB on, and the elementwise work then takes twice the time; far below that, threads spend it
    waiting for each other. A GPU's tile need only be large enough to hide the launches.
    """
    if device.type == "cpu":
        return max(16, min(256, 320 * MIB // row_bytes)), max(1, 8 * MIB // row_bytes)
    return gpu_rows(device_bytes(device), row_bytes), max(1, 128 * MIB // row_bytes)


def gpu_rows(device_bytes: int, row_bytes: int) -> int:
    """Rows of a chunk on a GPU: 2048, or as many as fill a 24th of its memory with their two and a half tensors.

    Of all its memory, not of what is free: a run is to compute the same when it is done again.
    """
    return max(16, min(2048, device_bytes // 60 // row_bytes))


def device_bytes(device: torch.device) -> int:
    """The memory of an accelerator; 16 GiB for one that torch cannot query."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 16 * 1024 * MIB
