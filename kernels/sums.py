"""Adds up what the programs of a backward kernel summed each over its own rows: a fixed order, no atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastgate.kernels.launch import Kernel, aligned

PARTS, WIDTH, WARPS = 64, 32, 4


@triton.jit(do_not_specialize=["parts", "size"])
def sum_kernel(
    sums,  # (parts, size) float32
    total,  # (size,) float32
    parts: tl.int32,
    size: tl.int32,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """total = the sum of the rows of sums, in an order that `parts` alone decides."""
    size = size // VECTOR * VECTOR
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)[None, :]
    running = tl.zeros((PARTS, WIDTH), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        running += tl.load(
            sums + part.to(tl.int64) * size + column, mask=(part < parts) & (column < size), other=0.0
        )
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(total + column, tl.sum(running, axis=0), mask=column < size)


SUM = Kernel(sum_kernel)


def add_up(sums: Tensor, total: Tensor) -> None:
    """total (...) = the sum of sums (parts, ...) over parts; both float32 and contiguous."""
    size = total.numel()
    vector = 4 if size % 4 == 0 else 1
    SUM.launch(
        (-(-size // WIDTH), 1, 1),
        (vector, aligned(sums, total)),
        (sums, total, sums.shape[0], size, PARTS, WIDTH, vector),
        WARPS,
    )
