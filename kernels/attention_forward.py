"""Self-attention over unpadded batches in Triton, forward: softmax((q + b_q) k^T scale) (v + b_v).

For one head of one sequence with n queries i and m keys j; M is the dropout mask, p its probability,
c = scale * log2(e), so that every exponential is an exp2:

    S = (q + b_q) k^T      L_i = log2 sum_j 2^(c S_ij)      P_ij = 2^(c S_ij - L_i)
    O = (M * P) (v + b_v) / (1 - p) = ((M * P) v + w b_v) / (1 - p),      w_i = sum_j M_ij P_ij

The keys' bias is not there: it adds the same to every score of a query, which the softmax takes out again.
The queries' bias is added to the block that a program reads once; the values' is added to what they were
mixed to, so that keys and values go from memory to the tensor cores without a stop in the registers.

A program owns a block of queries and walks the keys with the running maximum and sum of the softmax; it can
leave L behind for backward. Statistics and sums are float32; P is rounded to the operands' dtype for its
product, as the tensor cores want. float32 operands keep float32 products throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgate.kernels.attention_tiles import (
    add_bias,
    dot_by_parts,
    find_sequence,
    first_of,
    head_rows,
    kept_keys,
    load_bias,
    load_rows,
    span_of,
    store_rows,
)
from fastgate.kernels.launch import Kernel


@triton.jit
def _forward_block(
    q,  # n rows
    k,  # m rows
    v,  # m rows
    out,  # n rows
    lse_ptr,  # (n,) float32, or None
    q_bias_ptr,  # (D,), or None
    v_bias_ptr,  # (D,), or None
    drop,
    first,
    n,
    m,
    c,
    over_keep,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """O and L of the queries from `first` on."""
    queries = add_bias(load_rows(q, first, n, BLOCK_M, D), q_bias_ptr, D)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(0, m, BLOCK_N):
        if queries.dtype == tl.float32:
            s = dot_by_parts(q, q_bias_ptr, first, n, k, None, start, m, BLOCK_M, BLOCK_N, D)
        else:
            s = tl.dot(queries, tl.trans(load_rows(k, start, m, BLOCK_N, D)))
        values = load_rows(v, start, m, BLOCK_N, D)
        s = tl.where((start + tl.arange(0, BLOCK_N) < m)[None, :], s, float("-inf"))
        risen = tl.maximum(top, tl.max(s, 1) * c)  # finite: a block has at least one key
        p = tl.exp2(s * c - risen[:, None])
        shrink = tl.exp2(top - risen)
        total = total * shrink + tl.sum(p, 1)
        if drop[0] is not None:
            p = tl.where(kept_keys(drop, first, start, BLOCK_M, BLOCK_N), p, 0.0)
            if v_bias_ptr is not None:
                weight = weight * shrink + tl.sum(p, 1)
        mixed = tl.dot(p.to(values.dtype), values, mixed * shrink[:, None], input_precision="ieee")
        top = risen
    if v_bias_ptr is not None:
        if drop[0] is None:
            weight = total
        mixed += weight[:, None] * load_bias(v_bias_ptr, D)
    total = tl.where(total == 0.0, 1.0, total)  # without keys: zeros
    store_rows(out, mixed * (over_keep / total)[:, None], first, n, BLOCK_M, D)
    if lse_ptr is not None:
        row = first + tl.arange(0, BLOCK_M)
        tl.store(lse_ptr + row, top + tl.log2(total), mask=row < n)


@triton.jit(
    do_not_specialize=["rows_q", "sequences", "heads", "stride_q", "stride_k", "stride_v", "threshold"]
)
def forward_kernel(
    q_ptr,  # (rows_q, heads * D), row stride stride_q
    k_ptr,  # (rows_k, heads * D), row stride stride_k
    v_ptr,  # (rows_k, heads * D), row stride stride_v
    q_bias_ptr,  # (heads * D,), or None
    v_bias_ptr,  # (heads * D,), or None
    out_ptr,  # (rows_q, heads * D), contiguous
    lse_ptr,  # (heads, rows_q) float32, or None
    seed_ptr,  # (1,) int64, or None: no dropout
    cu_q_ptr,  # (sequences + 1,) int32 or int64
    cu_k_ptr,  # (sequences + 1,) int32 or int64
    rows_q: tl.int64,
    sequences: tl.int32,
    heads: tl.int32,
    stride_q: tl.int32,
    stride_k: tl.int32,
    stride_v: tl.int32,
    c: tl.float32,  # scale * log2(e)
    over_keep: tl.float32,  # 1 / (1 - p)
    threshold: tl.int32,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Grid: sequences * heads if WHOLE, else (rows_q // BLOCK_M + sequences) * heads."""
    head = tl.program_id(0) % heads
    place = tl.program_id(0) // heads
    sequence = place if WHOLE else find_sequence(cu_q_ptr, sequences, place, BLOCK_M)
    begin_q, n = span_of(cu_q_ptr, sequence)
    begin_k, m = span_of(cu_k_ptr, sequence)
    # // VECTOR * VECTOR tells the compiler how far rows are aligned, here and in backward.
    q = head_rows(q_ptr, begin_q, stride_q // VECTOR * VECTOR, head, D)
    k = head_rows(k_ptr, begin_k, stride_k // VECTOR * VECTOR, head, D)
    v = head_rows(v_ptr, begin_k, stride_v // VECTOR * VECTOR, head, D)
    out = head_rows(out_ptr, begin_q, heads * D, head, D)
    if q_bias_ptr is not None:
        q_bias_ptr += head * D
    if v_bias_ptr is not None:
        v_bias_ptr += head * D
    drop = (seed_ptr, threshold, heads, begin_q * heads + head)
    if lse_ptr is not None:
        lse_ptr += head * rows_q + begin_q
    if WHOLE:
        for first in range(0, n, BLOCK_M):
            _forward_block(
                q, k, v, out, lse_ptr, q_bias_ptr, v_bias_ptr, drop, first, n, m, c, over_keep,
                D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        first = first_of(place, begin_q, sequence, BLOCK_M)
        if first < n:
            _forward_block(
                q, k, v, out, lse_ptr, q_bias_ptr, v_bias_ptr, drop, first, n, m, c, over_keep,
                D, BLOCK_M, BLOCK_N,
            )  # fmt: skip


FORWARD = Kernel(forward_kernel)
