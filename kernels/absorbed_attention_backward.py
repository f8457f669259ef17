"""Absorbed attention's backward in Triton, in the symbols of its forward.

With u_h and v_h the gradients of mixed_h and total_h:

    dP_j = M_j (u_h . x_j + v_h) / (1 - p)     each weight meets its row, and the total
    dS_j = P_j (dP_j - delta_h)                delta_h = sum_j P_j dP_j = u_h . mixed_h + v_h total_h
    da_h = scale sum_j dS_j x_j                dx_j = sum_h (M_j P_j / (1 - p) u_h + scale dS_j a_h)

dS is the softmax's Jacobian diag(P) - P P^T applied to dP; the two forms of delta are equal since the sum
over j of M_j P_j x_j / (1 - p) is mixed. The second needs no pass over the rows, but where one P_j is nearly
1, dP - delta cancels, and mixed as it was rounded for the next product is not exact enough: forward leaves
behind, in the same precision, what the rounding took away. In float32 that sum is no more exact than what it
took from: float32 walks the rows twice. Without dropout total_h is 1, or 0 for an empty sequence, whatever
the operands: v_h has no effect, and the kernel is not given it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgate.kernels.absorbed_attention_tiles import (
    head_pointers,
    load_heads,
    load_rows,
    products,
    row_pointers,
    span,
    weighted,
)
from fastgate.kernels.dropout import kept
from fastgate.kernels.launch import Kernel


@triton.jit
def _weights(
    probe,  # (CHUNKS, HEADS, WIDTH)
    grad,  # (CHUNKS, HEADS, WIDTH), of mixed
    grad_total,  # (HEADS, 1) float32, or None
    lse,  # (HEADS, 1) float32
    share,  # (HEADS, 1) float32: what P is multiplied by, so that it adds up to 1; None: nothing
    rows,  # (BLOCK, CHUNKS, WIDTH)
    seed,  # int64, or None: no dropout
    counter,  # (HEADS, 1) int64
    start,
    stop,
    c,
    over_keep,
    threshold,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """P, M P / (1 - p) and dP, (HEADS, BLOCK) float32."""
    s = products(probe, rows)
    dp = products(grad, rows)
    # A row that is not there has the score 0, whose exponential may be infinite.
    p = tl.where((start + tl.arange(0, BLOCK) < stop)[None, :], tl.exp2(s * c - lse), 0.0)
    if share is not None:
        p *= share
    dropped = p
    if seed is not None:
        if grad_total is not None:
            dp += grad_total
        group = (start // 4 + tl.arange(0, BLOCK // 4))[None, :]
        mask = kept(seed, counter, group, threshold, (HEADS, BLOCK))
        dropped = tl.where(mask, p * over_keep, 0.0)
        dp = tl.where(mask, dp * over_keep, 0.0)
    return p, dropped, dp


@triton.jit(
    do_not_specialize=[
        "sequences",
        "heads",
        "rows",
        "stride_s",
        "stride_h",
        "stride_gs",
        "stride_gh",
        "threshold",
    ]
)
def backward_kernel(
    grad_ptr,  # (sequences, heads, HIDDEN), strides stride_gs, stride_gh, 1: of mixed
    grad_total_ptr,  # (sequences, heads) float32, contiguous, as all below; None: no effect
    mixed_ptr,  # (sequences, heads, HIDDEN); float32 reads none of these three
    residue_ptr,  # (sequences, heads, HIDDEN)
    total_ptr,  # (sequences, heads) float32
    lse_ptr,  # (sequences, heads) float32
    probe_ptr,  # (sequences, heads, HIDDEN), strides stride_s, stride_h, 1
    x_ptr,  # (rows, HIDDEN)
    cu_ptr,  # (sequences + 1,) int32 or int64
    seed_ptr,  # () int64, or None: no dropout
    dprobe_ptr,  # (sequences, heads, HIDDEN); with SPLITS > 1 (SPLITS, sequences, heads, HIDDEN) float32
    dx_ptr,  # (rows, HIDDEN); with several groups (groups, rows, HIDDEN) float32; None: left to rows_kernel
    weights_ptr,  # (2, rows, heads) float32: M P / (1 - p) and scale dS, for it; None with dx
    sequences: tl.int32,
    heads: tl.int32,
    rows: tl.int64,
    stride_gs: tl.int64,
    stride_gh: tl.int64,
    stride_s: tl.int64,
    stride_h: tl.int64,
    c: tl.float32,  # scale * log2(e)
    scale: tl.float32,
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
    """Grid: (sequences, SPLITS, groups of HEADS heads)."""
    sequence, split, first_head = tl.program_id(0), tl.program_id(1), tl.program_id(2) * HEADS
    begin, length, first, stop = span(cu_ptr, sequence, split, SPLITS, BLOCK)
    x_ptr += begin * HIDDEN
    if dx_ptr is not None:
        dx_ptr += (tl.program_id(2) * rows + begin) * HIDDEN
    stride_s, stride_h = stride_s // VECTOR * VECTOR, stride_h // VECTOR * VECTOR
    stride_gs, stride_gh = stride_gs // VECTOR * VECTOR, stride_gh // VECTOR * VECTOR
    probe = load_heads(
        probe_ptr + sequence.to(tl.int64) * stride_s + first_head * stride_h, stride_h, heads - first_head,
        HIDDEN, HEADS, CHUNKS, WIDTH,
    )  # fmt: skip
    grad = load_heads(
        grad_ptr + sequence.to(tl.int64) * stride_gs + first_head * stride_gh, stride_gh, heads - first_head,
        HIDDEN, HEADS, CHUNKS, WIDTH,
    )  # fmt: skip
    head = first_head + tl.arange(0, HEADS)
    place = sequence.to(tl.int64) * heads
    counter = (place + head)[:, None]
    lse = tl.load(lse_ptr + place + head, mask=head < heads, other=0.0)[:, None]
    seed, grad_total, share = None, None, None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        if grad_total_ptr is not None:
            grad_total = tl.load(grad_total_ptr + place + head, mask=head < heads, other=0.0)[:, None]
    if x_ptr.dtype.element_ty == tl.float32:
        delta = tl.zeros((HEADS,), tl.float32)
        whole = tl.zeros((HEADS,), tl.float32)
        for start in tl.range(0, length, BLOCK, num_stages=STAGES):
            block = load_rows(x_ptr, start, length, HIDDEN, BLOCK, CHUNKS, WIDTH)
            p, _, dp = _weights(
                probe, grad, grad_total, lse, None, block, seed, counter, start, length, c, over_keep,
                threshold, HEADS, BLOCK,
            )  # fmt: skip
            delta += tl.sum(p * dp, 1)
            whole += tl.sum(p, 1)
        # L's rounding makes all P too large or too small alike, which dP - delta would show.
        share = 1.0 / tl.where(whole == 0.0, 1.0, whole)
        delta *= share
        share = share[:, None]
    else:
        skip = (place + first_head) * HIDDEN
        mixed = load_heads(mixed_ptr + skip, HIDDEN, heads - first_head, HIDDEN, HEADS, CHUNKS, WIDTH)
        residue = load_heads(residue_ptr + skip, HIDDEN, heads - first_head, HIDDEN, HEADS, CHUNKS, WIDTH)
        exact = mixed.to(tl.float32) + residue.to(tl.float32)
        delta = tl.sum(tl.sum(exact * grad.to(tl.float32), axis=2), axis=0)
        if grad_total is not None:
            total = tl.load(total_ptr + place + head, mask=head < heads, other=0.0)
            delta += total * tl.sum(grad_total, 1)
    dprobe = tl.zeros((CHUNKS, HEADS, WIDTH), tl.float32)
    for start in tl.range(first, stop, BLOCK, num_stages=STAGES):
        block = load_rows(x_ptr, start, stop, HIDDEN, BLOCK, CHUNKS, WIDTH)
        p, dropped, dp = _weights(
            probe, grad, grad_total, lse, share, block, seed, counter, start, stop, c, over_keep, threshold,
            HEADS, BLOCK,
        )  # fmt: skip
        ds = (p * (dp - delta[:, None]) * scale).to(block.dtype)
        if dx_ptr is not None:
            dropped = tl.broadcast_to(tl.trans(dropped.to(block.dtype))[None, :, :], (CHUNKS, BLOCK, HEADS))
            by_row = tl.broadcast_to(tl.trans(ds)[None, :, :], (CHUNKS, BLOCK, HEADS))
            dx = tl.dot(dropped, grad, input_precision="ieee")
            dx = tl.dot(by_row, probe, dx, input_precision="ieee")
            to, inside = row_pointers(dx_ptr, start, stop, HIDDEN, BLOCK, CHUNKS, WIDTH)
            tl.store(to, tl.permute(dx, (1, 0, 2)).to(dx_ptr.dtype.element_ty), mask=inside)
        else:
            row = start + tl.arange(0, BLOCK)
            to = weights_ptr + (begin + row)[None, :] * heads + head[:, None]
            inside = (row < stop)[None, :] & (head < heads)[:, None]
            tl.store(to, dropped, mask=inside)
            tl.store(to + rows * heads, ds, mask=inside)
        dprobe = weighted(ds, block, dprobe, HEADS, BLOCK, CHUNKS)
    at, valid = head_pointers(
        dprobe_ptr + ((split * sequences).to(tl.int64) * heads + place + first_head) * HIDDEN, HIDDEN,
        heads - first_head, HIDDEN, HEADS, CHUNKS, WIDTH,
    )  # fmt: skip
    tl.store(at, dprobe.to(dprobe_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["heads", "rows", "stride_s", "stride_h", "stride_gs", "stride_gh"])
def rows_kernel(
    grad_ptr,  # (sequences, heads, HIDDEN), strides stride_gs, stride_gh, 1: of mixed
    probe_ptr,  # (sequences, heads, HIDDEN), strides stride_s, stride_h, 1
    weights_ptr,  # (2, rows, heads) float32, as backward_kernel leaves them
    cu_ptr,  # (sequences + 1,) int32 or int64
    dx_ptr,  # (rows, HIDDEN)
    heads: tl.int32,
    rows: tl.int64,
    stride_gs: tl.int64,
    stride_gh: tl.int64,
    stride_s: tl.int64,
    stride_h: tl.int64,
    HIDDEN: tl.constexpr,
    SPLITS: tl.constexpr,
    VECTOR: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dx of float32, for whose registers the walk over rows leaves no room.

    Grid: (sequences, SPLITS, HIDDEN in runs of WIDTH). HEADS: all of them, padded."""
    sequence, split, run = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, _, first, stop = span(cu_ptr, sequence, split, SPLITS, BLOCK)
    stride_s, stride_h = stride_s // VECTOR * VECTOR, stride_h // VECTOR * VECTOR
    stride_gs, stride_gh = stride_gs // VECTOR * VECTOR, stride_gh // VECTOR * VECTOR
    channel = run * WIDTH + tl.arange(0, WIDTH)
    head = tl.arange(0, HEADS)
    valid = (head < heads)[:, None] & (channel < HIDDEN)[None, :]
    probe_ptr += sequence.to(tl.int64) * stride_s
    grad_ptr += sequence.to(tl.int64) * stride_gs
    probe = tl.load(probe_ptr + head[:, None] * stride_h + channel[None, :], mask=valid, other=0.0)
    grad = tl.load(grad_ptr + head[:, None] * stride_gh + channel[None, :], mask=valid, other=0.0)
    for start in range(first, stop, BLOCK):
        row = start + tl.arange(0, BLOCK)
        at = weights_ptr + (begin + row)[:, None] * heads + head[None, :]
        inside = (row < stop)[:, None] & (head < heads)[None, :]
        dx = tl.dot(tl.load(at, mask=inside, other=0.0), grad, input_precision="ieee")
        ds = tl.load(at + rows * heads, mask=inside, other=0.0)
        dx = tl.dot(ds, probe, dx, input_precision="ieee")
        to = dx_ptr + (begin + row)[:, None] * HIDDEN + channel[None, :]
        tl.store(to, dx, mask=(row < stop)[:, None] & (channel < HIDDEN)[None, :])


BACKWARD, ROWS = Kernel(backward_kernel), Kernel(rows_kernel)
