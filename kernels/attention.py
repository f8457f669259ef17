"""Packed self-attention in Triton: softmax(q k^T scale) v in each sequence and head, forward and backward.

The equations, for one head of one sequence with n queries i and m keys j; M is the dropout mask, p its
probability, c = scale * log2(e), so that every exponential is an exp2:

    S = q k^T      L_i = log2 sum_j 2^(c S_ij)      P_ij = 2^(c S_ij - L_i)      O = (M * P) v / (1 - p)

    dV = (M * P)^T dO / (1 - p)        dP = M * (dO v^T) / (1 - p)
    dS = P * (dP - delta)              delta_i = sum_j P_ij dP_ij = sum_d dO_id O_id
    dQ = scale dS k                    dK = scale dS^T q

dS is the softmax's Jacobian diag(P) - P P^T applied to dP. The two forms of delta are equal because
sum_j P_ij dP_ij = sum_d dO_id sum_j M_ij P_ij v_jd / (1 - p), and that sum over j is O_id: one pass over O
in place of another over the keys. In float32 that is not exact enough: where one P_ij is nearly 1, dP - delta
cancels, and only the sum over P dP errs as dP itself does. So float32 walks the keys twice.

Statistics and sums are float32. P and dS are rounded to the operands' dtype for their products, as the tensor
cores want; float32 operands keep float32 products throughout.

Forward walks the keys of a block of queries with the running maximum and sum of the softmax; it can leave L
behind. Backward is two kernels, neither with an atomic: `backward_queries_kernel` owns dQ of a block of
queries and walks the keys (three products: S, dP, dQ), `backward_keys_kernel` owns dK and dV of a block of
keys and walks the queries (four: S, dP, dV, dK). Seven products where one kernel with atomics needs five;
in return the same bits come at every call. Without a saved L and O (`backward`, in place of
`backward_saved`) forward runs again before it: nine.

Which program does what. Lengths lie on the device only, and to read them would stop the host. So grids are
sized by bounds the host knows:
- tiles: with B rows a block, sequence s gets the slots from cu[s] // B + s to cu[s+1] // B + s. Those
  are enough, for a sequence has at most cu[s+1] // B - cu[s] // B + 1 blocks, and there are rows // B +
  sequences of them in all: less than one empty program a sequence and head, none for padding. A program finds
  its sequence by a search over cu_seqlens, 128 ends at a time: one round trip to memory up to 128 sequences,
  two up to 16384. A table of tiles written by a kernel before would cost a launch a call to save that.
- whole: one program a sequence and head, no search. Its loops over blocks have one trip where the sequence
  fits a block, and backward then makes dQ, dK and dV out of one S and one dP (five products, each operand
  read once). This suits many short sequences; it is right, though slow, for long ones.
rows / sequences, known from the shapes, chooses between them; both are right for any lengths.

A row of the mask has the counter (query row * heads + head); see fastgate/reference.py, keep_mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgate.errors import ArgumentError, say

HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROBES = tl.constexpr(128)


@triton.jit
def _find_sequence(
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
        there = ahead < span
        slot = tl.load(cu_ptr + low + ahead, mask=there, other=0) // BLOCK + low + ahead
        passed = tl.sum((there & (slot <= tile)).to(tl.int32)) - 1
        low += passed * step
        span = tl.minimum(step, span - passed * step)
    return low


@triton.jit
def _span(cu_ptr, sequence):
    """(first row, length) of a sequence."""
    begin = tl.load(cu_ptr + sequence).to(tl.int64)
    return begin, (tl.load(cu_ptr + sequence + 1).to(tl.int64) - begin).to(tl.int32)


@triton.jit
def _load(
    ptr,  # (rows, D) of one sequence and head
    first,
    rows,
    stride,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """Rows first .. first + BLOCK, zeros after the last."""
    row = first + tl.arange(0, BLOCK)
    at = ptr + row.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(at, mask=(row < rows)[:, None], other=0.0)


@triton.jit
def _store(
    ptr,  # (rows, D) of one sequence and head
    value,  # (BLOCK, D)
    first,
    rows,
    stride,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    row = first + tl.arange(0, BLOCK)
    at = ptr + row.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=(row < rows)[:, None])


@triton.jit
def _kept(
    seed_ptr,  # (1,) int64
    threshold,  # int32, the bits of an unsigned number
    counter,  # int64, the mask's row of the sequence's first query
    query,
    key,  # multiple of 4
    heads,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) of the dropout mask. One Philox call serves four neighbouring keys."""
    row = counter + (query + tl.arange(0, BLOCK_M)).to(tl.int64) * heads
    group = key // 4 + tl.arange(0, BLOCK_N // 4)
    low = (row & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (row >> 32).to(tl.uint32)[:, None]
    group = group.to(tl.uint32)[None, :]
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), low, high, group, group * 0)
    limit = tl.cast(threshold, tl.uint32, bitcast=True)
    # join makes the new dimension the last: even words, odd words, then the pairs of them.
    kept = tl.join(tl.join(w0 >= limit, w2 >= limit), tl.join(w1 >= limit, w3 >= limit))
    return kept.reshape(BLOCK_M, BLOCK_N)


@triton.jit
def _forward_block(
    q_ptr,  # (n, D), row stride stride_q; from here on: of one sequence and head
    k_ptr,  # (m, D), row stride stride_k
    v_ptr,  # (m, D), row stride stride_v
    out_ptr,  # (n, D), row stride heads * D
    lse_ptr,  # (n,) float32, or None
    seed_ptr,  # (1,) int64, or None: no dropout
    counter,
    first,
    n,
    m,
    heads,
    stride_q,
    stride_k,
    stride_v,
    c,
    over_keep,
    threshold,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """O and L of the queries from `first` on."""
    q = _load(q_ptr, first, n, stride_q, BLOCK_M, D)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(0, m, BLOCK_N):
        k = _load(k_ptr, start, m, stride_k, BLOCK_N, D)
        v = _load(v_ptr, start, m, stride_v, BLOCK_N, D)
        # "ieee": tf32, the default for float32, has an error a thousand times torch's.
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = tl.where((start + tl.arange(0, BLOCK_N) < m)[None, :], s, float("-inf"))
        risen = tl.maximum(top, tl.max(s, 1) * c)  # finite: a block has at least one key
        p = tl.exp2(s * c - risen[:, None])
        shrink = tl.exp2(top - risen)
        total = total * shrink + tl.sum(p, 1)
        if seed_ptr is not None:
            p = tl.where(_kept(seed_ptr, threshold, counter, first, start, heads, BLOCK_M, BLOCK_N), p, 0.0)
        mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        top = risen
    total = tl.where(total == 0.0, 1.0, total)  # without keys: zeros
    _store(out_ptr, mixed * (over_keep / total)[:, None], first, n, heads * D, BLOCK_M, D)
    if lse_ptr is not None:
        row = first + tl.arange(0, BLOCK_M)
        tl.store(lse_ptr + row, top + tl.log2(total), mask=row < n)


@triton.jit(do_not_specialize=["rows_q", "sequences", "heads", "threshold"])
def forward_kernel(
    q_ptr,  # (rows_q, heads * D), row stride stride_q
    k_ptr,  # (rows_k, heads * D), row stride stride_k
    v_ptr,  # (rows_k, heads * D), row stride stride_v
    out_ptr,  # (rows_q, heads * D), contiguous
    lse_ptr,  # (heads, rows_q) float32, or None
    seed_ptr,  # (1,) int64, or None: no dropout
    cu_q_ptr,  # (sequences + 1,) int32 or int64
    cu_k_ptr,  # (sequences + 1,) int32 or int64
    rows_q,
    sequences,
    heads,
    stride_q,
    stride_k,
    stride_v,
    c,  # scale * log2(e)
    over_keep,  # 1 / (1 - p)
    threshold,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Grid: sequences * heads if WHOLE, else (rows_q // BLOCK_M + sequences) * heads; heads vary fastest, so
    that programs which run together read whole rows."""
    head = tl.program_id(0) % heads
    place = tl.program_id(0) // heads
    sequence = place if WHOLE else _find_sequence(cu_q_ptr, sequences, place, BLOCK_M)
    begin_q, n = _span(cu_q_ptr, sequence)
    begin_k, m = _span(cu_k_ptr, sequence)
    q_ptr += begin_q * stride_q + head * D
    k_ptr += begin_k * stride_k + head * D
    v_ptr += begin_k * stride_v + head * D
    out_ptr += begin_q * heads * D + head * D
    if lse_ptr is not None:
        lse_ptr += head.to(tl.int64) * rows_q + begin_q
    counter = begin_q * heads + head
    if WHOLE:
        for first in range(0, n, BLOCK_M):
            _forward_block(
                q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seed_ptr, counter, first, n, m, heads,
                stride_q, stride_k, stride_v, c, over_keep, threshold, D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        first = (place - (begin_q // BLOCK_M).to(tl.int32) - sequence) * BLOCK_M
        if first < n:
            _forward_block(
                q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seed_ptr, counter, first, n, m, heads,
                stride_q, stride_k, stride_v, c, over_keep, threshold, D, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _walk_keys(
    q,  # (BLOCK_M, D)
    grad,  # (BLOCK_M, D)
    lse,  # (BLOCK_M,)
    k_ptr,  # (m, D), row stride stride_k; of one sequence and head
    v_ptr,  # (m, D), row stride stride_v; of one sequence and head
    seed_ptr,  # (1,) int64, or None: no dropout
    counter,
    first,
    start,
    m,
    heads,
    stride_k,
    stride_v,
    c,
    over_keep,
    threshold,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """P, dP and k of the keys from `start` on."""
    k = _load(k_ptr, start, m, stride_k, BLOCK_N, D)
    v = _load(v_ptr, start, m, stride_v, BLOCK_N, D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    s = tl.where((start + tl.arange(0, BLOCK_N) < m)[None, :], s, float("-inf"))
    p = tl.exp2(s * c - lse[:, None])
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee") * over_keep
    if seed_ptr is not None:
        dp = tl.where(_kept(seed_ptr, threshold, counter, first, start, heads, BLOCK_M, BLOCK_N), dp, 0.0)
    return p, dp, k


@triton.jit
def _query_block(
    grad_ptr,  # (n, D), row stride stride_g; from here on: of one sequence and head
    out_ptr,  # (n, D), row stride heads * D
    lse_ptr,  # (n,) float32
    delta_ptr,  # (n,) float32, written
    q_ptr,  # (n, D), row stride stride_q
    k_ptr,  # (m, D), row stride stride_k
    v_ptr,  # (m, D), row stride stride_v
    dq_ptr,  # (n, D), row stride heads * D
    seed_ptr,  # (1,) int64, or None: no dropout
    counter,
    first,
    n,
    m,
    heads,
    stride_g,
    stride_q,
    stride_k,
    stride_v,
    c,
    scale,
    over_keep,
    threshold,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """delta and dQ of the queries from `first` on."""
    q = _load(q_ptr, first, n, stride_q, BLOCK_M, D)
    grad = _load(grad_ptr, first, n, stride_g, BLOCK_M, D)
    row = first + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + row, mask=row < n, other=0.0)
    if q_ptr.dtype.element_ty == tl.float32:
        delta = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, m, BLOCK_N):
            p, dp, _ = _walk_keys(
                q, grad, lse, k_ptr, v_ptr, seed_ptr, counter, first, start, m, heads,
                stride_k, stride_v, c, over_keep, threshold, D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            delta += tl.sum(p * dp, 1)
    else:
        out = _load(out_ptr, first, n, heads * D, BLOCK_M, D)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=row < n)
    dq = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(0, m, BLOCK_N):
        p, dp, k = _walk_keys(
            q, grad, lse, k_ptr, v_ptr, seed_ptr, counter, first, start, m, heads,
            stride_k, stride_v, c, over_keep, threshold, D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    _store(dq_ptr, dq * scale, first, n, heads * D, BLOCK_M, D)


@triton.jit
def _key_block(
    grad_ptr,  # (n, D), row stride stride_g; from here on: of one sequence and head
    lse_ptr,  # (n,) float32
    delta_ptr,  # (n,) float32
    q_ptr,  # (n, D), row stride stride_q
    k_ptr,  # (m, D), row stride stride_k
    v_ptr,  # (m, D), row stride stride_v
    dk_ptr,  # (m, D), row stride heads * D
    dv_ptr,  # (m, D), row stride heads * D
    seed_ptr,  # (1,) int64, or None: no dropout
    counter,
    first,
    n,
    m,
    heads,
    stride_g,
    stride_q,
    stride_k,
    stride_v,
    c,
    scale,
    over_keep,
    threshold,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dK and dV of the keys from `first` on. S and P stand transposed, (keys, queries), so that they are the
    left operands of their products as they come out of the registers."""
    k = _load(k_ptr, first, m, stride_k, BLOCK_N, D)
    v = _load(v_ptr, first, m, stride_v, BLOCK_N, D)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    for start in range(0, n, BLOCK_M):
        q = _load(q_ptr, start, n, stride_q, BLOCK_M, D)
        grad = _load(grad_ptr, start, n, stride_g, BLOCK_M, D)
        row = start + tl.arange(0, BLOCK_M)
        # P is 0 for rows that are not there; keys that are not there reach their own, unwritten rows only.
        lse = tl.load(lse_ptr + row, mask=row < n, other=float("inf"))
        delta = tl.load(delta_ptr + row, mask=row < n, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = tl.exp2(s * c - lse[None, :])
        dp = tl.dot(v, tl.trans(grad), input_precision="ieee") * over_keep
        kept_p = p
        if seed_ptr is not None:
            kept = tl.trans(_kept(seed_ptr, threshold, counter, start, first, heads, BLOCK_M, BLOCK_N))
            kept_p = tl.where(kept, p, 0.0)
            dp = tl.where(kept, dp, 0.0)
        dv = tl.dot(kept_p.to(grad.dtype), grad, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    _store(dk_ptr, dk * scale, first, m, heads * D, BLOCK_N, D)
    _store(dv_ptr, dv * over_keep, first, m, heads * D, BLOCK_N, D)


@triton.jit
def _one_block(
    grad_ptr,  # (n, D), row stride stride_g; from here on: of one sequence and head
    q_ptr,  # (n, D), row stride stride_q
    k_ptr,  # (m, D), row stride stride_k
    v_ptr,  # (m, D), row stride stride_v
    dq_ptr,  # (n, D), row stride heads * D
    dk_ptr,  # (m, D), row stride heads * D
    dv_ptr,  # (m, D), row stride heads * D
    seed_ptr,  # (1,) int64, or None: no dropout
    counter,
    n,
    m,
    heads,
    stride_g,
    stride_q,
    stride_k,
    stride_v,
    c,
    scale,
    over_keep,
    threshold,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All gradients of a sequence of at most BLOCK queries and 1 to BLOCK keys: L and delta stay inside."""
    first = n * 0
    q = _load(q_ptr, first, n, stride_q, BLOCK, D)
    k = _load(k_ptr, first, m, stride_k, BLOCK, D)
    v = _load(v_ptr, first, m, stride_v, BLOCK, D)
    grad = _load(grad_ptr, first, n, stride_g, BLOCK, D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    s = tl.where((tl.arange(0, BLOCK) < m)[None, :], s, float("-inf"))
    p = tl.exp2(s * c - (tl.max(s, 1) * c)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee") * over_keep
    kept_p = p
    if seed_ptr is not None:
        kept = _kept(seed_ptr, threshold, counter, first, first, heads, BLOCK, BLOCK)
        kept_p = tl.where(kept, p, 0.0)
        dp = tl.where(kept, dp, 0.0)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
    dv = tl.dot(tl.trans(kept_p.to(grad.dtype)), grad, input_precision="ieee")
    _store(dv_ptr, dv * over_keep, first, m, heads * D, BLOCK, D)
    dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
    _store(dk_ptr, dk * scale, first, m, heads * D, BLOCK, D)
    dq = tl.dot(ds, k, input_precision="ieee")
    _store(dq_ptr, dq * scale, first, n, heads * D, BLOCK, D)


@triton.jit(do_not_specialize=["rows_q", "sequences", "heads", "threshold"])
def backward_queries_kernel(
    grad_ptr,  # (rows_q, heads * D), row stride stride_g
    out_ptr,  # (rows_q, heads * D), contiguous
    lse_ptr,  # (heads, rows_q) float32
    delta_ptr,  # (heads, rows_q) float32, written
    q_ptr,  # (rows_q, heads * D), row stride stride_q
    k_ptr,  # (rows_k, heads * D), row stride stride_k
    v_ptr,  # (rows_k, heads * D), row stride stride_v
    dq_ptr,  # (rows_q, heads * D), contiguous
    seed_ptr,  # (1,) int64, or None: no dropout
    cu_q_ptr,  # (sequences + 1,) int32 or int64
    cu_k_ptr,  # (sequences + 1,) int32 or int64
    rows_q,
    sequences,
    heads,
    stride_g,
    stride_q,
    stride_k,
    stride_v,
    c,  # scale * log2(e)
    scale,
    over_keep,  # 1 / (1 - p)
    threshold,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (rows_q // BLOCK_M + sequences) * heads."""
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    sequence = _find_sequence(cu_q_ptr, sequences, tile, BLOCK_M)
    begin_q, n = _span(cu_q_ptr, sequence)
    begin_k, m = _span(cu_k_ptr, sequence)
    first = (tile - (begin_q // BLOCK_M).to(tl.int32) - sequence) * BLOCK_M
    if first < n:
        at = begin_q * heads * D + head * D
        statistics = head.to(tl.int64) * rows_q + begin_q
        _query_block(
            grad_ptr + begin_q * stride_g + head * D, out_ptr + at, lse_ptr + statistics,
            delta_ptr + statistics, q_ptr + begin_q * stride_q + head * D,
            k_ptr + begin_k * stride_k + head * D, v_ptr + begin_k * stride_v + head * D, dq_ptr + at,
            seed_ptr, begin_q * heads + head, first, n, m, heads, stride_g, stride_q, stride_k, stride_v,
            c, scale, over_keep, threshold, D, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows_q", "sequences", "heads", "threshold"])
def backward_keys_kernel(
    grad_ptr,  # (rows_q, heads * D), row stride stride_g
    lse_ptr,  # (heads, rows_q) float32
    delta_ptr,  # (heads, rows_q) float32
    q_ptr,  # (rows_q, heads * D), row stride stride_q
    k_ptr,  # (rows_k, heads * D), row stride stride_k
    v_ptr,  # (rows_k, heads * D), row stride stride_v
    dk_ptr,  # (rows_k, heads * D), contiguous
    dv_ptr,  # (rows_k, heads * D), contiguous
    seed_ptr,  # (1,) int64, or None: no dropout
    cu_q_ptr,  # (sequences + 1,) int32 or int64
    cu_k_ptr,  # (sequences + 1,) int32 or int64
    rows_q,
    sequences,
    heads,
    stride_g,
    stride_q,
    stride_k,
    stride_v,
    c,  # scale * log2(e)
    scale,
    over_keep,  # 1 / (1 - p)
    threshold,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (rows_k // BLOCK_N + sequences) * heads."""
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    sequence = _find_sequence(cu_k_ptr, sequences, tile, BLOCK_N)
    begin_q, n = _span(cu_q_ptr, sequence)
    begin_k, m = _span(cu_k_ptr, sequence)
    first = (tile - (begin_k // BLOCK_N).to(tl.int32) - sequence) * BLOCK_N
    if first < m:
        at = begin_k * heads * D + head * D
        statistics = head.to(tl.int64) * rows_q + begin_q
        _key_block(
            grad_ptr + begin_q * stride_g + head * D, lse_ptr + statistics, delta_ptr + statistics,
            q_ptr + begin_q * stride_q + head * D, k_ptr + begin_k * stride_k + head * D,
            v_ptr + begin_k * stride_v + head * D, dk_ptr + at, dv_ptr + at, seed_ptr,
            begin_q * heads + head, first, n, m, heads, stride_g, stride_q, stride_k, stride_v, c, scale,
            over_keep, threshold, D, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows_q", "sequences", "heads", "threshold"])
def backward_whole_kernel(
    grad_ptr,  # (rows_q, heads * D), row stride stride_g
    out_ptr,  # (rows_q, heads * D), contiguous
    lse_ptr,  # (heads, rows_q) float32
    delta_ptr,  # (heads, rows_q) float32, scratch
    q_ptr,  # (rows_q, heads * D), row stride stride_q
    k_ptr,  # (rows_k, heads * D), row stride stride_k
    v_ptr,  # (rows_k, heads * D), row stride stride_v
    dq_ptr,  # (rows_q, heads * D), contiguous
    dk_ptr,  # (rows_k, heads * D), contiguous
    dv_ptr,  # (rows_k, heads * D), contiguous
    seed_ptr,  # (1,) int64, or None: no dropout
    cu_q_ptr,  # (sequences + 1,) int32 or int64
    cu_k_ptr,  # (sequences + 1,) int32 or int64
    rows_q,
    sequences,
    heads,
    stride_g,
    stride_q,
    stride_k,
    stride_v,
    c,  # scale * log2(e)
    scale,
    over_keep,  # 1 / (1 - p)
    threshold,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: sequences * heads. A sequence longer than a block goes the long way inside its program, by steps
    of half a block, so that this way does not raise the registers of the usual one."""
    head = tl.program_id(0) % heads
    sequence = tl.program_id(0) // heads
    begin_q, n = _span(cu_q_ptr, sequence)
    begin_k, m = _span(cu_k_ptr, sequence)
    grad_ptr += begin_q * stride_g + head * D
    out_ptr += begin_q * heads * D + head * D
    q_ptr += begin_q * stride_q + head * D
    k_ptr += begin_k * stride_k + head * D
    v_ptr += begin_k * stride_v + head * D
    dq_ptr += begin_q * heads * D + head * D
    dk_ptr += begin_k * heads * D + head * D
    dv_ptr += begin_k * heads * D + head * D
    lse_ptr += head.to(tl.int64) * rows_q + begin_q
    delta_ptr += head.to(tl.int64) * rows_q + begin_q
    counter = begin_q * heads + head
    if (n <= BLOCK) & (m <= BLOCK) & (m > 0):
        _one_block(
            grad_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, seed_ptr, counter, n, m, heads,
            stride_g, stride_q, stride_k, stride_v, c, scale, over_keep, threshold, D, BLOCK,
        )  # fmt: skip
    else:
        for first in range(0, n, BLOCK):
            _query_block(
                grad_ptr, out_ptr, lse_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, seed_ptr, counter, first,
                n, m, heads, stride_g, stride_q, stride_k, stride_v, c, scale, over_keep, threshold,
                D, BLOCK, BLOCK // 2,
            )  # fmt: skip
        tl.debug_barrier()  # delta, written above by other threads of this program, is read below
        for first in range(0, m, BLOCK):
            _key_block(
                grad_ptr, lse_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr, seed_ptr, counter, first,
                n, m, heads, stride_g, stride_q, stride_k, stride_v, c, scale, over_keep, threshold,
                D, BLOCK // 2, BLOCK,
            )  # fmt: skip


class Blocks(NamedTuple):
    """How a kernel cuts up a sequence. whole: one program a sequence and head, else one a block."""

    whole: bool
    queries: int
    keys: int
    num_warps: int
    num_stages: int


def forward_blocks(head_dim: int, dtype: torch.dtype, queries: int) -> Blocks:
    """queries: rows a sequence, on average. Blocks of 64 rows run wgmma on sm_90, smaller ones waste less."""
    if dtype == torch.float32:  # no tensor core: small blocks, for the products' operands lie in registers
        return Blocks(False, 32, 32, 4 if head_dim == 32 else 8, 1)
    wide = head_dim == 128
    if queries <= 32 and not wide:
        return Blocks(True, 32, 32, 2, 2)
    if queries <= 64:
        return Blocks(True, 64, 64, 8 if wide else 4, 2)
    return Blocks(False, 128, 32 if wide else 64, 8, 3)


def backward_blocks(head_dim: int, dtype: torch.dtype, dropout: bool, longest: int) -> tuple[Blocks, Blocks]:
    """(for dQ, for dK and dV); the same whole one for all three. longest: the larger of queries and keys a
    sequence, on average. Whole only where most sequences of the usual spread of lengths fit one block."""
    if dtype == torch.float32:
        blocks = Blocks(False, 32, 32, 4 if head_dim == 32 else 8, 1)
        return blocks, blocks
    if longest <= 20 or (longest <= 40 and head_dim < 128):
        block = 32 if longest <= 20 else 64
        blocks = Blocks(True, block, block, 4, 1)
        return blocks, blocks
    if head_dim == 128:
        return Blocks(False, 64, 64, 8, 2), Blocks(False, 32, 64, 8, 2)
    walk = 32 if dropout else 64  # the mask is drawn in registers
    return Blocks(False, 64, walk, 4, 2), Blocks(False, walk, 64, 4, 2)


class _Call(NamedTuple):
    """What forward and backward hand their kernels alike, ready for them."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor
    seed: Tensor | None
    sequences: int
    heads: int
    head_dim: int
    c: float
    over_keep: float
    threshold: int


def _ready(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    heads: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> _Call:
    if q.dim() != 2 or k.dim() != 2 or k.shape != v.shape or q.shape[1] != k.shape[1] or q.shape[1] % heads:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        _refuse(
            "q, k, v", shapes, f"(queries, hidden), (keys, hidden) twice, {heads} heads in hidden", "reshape"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        got = f"{q.dtype}, {k.dtype}, {v.dtype}"
        _refuse("q, k, v", got, "one dtype of bfloat16, float16, float32", "convert them first")
    if q.shape[1] // heads not in HEAD_DIMS:
        wanted = f"hidden / heads of {', '.join(map(str, HEAD_DIMS))}"
        _refuse(
            "heads", f"hidden / heads of {q.shape[1] // heads}", wanted, "use fastgate.attention's torch form"
        )
    rows = q.shape[0] + k.shape[0]
    if cu_q.shape != cu_k.shape or cu_q.dim() != 1 or cu_q.numel() < (2 if rows else 1):
        got = f"shapes {tuple(cu_q.shape)}, {tuple(cu_k.shape)} for {rows} rows"
        _refuse("cu_q, cu_k", got, "(sequences + 1,) twice", "cumulate the lengths from 0")
    if not scale > 0.0:
        _refuse("scale", scale, "a positive number", "negate q and the scale")
    if dropout_p and seed is None:
        _refuse("seed", seed, "an int64 tensor of one element with dropout_p > 0", "pass a seed")
    q, k, v = (_unit_stride(t) for t in (q, k, v))
    threshold = min(round(dropout_p * 2.0**32), 2**32 - 1)
    return _Call(
        q, k, v, cu_q.contiguous(), cu_k.contiguous(), seed if dropout_p else None, cu_q.numel() - 1, heads,
        q.shape[1] // heads, scale * math.log2(math.e), 1.0 / (1.0 - dropout_p),
        threshold - 2**32 if threshold >= 2**31 else threshold,
    )  # fmt: skip


def _refuse(argument: str, got: object, wanted: str, remedy: str) -> None:
    raise ArgumentError(say("attention", argument, got, wanted, remedy))


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _slots(rows: int, block: int, call: _Call) -> int:
    return (rows // block + call.sequences) * call.heads if rows else 0


def forward(q: Tensor, *operands: Any) -> Tensor:
    """O (queries, hidden) of the operands of fastgate::attention, for which see fastgate/attention.py."""
    return _forward(_ready(q, *operands), saving=False)[0]


def forward_saving(q: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    """(O, L), L (heads, queries) float32, base 2, for `backward_saved`."""
    return _forward(_ready(q, *operands), saving=True)


def _forward(call: _Call, saving: bool) -> tuple[Tensor, Tensor]:
    rows = call.q.shape[0]
    out = call.q.new_empty(call.q.shape)
    lse = call.q.new_empty((call.heads, rows) if saving else (0,), dtype=torch.float32)
    if not rows:
        return out, lse
    blocks = forward_blocks(call.head_dim, call.q.dtype, rows // call.sequences)
    grid = call.sequences * call.heads if blocks.whole else _slots(rows, blocks.queries, call)
    with torch.cuda.device_of(call.q):
        forward_kernel[(grid,)](
            call.q, call.k, call.v, out, lse if saving else None, call.seed, call.cu_q, call.cu_k, rows,
            call.sequences, call.heads, call.q.stride(0), call.k.stride(0), call.v.stride(0), call.c,
            call.over_keep, call.threshold, call.head_dim, blocks.queries, blocks.keys, blocks.whole,
            num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        )  # fmt: skip
    return out, lse


def backward(grad: Tensor, q: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) from the gradient of O; runs forward again for O and L."""
    return backward_saved(grad, *forward_saving(q, *operands), q, *operands)


def backward_saved(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, *operands: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) from the gradient of O and what `forward_saving` gave."""
    call, scale = _ready(q, *operands), operands[5]
    grad, out = _unit_stride(grad), out.contiguous()
    dq, dk, dv = (t.new_empty(t.shape) for t in (call.q, call.k, call.v))
    delta = torch.empty_like(lse)
    rows_q, rows_k = call.q.shape[0], call.k.shape[0]
    if not rows_q + rows_k:
        return dq, dk, dv
    longest, dropout = max(rows_q, rows_k) // call.sequences, call.seed is not None
    by_query, by_key = backward_blocks(call.head_dim, call.q.dtype, dropout, longest)
    inputs = (call.q, call.k, call.v)
    numbers = (
        call.seed, call.cu_q, call.cu_k, rows_q, call.sequences, call.heads, grad.stride(0), call.q.stride(0),
        call.k.stride(0), call.v.stride(0), call.c, scale, call.over_keep, call.threshold, call.head_dim,
    )  # fmt: skip

    def launch(kernel: Any, grid: int, blocks: Blocks, *arguments: Any) -> None:
        if grid:
            kernel[(grid,)](*arguments, num_warps=blocks.num_warps, num_stages=blocks.num_stages)

    with torch.cuda.device_of(call.q):
        if by_query.whole:
            grid = call.sequences * call.heads
            launch(
                backward_whole_kernel, grid, by_query, grad, out, lse, delta, *inputs, dq, dk, dv, *numbers,
                by_query.queries,
            )  # fmt: skip
            return dq, dk, dv
        grid = _slots(rows_q, by_query.queries, call)
        launch(
            backward_queries_kernel, grid, by_query, grad, out, lse, delta, *inputs, dq, *numbers,
            by_query.queries, by_query.keys,
        )  # fmt: skip
        grid = _slots(rows_k, by_key.keys, call)
        launch(
            backward_keys_kernel, grid, by_key, grad, lse, delta, *inputs, dk, dv, *numbers,
            by_key.queries, by_key.keys,
        )  # fmt: skip
    return dq, dk, dv


class Variant(NamedTuple):
    """A kernel as `triton.compile` takes it. signature: types by argument, ":16" where divisible by 16."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


def variants(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Variant]:
    """Every form that forward and backward launch on aligned rows: head_dim, dtype, dropout, blocks."""
    for head_dim in HEAD_DIMS:
        for dtype in dtypes:
            for dropout in (False, True):
                for kernel, blocks, sizes in _launches(head_dim, dtype, dropout):
                    yield _variant(kernel, head_dim, dtype, dropout, blocks, sizes)


def _launches(
    head_dim: int, dtype: torch.dtype, dropout: bool
) -> Iterator[tuple[Any, Blocks, dict[str, Any]]]:
    means = (16, 32, 64, 128)  # one in each range of the choices above
    for blocks in dict.fromkeys(forward_blocks(head_dim, dtype, mean) for mean in means):
        yield (
            forward_kernel,
            blocks,
            {"BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys, "WHOLE": blocks.whole},
        )
    for by_query, by_key in dict.fromkeys(backward_blocks(head_dim, dtype, dropout, mean) for mean in means):
        if by_query.whole:
            yield backward_whole_kernel, by_query, {"BLOCK": by_query.queries}
            continue
        for kernel, blocks in ((backward_queries_kernel, by_query), (backward_keys_kernel, by_key)):
            yield kernel, blocks, {"BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys}


def _variant(
    kernel: Any, head_dim: int, dtype: torch.dtype, dropout: bool, blocks: Blocks, sizes: dict[str, Any]
) -> Variant:
    element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    special = {"lse_ptr": "*fp32:16", "delta_ptr": "*fp32:16", "cu_q_ptr": "*i32:16", "cu_k_ptr": "*i32:16"}
    constexprs = {"D": head_dim, **sizes}
    if dropout:
        special["seed_ptr"] = "*i64:16"
    else:
        constexprs["seed_ptr"] = None
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = special.get(name, f"*{element}:16")
        elif name.startswith("stride_"):
            signature[name] = "i32:16"
        else:
            signature[name] = "fp32" if name in ("c", "scale", "over_keep") else "i32"
    cut = f"{'whole' if blocks.whole else 'tiles'} {blocks.queries}x{blocks.keys}"
    name = f"{kernel.__name__} {element} {head_dim} {cut}{' dropout' if dropout else ''}"
    return Variant(name, kernel, signature, constexprs, blocks.num_warps, blocks.num_stages)
