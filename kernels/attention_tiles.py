"""What attention's Triton kernels share: how a program finds its rows, reads and writes them, and drops keys.

Lengths lie on the device only, and to read them would stop the host. So grids are sized by bounds it knows:
- tiles: with B rows a block, sequence s gets the slots from cu[s] // B + s to cu[s+1] // B + s. Those
  are enough, for a sequence has at most cu[s+1] // B - cu[s] // B + 1 blocks, and there are rows // B +
  sequences of them in all: less than one empty program a sequence and head, none for padding. A program finds
  its sequence by a search over cu_seqlens, 128 ends at a time: one round trip to memory up to 128 sequences,
  two up to 16384. A table of tiles written by a kernel before would cost a launch a call to save that.
- whole: one program a sequence and head, no search. Its loops over blocks have one trip where the sequence
  fits a block. This suits many short sequences; it is right, though slow, for long ones.
Heads vary fastest, so that programs which run together read whole rows.

`rows` below are a pair (pointer, stride): the rows of one sequence and head, D numbers each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgate.kernels.dropout import kept

PROBES = tl.constexpr(128)
PART = tl.constexpr(16)


@triton.jit
def find_sequence(
    cu_ptr,  # (sequences + 1,)
    sequences,
    tile,
    BLOCK: tl.constexpr,
):
    """The last sequence s whose first slot, cu[s] // BLOCK + s, is not after `tile`."""
    low = sequences * 0
    span = sequences
    while span > 1:
        step = (span + PROBES - 1) // PROBES
        ahead = tl.arange(0, PROBES) * step
        valid = ahead < span
        slot = tl.load(cu_ptr + low + ahead, mask=valid, other=0) // BLOCK + low + ahead
        passed = tl.sum((valid & (slot <= tile)).to(tl.int32)) - 1
        low += passed * step
        span = tl.minimum(step, span - passed * step)
    return low


@triton.jit
def span_of(cu_ptr, sequence):
    """(first row, length) of a sequence."""
    begin = tl.load(cu_ptr + sequence).to(tl.int64)
    return begin, (tl.load(cu_ptr + sequence + 1).to(tl.int64) - begin).to(tl.int32)


@triton.jit
def first_of(tile, begin, sequence, BLOCK: tl.constexpr):
    """Where a tile's block begins in its sequence, whose rows begin at `begin`."""
    return (tile - (begin // BLOCK).to(tl.int32) - sequence) * BLOCK


@triton.jit
def head_rows(ptr, begin, stride, head, D: tl.constexpr):
    """The rows of one sequence and head: of (rows, heads * D) at `ptr`, from row `begin` on."""
    return ptr + begin * stride + head * D, stride


@triton.jit
def load_rows(rows, first, count, BLOCK: tl.constexpr, D: tl.constexpr):
    """(BLOCK, D): rows first .. first + BLOCK, zeros after the last of `count`."""
    row = first + tl.arange(0, BLOCK)
    at = rows[0] + row.to(tl.int64)[:, None] * rows[1] + tl.arange(0, D)[None, :]
    return tl.load(at, mask=(row < count)[:, None], other=0.0)


@triton.jit
def store_rows(rows, value, first, count, BLOCK: tl.constexpr, D: tl.constexpr):
    row = first + tl.arange(0, BLOCK)
    at = rows[0] + row.to(tl.int64)[:, None] * rows[1] + tl.arange(0, D)[None, :]
    tl.store(at, value.to(rows[0].dtype.element_ty), mask=(row < count)[:, None])


@triton.jit
def load_bias(bias_ptr, D: tl.constexpr):
    """(1, D) float32: a head's part of a bias."""
    return tl.load(bias_ptr + tl.arange(0, D)).to(tl.float32)[None, :]


@triton.jit
def add_bias(block, bias_ptr, D: tl.constexpr):
    """block + bias rounded to block's dtype, as a Linear's output would be; the block where bias is None."""
    if bias_ptr is not None:
        block = (block.to(tl.float32) + load_bias(bias_ptr, D)).to(block.dtype)
    return block


@triton.jit
def load_part(rows, bias_ptr, part, first, count, BLOCK: tl.constexpr):
    """(BLOCK, PART): columns part .. part + PART of a block, their bias added."""
    block = load_rows((rows[0] + part, rows[1]), first, count, BLOCK, PART)
    if bias_ptr is not None:
        block = add_bias(block, bias_ptr + part, PART)
    return block


@triton.jit
def dot_by_parts(
    a,  # count_a rows
    a_bias_ptr,  # (D,), or None
    first_a,
    count_a,
    b,  # count_b rows
    b_bias_ptr,  # (D,), or None
    first_b,
    count_b,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    D: tl.constexpr,
):
    """(a + a_bias) (b + b_bias)^T of two blocks, read PART columns at a time.

    For float32, which has no tensor core: a product's operands lie in registers, and all D would not fit.
    """
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for part in range(0, D, PART):
        left = load_part(a, a_bias_ptr, part, first_a, count_a, BLOCK_A)
        right = load_part(b, b_bias_ptr, part, first_b, count_b, BLOCK_B)
        # "ieee": tf32, the default for float32, has an error a thousand times torch's.
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    return total


@triton.jit
def kept_keys(
    drop,  # (seed pointer, threshold, heads, the mask's row of the sequence's first query and this head)
    query,
    key,  # multiple of 4
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) of the dropout mask, whose rows are query * heads + head: reference.keep_mask."""
    row = drop[3] + (query + tl.arange(0, BLOCK_M)).to(tl.int64) * drop[2]
    group = key // 4 + tl.arange(0, BLOCK_N // 4)
    return kept(tl.load(drop[0]), row[:, None], group[None, :], drop[1], (BLOCK_M, BLOCK_N))
