"""What kernels around a LayerNorm share: the tile of rows, the norm's arithmetic, sums over rows, launches.

A tile is (CHUNKS, ROWS, WIDTH): channel = chunk * WIDTH + place. WIDTH is what the warps of one row read at
once with 16 bytes a thread. Triton gives warps to the last dimension first, then to ROWS, so that a row's
chunks lie in the registers of the same threads: a row of one warp is reduced by shuffles, without a barrier.

Sums over rows: each program of backward's fixed grid walks its tiles and keeps float32 sums a channel in
registers, then writes one row of them; kernels/sums.py adds these rows in a fixed order. No atomics: the bits
repeat.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.kernels.dropout import kept, threshold_argument
from fastgate.kernels.launch import multiprocessors

LANES = 32
# Up to so many rows, rows are few: more threads each, so that the multiprocessors are not left idle.
FEW_ROWS = 2048
# Of backward's grid: programs a multiprocessor, and rows that a program's row of sums must pay for.
PROGRAMS, LEAST_ROWS = 2, 8
# Tiles of rows that a program of backward has under way: one worked on, the others being read.
STAGES = 3
# In wider rows the registers do not hold the vectors beside the rows and the sums over rows: backward reads
# vectors where it needs them, rows without a lead, and may spill.
WIDEST_KEPT = 2048


class Tile(NamedTuple):
    """What a program works on at a time, and with how many warps."""

    chunks: int
    rows: int
    width: int
    vector: int  # channels a thread reads at once: a power of two that divides hidden
    num_warps: int


@triton.jit
def channels(hidden, ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """(channel, whether there is one): (CHUNKS, ROWS, WIDTH), alike for all rows.

    Vectors are read at the tile's full shape, so that a thread gets the channels of its rows from the
    first-level cache, in the tile's layout: a smaller shape would be laid out anew through shared memory.
    """
    chunk = tl.arange(0, CHUNKS)[:, None, None] * WIDTH
    channel = tl.broadcast_to(chunk + tl.arange(0, WIDTH)[None, None, :], (CHUNKS, ROWS, WIDTH))
    return channel, channel < hidden


@triton.jit
def row_sum(t):
    """(CHUNKS, ROWS, WIDTH) -> (1, ROWS, 1)"""
    return tl.sum(tl.sum(t, axis=0, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def read(at, mask):
    """Elements as float32, zero where none is."""
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def normalise(u, eps, hidden, valid, row_valid):
    """xhat (CHUNKS, ROWS, WIDTH), zero where no channel or row is, and rstd (1, ROWS, 1).

    u is zero where no channel is. Past the last row rstd is zero: with eps 0 it would be infinite there.
    """
    mean = row_sum(u) / hidden
    centred = tl.where(valid, u - mean, 0.0)
    rstd = tl.where(row_valid, tl.rsqrt(row_sum(centred * centred) / hidden + eps), 0.0)
    return centred * rstd, rstd


@triton.jit
def elements(values, vector, channel, valid):
    """A vector's elements: the values read before, or, where they are None, read now."""
    if values is not None:
        return values
    else:
        return read(vector + channel, valid)


@triton.jit
def kept_in_tile(key, row, threshold, CHUNKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Which elements dropout keeps: bool (CHUNKS, ROWS, WIDTH). key: a seed; row: (1, ROWS, 1) int64."""
    group = tl.arange(0, CHUNKS)[:, None, None] * (WIDTH // 4) + tl.arange(0, WIDTH // 4)[None, None, :]
    return kept(key, row, group, threshold, (CHUNKS, ROWS, WIDTH))


@triton.jit
def through(dy, weight, xhat, rstd, hidden):
    """The gradient of a norm's input."""
    t = dy * weight
    return rstd * (t - row_sum(t) / hidden - xhat * (row_sum(t * xhat) / hidden))


@triton.jit
def write_sums(to, total, hidden, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """One row of sums over a program's rows: to (hidden,), total (CHUNKS, ROWS, WIDTH)."""
    channel = tl.arange(0, CHUNKS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(to + channel, tl.sum(total, axis=1), mask=channel < hidden)


@triton.jit
def write_requested(to, total, hidden, REQUESTED: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Write a row of sums if that gradient is requested; returns where the next row goes."""
    if REQUESTED:
        write_sums(to, total, hidden, CHUNKS, WIDTH)
        to += hidden
    return to


@functools.lru_cache(4096)
def _tile(hidden: int, item_bytes: int, elements: int, least_warps: int) -> Tile:
    """The tile of rows of `hidden` channels. item_bytes: of the smallest dtype; elements: a thread's."""
    block = max(16, triton.next_power_of_2(hidden))
    vector = 16 // item_bytes
    while hidden % vector:
        vector //= 2
    row_warps = min(max(1, block // (LANES * elements)), 32)
    width = min(block, vector * LANES * row_warps)
    num_warps = max(least_warps, row_warps)
    row_elements = (
        LANES * elements * row_warps
    )  # a row's, or what the threads of one warp hold of several rows
    return Tile(
        block // width, max(1, row_elements // block) * (num_warps // row_warps), width, vector, num_warps
    )


def forward_tile(hidden: int, item_bytes: int, rows: int) -> Tile:
    few = rows <= FEW_ROWS
    return _tile(hidden, item_bytes, 8 if few else 32, 1 if few else 4)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def dropout_arguments(op: str, dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """(seed, threshold, scale of what is kept) as the kernels take them."""
    if dropout_p == 0.0:
        return None, 0, 1.0
    if seed is None:
        raise ArgumentError(
            format_error(op, "seed", None, "an int64 tensor with dropout_p > 0", "pass a seed")
        )
    return seed, threshold_argument(dropout_p), 1.0 / (1.0 - dropout_p)


def dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple([None if tensor is None else tensor.dtype for tensor in tensors])


def keeps_vectors(hidden: int) -> bool:
    """Whether backward reads the vectors once and keeps them in registers."""
    return hidden <= WIDEST_KEPT


def backward_tile(hidden: int, item_bytes: int) -> Tile:
    return _tile(hidden, item_bytes, 8 if hidden <= 2 * WIDEST_KEPT else 16, 8)


def resident_programs(rows: int, tile: Tile, device: torch.device) -> int:
    """Of backward's grid: as many as are resident, fewer for few rows, counted by powers of two."""
    bucket = triton.next_power_of_2(rows)
    return min(PROGRAMS * multiprocessors(device), max(1, bucket // max(LEAST_ROWS, tile.rows)))
