"""Absorbed attention's forward in Triton, and the sum of its parts where a sequence has several programs.

Per head h, its probe a_h = W_k,h^T q_h and the rows x_j of its sequence:

    S_j = a_h . x_j      L = log2 sum_j 2^(c S_j), c = scale * log2(e)      P_j = 2^(c S_j - L)
    mixed_h = sum_j M_j P_j x_j / (1 - p)      total_h = sum_j M_j P_j / (1 - p)

M is the dropout mask, p its probability. A row of it has the counter sequence * heads + head; see
fastgate/ops/reference/dropout.py, keep_mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgate.kernels.absorbed_attention_tiles import (
    head_pointers,
    load_heads,
    load_rows,
    products,
    span,
    weighted,
)
from fastgate.kernels.dropout import kept
from fastgate.kernels.launch import Kernel

# Channels that a program of merge_kernel adds up.
MERGED = tl.constexpr(128)


@triton.jit(do_not_specialize=["sequences", "heads", "stride_s", "stride_h", "threshold"])
def forward_kernel(
    probe_ptr,  # (sequences, heads, HIDDEN), strides stride_s, stride_h, 1
    x_ptr,  # (rows, HIDDEN), contiguous, as all below
    cu_ptr,  # (sequences + 1,) int32 or int64
    seed_ptr,  # () int64, or None: no dropout
    mixed_ptr,  # (sequences, heads, HIDDEN); with SPLITS > 1 (SPLITS, sequences, heads, HIDDEN) float32
    residue_ptr,  # as mixed: what its rounding took away; None: not requested, as with SPLITS > 1
    total_ptr,  # (sequences, heads) float32; with SPLITS > 1 (SPLITS, sequences, heads)
    lse_ptr,  # (sequences, heads) float32, or None; with SPLITS > 1 (2, SPLITS, sequences, heads)
    sequences: tl.int32,
    heads: tl.int32,
    stride_s: tl.int64,
    stride_h: tl.int64,
    c: tl.float32,  # scale * log2(e)
    over_keep: tl.float32,  # 1 / (1 - p)
    threshold: tl.int32,
    HIDDEN: tl.constexpr,
    SPLITS: tl.constexpr,
    VECTOR: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (sequences, SPLITS, groups of HEADS heads).

    With SPLITS > 1: mixed and total stand for the split's rows, against their own maximum, not divided by the
    sum of the weights; the maxima are in lse[0], those sums in lse[1].
    """
    sequence, split, first_head = tl.program_id(0), tl.program_id(1), tl.program_id(2) * HEADS
    begin, _, first, stop = span(cu_ptr, sequence, split, SPLITS, BLOCK)
    x_ptr += begin * HIDDEN
    # Division and product tell the compiler how far probes are aligned.
    stride_s, stride_h = stride_s // VECTOR * VECTOR, stride_h // VECTOR * VECTOR
    probe = load_heads(
        probe_ptr + sequence.to(tl.int64) * stride_s + first_head * stride_h, stride_h, heads - first_head,
        HIDDEN, HEADS, CHUNKS, WIDTH,
    )  # fmt: skip
    head = first_head + tl.arange(0, HEADS)
    counter = (sequence.to(tl.int64) * heads + head)[:, None]
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    weight = tl.zeros((HEADS,), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    mixed = tl.zeros((CHUNKS, HEADS, WIDTH), tl.float32)
    for start in tl.range(first, stop, BLOCK, num_stages=STAGES):
        rows = load_rows(x_ptr, start, stop, HIDDEN, BLOCK, CHUNKS, WIDTH)
        s = products(probe, rows) * c
        s = tl.where((start + tl.arange(0, BLOCK) < stop)[None, :], s, float("-inf"))
        risen = tl.maximum(top, tl.max(s, 1))  # finite: a block has at least one row
        p = tl.exp2(s - risen[:, None])
        shrink = tl.exp2(top - risen)
        weight = weight * shrink + tl.sum(p, 1)
        if seed_ptr is not None:
            group = (start // 4 + tl.arange(0, BLOCK // 4))[None, :]
            p = tl.where(kept(seed, counter, group, threshold, (HEADS, BLOCK)), p, 0.0)
            total = total * shrink + tl.sum(p, 1)
        mixed = weighted(p, rows, mixed * shrink[None, :, None], HEADS, BLOCK, CHUNKS)
        top = risen
    # Not before: the largest weight is 1, which no rounding changes.
    mixed, total = mixed * over_keep, total * over_keep
    if seed_ptr is None:
        total = weight
    is_head = head < heads
    place = (split * sequences + sequence).to(tl.int64) * heads
    if SPLITS > 1:
        tl.store(lse_ptr + place + head, top, mask=is_head)
        tl.store(lse_ptr + SPLITS * sequences.to(tl.int64) * heads + place + head, weight, mask=is_head)
    else:
        weight = tl.where(weight == 0.0, 1.0, weight)  # without rows: zeros
        mixed, total = mixed * (1.0 / weight)[None, :, None], total / weight
        if lse_ptr is not None:
            tl.store(lse_ptr + place + head, top + tl.log2(weight), mask=is_head)
    tl.store(total_ptr + place + head, total, mask=is_head)
    skip = (place + first_head) * HIDDEN
    to, valid = head_pointers(mixed_ptr + skip, HIDDEN, heads - first_head, HIDDEN, HEADS, CHUNKS, WIDTH)
    rounded = mixed.to(mixed_ptr.dtype.element_ty)
    tl.store(to, rounded, mask=valid)
    if residue_ptr is not None:
        to, valid = head_pointers(
            residue_ptr + skip, HIDDEN, heads - first_head, HIDDEN, HEADS, CHUNKS, WIDTH
        )
        tl.store(to, (mixed - rounded.to(tl.float32)).to(residue_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["pairs"])
def merge_kernel(
    mixed_parts_ptr,  # (SPLITS, pairs, HIDDEN) float32, a pair being a sequence and a head
    total_parts_ptr,  # (SPLITS, pairs) float32
    lse_parts_ptr,  # (2, SPLITS, pairs) float32
    mixed_ptr,  # (pairs, HIDDEN)
    residue_ptr,  # (pairs, HIDDEN): what mixed's rounding took away; None: not requested
    total_ptr,  # (pairs,) float32
    lse_ptr,  # (pairs,) float32, or None
    pairs: tl.int32,
    HIDDEN: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid: (pairs, HIDDEN in runs of MERGED)."""
    pair, run = tl.program_id(0), tl.program_id(1)
    part = tl.arange(0, SPLITS).to(tl.int64) * pairs + pair
    top = tl.load(lse_parts_ptr + part)
    weight = tl.load(lse_parts_ptr + SPLITS * pairs.to(tl.int64) + part)
    highest = tl.max(top, 0)
    # A split without rows has the maximum -inf and adds nothing; where all are without, so is the highest.
    shrink = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weight * shrink, 0)
    total = tl.where(total == 0.0, 1.0, total)
    channel = run * MERGED + tl.arange(0, MERGED)
    mixed = tl.load(
        mixed_parts_ptr + part[:, None] * HIDDEN + channel[None, :],
        mask=(channel < HIDDEN)[None, :],
        other=0.0,
    )
    mixed = tl.sum(mixed * (shrink / total)[:, None], 0)
    place = pair.to(tl.int64) * HIDDEN + channel
    rounded = mixed.to(mixed_ptr.dtype.element_ty)
    tl.store(mixed_ptr + place, rounded, mask=channel < HIDDEN)
    if residue_ptr is not None:
        residue = (mixed - rounded.to(tl.float32)).to(residue_ptr.dtype.element_ty)
        tl.store(residue_ptr + place, residue, mask=channel < HIDDEN)
    if run == 0:
        whole = tl.sum(tl.load(total_parts_ptr + part) * shrink, 0) / total
        tl.store(total_ptr + pair, whole)
        if lse_ptr is not None:
            tl.store(lse_ptr + pair, highest + tl.log2(total))


FORWARD, MERGE = Kernel(forward_kernel), Kernel(merge_kernel)
