"""Self-attention over unpadded batches in Triton, backward: gradients of q, k and v from the gradient of O.

In attention_forward.py's symbols, for one head of one sequence, with q for q + b_q and v for v + b_v:

    dV = (M * P)^T dO / (1 - p)        dP = M * (dO v^T) / (1 - p)
    dS = P * (dP - delta)              delta_i = sum_j P_ij dP_ij = sum_d dO_id O_id
    dQ = scale dS k                    dK = scale dS^T q

dS is the softmax's Jacobian diag(P) - P P^T applied to dP. The two forms of delta are equal because
sum_j P_ij dP_ij = sum_d dO_id sum_j M_ij P_ij v_jd / (1 - p), and that sum over j is O_id: one pass over O
in place of another over the keys. In float32 that is not exact enough: where one P_ij is nearly 1, dP - delta
cancels, and only the sum over P dP errs as dP itself does. So float32 walks the keys twice, and makes every
dP of the same sums in the same order.

The biases' gradients are the sums of dQ and dV over rows; that of the keys' bias, the sum of dK, is zero, for
every row of dS sums to zero. P and dS are rounded to the operands' dtype for their products.

Two kernels, neither with an atomic: `backward_queries_kernel` owns dQ of a block of queries and walks the
keys (three products: S, dP, dQ), `backward_keys_kernel` owns dK and dV of a block of keys and walks the
queries (four: S, dP, dV, dK). Seven products where one kernel with atomics needs five; in return the same
bits come at every call. What a kernel walks goes from memory to the tensor cores without a stop in the
registers: so the queries' kernel takes dO b_v, one number a query, into dP in place of adding b_v to v
(float32, whose operands pass through registers anyhow, adds it), and leaves q + b_q behind for the keys'
kernel.

`backward_whole_kernel`, for short sequences, makes dQ, dK and dV of one that fits a block out of one S and
one dP: five products, each operand read once.
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
def _walk_keys(
    q,  # n rows
    grad,  # n rows
    queries,  # (BLOCK_M, D), their bias added
    grads,  # (BLOCK_M, D)
    lse,  # (BLOCK_M,)
    along_bias,  # (BLOCK_M,): dO b_v, or None
    q_bias_ptr,  # (D,), or None
    v_bias_ptr,  # (D,), or None
    k,  # m rows
    v,  # m rows
    drop,
    first,
    start,
    n,
    m,
    c,
    over_keep,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """P, dP and k of the keys from `start` on."""
    keys = load_rows(k, start, m, BLOCK_N, D)
    if queries.dtype == tl.float32:
        s = dot_by_parts(q, q_bias_ptr, first, n, k, None, start, m, BLOCK_M, BLOCK_N, D)
        dp = dot_by_parts(grad, None, first, n, v, v_bias_ptr, start, m, BLOCK_M, BLOCK_N, D)
    else:
        s = tl.dot(queries, tl.trans(keys))
        dp = tl.dot(grads, tl.trans(load_rows(v, start, m, BLOCK_N, D)))
        if along_bias is not None:
            dp += along_bias[:, None]
    s = tl.where((start + tl.arange(0, BLOCK_N) < m)[None, :], s, float("-inf"))
    p = tl.exp2(s * c - lse[:, None])
    dp *= over_keep
    if drop[0] is not None:
        dp = tl.where(kept_keys(drop, first, start, BLOCK_M, BLOCK_N), dp, 0.0)
    return p, dp, keys


@triton.jit
def _query_block(
    grad,  # n rows
    out,  # n rows
    q,  # n rows
    biased,  # n rows, written where there is a bias
    k,  # m rows
    v,  # m rows
    dq,  # n rows
    lse_ptr,  # (n,) float32
    delta_ptr,  # (n,) float32, written
    q_bias_ptr,  # (D,), or None
    v_bias_ptr,  # (D,), or None
    drop,
    first,
    n,
    m,
    c,
    scale,
    over_keep,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """delta, dQ and q + b_q of the queries from `first` on."""
    queries = add_bias(load_rows(q, first, n, BLOCK_M, D), q_bias_ptr, D)
    if q_bias_ptr is not None:
        store_rows(biased, queries, first, n, BLOCK_M, D)
    grads = load_rows(grad, first, n, BLOCK_M, D)
    row = first + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + row, mask=row < n, other=0.0)
    along_bias = None
    if grads.dtype == tl.float32:
        delta = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, m, BLOCK_N):
            p, dp, _ = _walk_keys(
                q, grad, queries, grads, lse, along_bias, q_bias_ptr, v_bias_ptr, k, v, drop,
                first, start, n, m, c, over_keep, D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            delta += tl.sum(p * dp, 1)
    else:
        delta = tl.sum(grads.to(tl.float32) * load_rows(out, first, n, BLOCK_M, D).to(tl.float32), 1)
        if v_bias_ptr is not None:
            along_bias = tl.sum(grads.to(tl.float32) * load_bias(v_bias_ptr, D), 1)
    tl.store(delta_ptr + row, delta, mask=row < n)
    total = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(0, m, BLOCK_N):
        p, dp, keys = _walk_keys(
            q, grad, queries, grads, lse, along_bias, q_bias_ptr, v_bias_ptr, k, v, drop,
            first, start, n, m, c, over_keep, D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        ds = p * (dp - delta[:, None])
        total = tl.dot(ds.to(keys.dtype), keys, total, input_precision="ieee")
    store_rows(dq, total * scale, first, n, BLOCK_M, D)


@triton.jit
def _key_block(
    grad,  # n rows
    q,  # n rows, their bias added
    k,  # m rows
    v,  # m rows
    dk,  # m rows
    dv,  # m rows
    lse_ptr,  # (n,) float32
    delta_ptr,  # (n,) float32
    v_bias_ptr,  # (D,), or None
    drop,
    first,
    n,
    m,
    c,
    scale,
    over_keep,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dK and dV of the keys from `first` on. S and P stand transposed, (keys, queries), so that they are the
    left operands of their products as they come out of the registers."""
    keys = load_rows(k, first, m, BLOCK_N, D)
    values = add_bias(load_rows(v, first, m, BLOCK_N, D), v_bias_ptr, D)
    along_k = tl.zeros((BLOCK_N, D), tl.float32)
    along_v = tl.zeros((BLOCK_N, D), tl.float32)
    for start in range(0, n, BLOCK_M):
        queries = load_rows(q, start, n, BLOCK_M, D)
        grads = load_rows(grad, start, n, BLOCK_M, D)
        row = start + tl.arange(0, BLOCK_M)
        # P is 0 for rows that are not there; keys that are not there reach their own, unwritten rows only.
        lse = tl.load(lse_ptr + row, mask=row < n, other=float("inf"))
        delta = tl.load(delta_ptr + row, mask=row < n, other=0.0)
        if keys.dtype == tl.float32:
            s = dot_by_parts(k, None, first, m, q, None, start, n, BLOCK_N, BLOCK_M, D)
            dp = dot_by_parts(v, v_bias_ptr, first, m, grad, None, start, n, BLOCK_N, BLOCK_M, D)
        else:
            s = tl.dot(keys, tl.trans(queries))
            dp = tl.dot(values, tl.trans(grads))
        p = tl.exp2(s * c - lse[None, :])
        dp *= over_keep
        kept_p = p
        if drop[0] is not None:
            kept = tl.trans(kept_keys(drop, start, first, BLOCK_M, BLOCK_N))
            kept_p = tl.where(kept, p, 0.0)
            dp = tl.where(kept, dp, 0.0)
        along_v = tl.dot(kept_p.to(grads.dtype), grads, along_v, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        along_k = tl.dot(ds.to(queries.dtype), queries, along_k, input_precision="ieee")
    store_rows(dk, along_k * scale, first, m, BLOCK_N, D)
    store_rows(dv, along_v * over_keep, first, m, BLOCK_N, D)


@triton.jit
def _one_block(
    grad,  # n rows
    q,  # n rows
    k,  # m rows
    v,  # m rows
    dq,  # n rows
    dk,  # m rows
    dv,  # m rows
    q_bias_ptr,  # (D,), or None
    v_bias_ptr,  # (D,), or None
    drop,
    n,
    m,
    c,
    scale,
    over_keep,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All gradients of a sequence of at most BLOCK queries and 1 to BLOCK keys: L and delta stay inside."""
    first = n * 0
    queries = add_bias(load_rows(q, first, n, BLOCK, D), q_bias_ptr, D)
    keys = load_rows(k, first, m, BLOCK, D)
    values = add_bias(load_rows(v, first, m, BLOCK, D), v_bias_ptr, D)
    grads = load_rows(grad, first, n, BLOCK, D)
    s = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    s = tl.where((tl.arange(0, BLOCK) < m)[None, :], s, float("-inf"))
    p = tl.exp2(s * c - (tl.max(s, 1) * c)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    dp = tl.dot(grads, tl.trans(values), input_precision="ieee") * over_keep
    kept_p = p
    if drop[0] is not None:
        kept = kept_keys(drop, first, first, BLOCK, BLOCK)
        kept_p = tl.where(kept, p, 0.0)
        dp = tl.where(kept, dp, 0.0)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(queries.dtype)
    along_v = tl.dot(tl.trans(kept_p.to(grads.dtype)), grads, input_precision="ieee")
    store_rows(dv, along_v * over_keep, first, m, BLOCK, D)
    along_k = tl.dot(tl.trans(ds), queries, input_precision="ieee")
    store_rows(dk, along_k * scale, first, m, BLOCK, D)
    along_q = tl.dot(ds, keys, input_precision="ieee")
    store_rows(dq, along_q * scale, first, n, BLOCK, D)


NUMBERS = [
    "rows_q", "sequences", "heads", "stride_g", "stride_q", "stride_k", "stride_v", "threshold",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def backward_queries_kernel(
    grad_ptr,  # (rows_q, heads * D), row stride stride_g
    out_ptr,  # (rows_q, heads * D), contiguous
    lse_ptr,  # (heads, rows_q) float32
    delta_ptr,  # (heads, rows_q) float32, written
    biased_ptr,  # (rows_q, heads * D), contiguous, written: q + b_q; None without that bias
    q_ptr,  # (rows_q, heads * D), row stride stride_q
    k_ptr,  # (rows_k, heads * D), row stride stride_k
    v_ptr,  # (rows_k, heads * D), row stride stride_v
    q_bias_ptr,  # (heads * D,), or None
    v_bias_ptr,  # (heads * D,), or None
    dq_ptr,  # (rows_q, heads * D), contiguous
    seed_ptr,  # (1,) int64, or None: no dropout
    cu_q_ptr,  # (sequences + 1,) int32 or int64
    cu_k_ptr,  # (sequences + 1,) int32 or int64
    rows_q: tl.int64,
    sequences: tl.int32,
    heads: tl.int32,
    stride_g: tl.int32,
    stride_q: tl.int32,
    stride_k: tl.int32,
    stride_v: tl.int32,
    c: tl.float32,  # scale * log2(e)
    scale: tl.float32,
    over_keep: tl.float32,  # 1 / (1 - p)
    threshold: tl.int32,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (rows_q // BLOCK_M + sequences) * heads."""
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    sequence = find_sequence(cu_q_ptr, sequences, tile, BLOCK_M)
    begin_q, n = span_of(cu_q_ptr, sequence)
    begin_k, m = span_of(cu_k_ptr, sequence)
    first = first_of(tile, begin_q, sequence, BLOCK_M)
    if q_bias_ptr is not None:
        q_bias_ptr += head * D
    if v_bias_ptr is not None:
        v_bias_ptr += head * D
    if first < n:
        grad = head_rows(grad_ptr, begin_q, stride_g // VECTOR * VECTOR, head, D)
        out = head_rows(out_ptr, begin_q, heads * D, head, D)
        q = head_rows(q_ptr, begin_q, stride_q // VECTOR * VECTOR, head, D)
        biased = q
        if q_bias_ptr is not None:
            biased = head_rows(biased_ptr, begin_q, heads * D, head, D)
        k = head_rows(k_ptr, begin_k, stride_k // VECTOR * VECTOR, head, D)
        v = head_rows(v_ptr, begin_k, stride_v // VECTOR * VECTOR, head, D)
        dq = head_rows(dq_ptr, begin_q, heads * D, head, D)
        statistics = head * rows_q + begin_q
        _query_block(
            grad, out, q, biased, k, v, dq, lse_ptr + statistics, delta_ptr + statistics,
            q_bias_ptr, v_bias_ptr,
            (seed_ptr, threshold, heads, begin_q * heads + head), first, n, m, c, scale, over_keep,
            D, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def backward_keys_kernel(
    grad_ptr,  # (rows_q, heads * D), row stride stride_g
    lse_ptr,  # (heads, rows_q) float32
    delta_ptr,  # (heads, rows_q) float32
    q_ptr,  # (rows_q, heads * D), row stride stride_q: q + b_q
    k_ptr,  # (rows_k, heads * D), row stride stride_k
    v_ptr,  # (rows_k, heads * D), row stride stride_v
    v_bias_ptr,  # (heads * D,), or None
    dk_ptr,  # (rows_k, heads * D), contiguous
    dv_ptr,  # (rows_k, heads * D), contiguous
    seed_ptr,  # (1,) int64, or None: no dropout
    cu_q_ptr,  # (sequences + 1,) int32 or int64
    cu_k_ptr,  # (sequences + 1,) int32 or int64
    rows_q: tl.int64,
    sequences: tl.int32,
    heads: tl.int32,
    stride_g: tl.int32,
    stride_q: tl.int32,
    stride_k: tl.int32,
    stride_v: tl.int32,
    c: tl.float32,  # scale * log2(e)
    scale: tl.float32,
    over_keep: tl.float32,  # 1 / (1 - p)
    threshold: tl.int32,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (rows_k // BLOCK_N + sequences) * heads."""
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    sequence = find_sequence(cu_k_ptr, sequences, tile, BLOCK_N)
    begin_q, n = span_of(cu_q_ptr, sequence)
    begin_k, m = span_of(cu_k_ptr, sequence)
    first = first_of(tile, begin_k, sequence, BLOCK_N)
    if v_bias_ptr is not None:
        v_bias_ptr += head * D
    if first < m:
        grad = head_rows(grad_ptr, begin_q, stride_g // VECTOR * VECTOR, head, D)
        q = head_rows(q_ptr, begin_q, stride_q // VECTOR * VECTOR, head, D)
        k = head_rows(k_ptr, begin_k, stride_k // VECTOR * VECTOR, head, D)
        v = head_rows(v_ptr, begin_k, stride_v // VECTOR * VECTOR, head, D)
        dk = head_rows(dk_ptr, begin_k, heads * D, head, D)
        dv = head_rows(dv_ptr, begin_k, heads * D, head, D)
        statistics = head * rows_q + begin_q
        _key_block(
            grad, q, k, v, dk, dv, lse_ptr + statistics, delta_ptr + statistics,
            v_bias_ptr, (seed_ptr, threshold, heads, begin_q * heads + head), first, n, m,
            c, scale, over_keep, D, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def backward_whole_kernel(
    grad_ptr,  # (rows_q, heads * D), row stride stride_g
    out_ptr,  # (rows_q, heads * D), contiguous
    lse_ptr,  # (heads, rows_q) float32
    delta_ptr,  # (heads, rows_q) float32, scratch
    biased_ptr,  # (rows_q, heads * D), contiguous, scratch; None without q_bias_ptr
    q_ptr,  # (rows_q, heads * D), row stride stride_q
    k_ptr,  # (rows_k, heads * D), row stride stride_k
    v_ptr,  # (rows_k, heads * D), row stride stride_v
    q_bias_ptr,  # (heads * D,), or None
    v_bias_ptr,  # (heads * D,), or None
    dq_ptr,  # (rows_q, heads * D), contiguous
    dk_ptr,  # (rows_k, heads * D), contiguous
    dv_ptr,  # (rows_k, heads * D), contiguous
    seed_ptr,  # (1,) int64, or None: no dropout
    cu_q_ptr,  # (sequences + 1,) int32 or int64
    cu_k_ptr,  # (sequences + 1,) int32 or int64
    rows_q: tl.int64,
    heads: tl.int32,
    stride_g: tl.int32,
    stride_q: tl.int32,
    stride_k: tl.int32,
    stride_v: tl.int32,
    c: tl.float32,  # scale * log2(e)
    scale: tl.float32,
    over_keep: tl.float32,  # 1 / (1 - p)
    threshold: tl.int32,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: sequences * heads. A sequence longer than a block goes the long way inside its program, by steps
    of half a block, so that this way does not raise the registers of the usual one."""
    head = tl.program_id(0) % heads
    sequence = tl.program_id(0) // heads
    begin_q, n = span_of(cu_q_ptr, sequence)
    begin_k, m = span_of(cu_k_ptr, sequence)
    grad = head_rows(grad_ptr, begin_q, stride_g // VECTOR * VECTOR, head, D)
    q = head_rows(q_ptr, begin_q, stride_q // VECTOR * VECTOR, head, D)
    k = head_rows(k_ptr, begin_k, stride_k // VECTOR * VECTOR, head, D)
    v = head_rows(v_ptr, begin_k, stride_v // VECTOR * VECTOR, head, D)
    dq = head_rows(dq_ptr, begin_q, heads * D, head, D)
    dk = head_rows(dk_ptr, begin_k, heads * D, head, D)
    dv = head_rows(dv_ptr, begin_k, heads * D, head, D)
    biased = q
    if q_bias_ptr is not None:
        q_bias_ptr += head * D
        biased = head_rows(biased_ptr, begin_q, heads * D, head, D)
    if v_bias_ptr is not None:
        v_bias_ptr += head * D
    drop = (seed_ptr, threshold, heads, begin_q * heads + head)
    if (n <= BLOCK) & (m <= BLOCK) & (m > 0):
        _one_block(
            grad, q, k, v, dq, dk, dv, q_bias_ptr, v_bias_ptr, drop, n, m, c, scale, over_keep, D, BLOCK
        )  # fmt: skip
    else:
        out = head_rows(out_ptr, begin_q, heads * D, head, D)
        lse_ptrs = lse_ptr + head * rows_q + begin_q
        delta_ptrs = delta_ptr + head * rows_q + begin_q
        for first in range(0, n, BLOCK):
            _query_block(
                grad, out, q, biased, k, v, dq, lse_ptrs, delta_ptrs, q_bias_ptr, v_bias_ptr, drop, first,
                n, m, c, scale, over_keep, D, BLOCK, BLOCK // 2,
            )  # fmt: skip
        tl.debug_barrier()  # delta and biased, written above by other threads of this program, are read below
        for first in range(0, m, BLOCK):
            _key_block(
                grad, biased, k, v, dk, dv, lse_ptrs, delta_ptrs, v_bias_ptr, drop, first, n, m, c, scale,
                over_keep, D, BLOCK // 2, BLOCK,
            )  # fmt: skip


BACKWARD_QUERIES, BACKWARD_KEYS = Kernel(backward_queries_kernel), Kernel(backward_keys_kernel)
BACKWARD_WHOLE = Kernel(backward_whole_kernel)
