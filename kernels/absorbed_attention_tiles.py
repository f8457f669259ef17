"""What a program of absorbed attention works on at a time: heads of one sequence, and a block of its rows.

A block is read once, into shared memory, and serves as an operand of both products of forward and of all
three of backward: the weights are few, the rows are what there is to read. It is (BLOCK, CHUNKS, WIDTH),
channel = chunk * WIDTH + place, and the products are batched over chunks: a warp has the chunks it sums in
forward's second product to itself, its share of the probes lies in its registers, and of S the warps exchange
(heads, BLOCK) partial sums only. Heads are padded to the 16 rows of a tensor core's product; chunks to a
power of two (from 6 to 8 at 768 channels: those that are not there cost no traffic).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def span(cu_ptr, sequence, split, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """(first row of the sequence, its length, the split's first row in it, the row after its last)."""
    begin = tl.load(cu_ptr + sequence).to(tl.int64)
    length = (tl.load(cu_ptr + sequence + 1).to(tl.int64) - begin).to(tl.int32)
    run = tl.cdiv(tl.cdiv(length, BLOCK), SPLITS) * BLOCK
    first = tl.minimum(split * run, length)
    return begin, length, first, tl.minimum(first + run, length)


@triton.jit
def head_pointers(
    at,  # a vector a head, of one sequence and its first head here
    stride,  # from head to head
    heads,  # that are there
    HIDDEN: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(CHUNKS, HEADS, WIDTH): pointers, and which of them are there."""
    head = tl.arange(0, HEADS)[None, :, None]
    channel = tl.arange(0, CHUNKS)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return at + head * stride + channel, (head < heads) & (channel < HIDDEN)


@triton.jit
def load_heads(
    at,  # as for head_pointers
    stride,
    heads,
    HIDDEN: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pointers, valid = head_pointers(at, stride, heads, HIDDEN, HEADS, CHUNKS, WIDTH)
    return tl.load(pointers, mask=valid, other=0.0)


@triton.jit
def row_pointers(
    at,  # (rows, HIDDEN), the sequence's
    start,
    stop,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(BLOCK, CHUNKS, WIDTH): pointers to the rows from `start` on, and which of them are there.

    In the order of memory, so that the copy to shared memory is asynchronous; products see them permuted.
    """
    row = (start + tl.arange(0, BLOCK))[:, None, None]
    channel = tl.arange(0, CHUNKS)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return at + row.to(tl.int64) * HIDDEN + channel, (row < stop) & (channel < HIDDEN)


@triton.jit
def load_rows(
    at,  # as for row_pointers
    start,
    stop,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pointers, valid = row_pointers(at, start, stop, HIDDEN, BLOCK, CHUNKS, WIDTH)
    return tl.load(pointers, mask=valid, other=0.0)


@triton.jit
def products(vectors, rows):
    """vectors (CHUNKS, HEADS, WIDTH) . rows (BLOCK, CHUNKS, WIDTH) -> (HEADS, BLOCK) float32."""
    # "ieee": tf32, the default for float32, has an error a thousand times torch's.
    return tl.sum(tl.dot(vectors, tl.permute(rows, (1, 2, 0)), input_precision="ieee"), axis=0)


@triton.jit
def weighted(weights, rows, sums, HEADS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """sums (CHUNKS, HEADS, WIDTH) + weights (HEADS, BLOCK) of rows (BLOCK, CHUNKS, WIDTH)."""
    weights = tl.broadcast_to(weights.to(rows.dtype)[None, :, :], (CHUNKS, HEADS, BLOCK))
    return tl.dot(weights, tl.permute(rows, (1, 0, 2)), sums, input_precision="ieee")
