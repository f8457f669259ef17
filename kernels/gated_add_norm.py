"""gated_add_norm in Triton, forward and backward, in fastgate/ops/reference/gated_add_norm.py's symbols.

Forward reads x and residual once and writes y once; both norms' statistics are taken from the row in
registers, the variance from centred values. It keeps nothing for backward.

Backward reads grad, x and residual once and computes u, xhat and rstd again. With rows i, channels j, means
over channels, keep mask m, kept = 1 / (1 - p), and xhat = (u - mean(u)) * rstd:

    y = xhat * weight + norm_bias
    dweight = sum_i dy * xhat,  dnorm_bias = sum_i dy
    t = dy * weight is the gradient of xhat. xhat has mean 0 and mean square var * rstd^2 for every u, so of t
    only what changes neither gets through:
    du = rstd * (t - mean(t) - xhat * mean(t * xhat))                              [through(dy)]

With a second norm, xhat2 and rstd2 belong to y, and the first norm's dy is through(dy2) under weight2. Then,
with u = scale * residual + gate * d + offset and d = m * kept * (x + bias):

    dresidual = scale * du      dscale = sum_i du * residual      doffset = sum_i du
    dx = gate * m * kept * du   dbias = sum_i dx                  dgate = sum_ij du * d

Tiles, the norm's arithmetic and sums over rows: kernels/norm.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgate.kernels.launch import Kernel, aligned
from fastgate.kernels.norm import (
    STAGES,
    backward_tile,
    channels,
    contiguous,
    dropout_arguments,
    dtypes,
    elements,
    forward_tile,
    keeps_vectors,
    kept_in_tile,
    normalise,
    read,
    resident_programs,
    through,
    write_requested,
)
from fastgate.kernels.sums import add_up
from fastgate.ops.gated_add_norm import DRESIDUAL, DX, PARAMETER_BIT

# The bits of backward's `requested`, and each as the kernel reads it.
PARAMETER_BITS = sum(PARAMETER_BIT.values())
BIAS = tl.constexpr(PARAMETER_BIT["bias"])
GATE = tl.constexpr(PARAMETER_BIT["gate"])
SCALE = tl.constexpr(PARAMETER_BIT["scale"])
OFFSET = tl.constexpr(PARAMETER_BIT["offset"])
WEIGHT = tl.constexpr(PARAMETER_BIT["weight"])
NORM_BIAS = tl.constexpr(PARAMETER_BIT["norm_bias"])
WEIGHT2 = tl.constexpr(PARAMETER_BIT["weight2"])
NORM_BIAS2 = tl.constexpr(PARAMETER_BIT["norm_bias2"])


@triton.jit
def _mix(
    x,  # (CHUNKS, ROWS, WIDTH) float32
    residual,  # (CHUNKS, ROWS, WIDTH) float32
    bias,  # (hidden,); None where not given, as all below to key
    scale,  # (hidden,)
    offset,  # (hidden,)
    gate,  # a number
    key,  # a number, int64; None: nothing is dropped
    b,  # the elements of bias, (CHUNKS, ROWS, WIDTH) float32; None where they are still to be read
    s,  # of scale
    h,  # of offset
    row,  # (1, ROWS, 1) int64
    channel,  # (CHUNKS, ROWS, WIDTH) int32
    valid,  # (CHUNKS, ROWS, WIDTH) bool
    threshold,
    kept_scale,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """u, and what backward needs besides: d, and which of its elements dropout keeps."""
    u = residual
    if scale is not None:
        u = u * elements(s, scale, channel, valid)
    d = x
    if bias is not None:
        d += elements(b, bias, channel, valid)
    mask = valid
    if key is not None:
        mask = kept_in_tile(key, row, threshold, CHUNKS, ROWS, WIDTH)
        d = tl.where(mask, d * kept_scale, 0.0)
    if gate is not None:
        u += d * gate
    else:
        u += d
    if offset is not None:
        u += elements(h, offset, channel, valid)
    return u, d, mask


@triton.jit(do_not_specialize=["rows", "hidden", "threshold"])
def forward_kernel(
    x,  # (rows, hidden)
    residual,  # (rows, hidden)
    weight,  # (hidden,), as all vectors
    norm_bias,
    bias,  # None where not given, as all below but y
    gate,  # ()
    scale,
    offset,
    seed,  # () int64
    weight2,
    norm_bias2,
    y,  # (rows, hidden)
    rows: tl.int64,
    hidden: tl.int32,
    eps: tl.float32,
    eps2: tl.float32,
    threshold: tl.int32,
    kept_scale: tl.float32,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    hidden = hidden // VECTOR * VECTOR  # which tells the compiler how far rows are aligned
    channel, valid = channels(hidden, ROWS, CHUNKS, WIDTH)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    at, inside = row * hidden + channel, valid & (row < rows)
    z, key = None, None
    if gate is not None:
        z = tl.load(gate).to(tl.float32)
    if seed is not None:
        key = tl.load(seed)
    u, _, _ = _mix(
        read(x + at, inside), read(residual + at, inside), bias, scale, offset, z, key, None, None, None,
        row, channel, valid, threshold, kept_scale, CHUNKS, ROWS, WIDTH,
    )  # fmt: skip
    xhat, _ = normalise(u, eps, hidden, valid, row < rows)
    out = xhat * read(weight + channel, valid) + read(norm_bias + channel, valid)
    if weight2 is not None:
        xhat, _ = normalise(out, eps2, hidden, valid, row < rows)
        out = xhat * read(weight2 + channel, valid) + read(norm_bias2 + channel, valid)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "hidden", "threshold"])
def backward_kernel(
    grad,  # (rows, hidden)
    x,  # (rows, hidden)
    residual,  # (rows, hidden)
    weight,  # (hidden,), as all vectors
    norm_bias,  # None without a second norm
    bias,  # None where not given, as all below
    gate,  # ()
    scale,
    offset,
    seed,  # () int64
    weight2,
    dx,  # (rows, hidden); None where not requested
    dresidual,  # (rows, hidden); None where not requested
    sums,  # (programs, parameters requested, hidden) float32; None where none is requested
    rows: tl.int64,
    hidden: tl.int32,
    eps: tl.float32,
    eps2: tl.float32,
    threshold: tl.int32,
    kept_scale: tl.float32,
    KEEP: tl.constexpr,
    STAGES: tl.constexpr,
    REQUESTED: tl.constexpr,
    COUNT: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    hidden = hidden // VECTOR * VECTOR  # which tells the compiler how far rows are aligned
    channel, valid = channels(hidden, ROWS, CHUNKS, WIDTH)
    zeros = tl.zeros((CHUNKS, ROWS, WIDTH), tl.float32)
    dbias, dgate, dscale, doffset = zeros, zeros, zeros, zeros
    dweight, dnorm_bias, dweight2, dnorm_bias2 = zeros, zeros, zeros, zeros
    # Kept in registers where there are enough, so that only the rows' own loads are left to be pipelined.
    w, w2, n, b, s, h, z, key = None, None, None, None, None, None, None, None
    if gate is not None:
        z = tl.load(gate).to(tl.float32)
    if seed is not None:
        key = tl.load(seed)
    if KEEP:
        w = read(weight + channel, valid)
        if weight2 is not None:
            w2, n = read(weight2 + channel, valid), read(norm_bias + channel, valid)
        if bias is not None:
            b = read(bias + channel, valid)
        if scale is not None:
            s = read(scale + channel, valid)
        if offset is not None:
            h = read(offset + channel, valid)
    first, step = tl.program_id(0).to(tl.int64) * ROWS, tl.num_programs(0).to(tl.int64) * ROWS
    for start in tl.range(first, rows, step, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[None, :, None]
        row_valid = row < rows
        at, inside = row * hidden + channel, valid & row_valid
        dy = read(grad + at, inside)
        r = read(residual + at, inside)
        u, d, mask = _mix(
            read(x + at, inside), r, bias, scale, offset, z, key, b, s, h, row, channel, valid, threshold,
            kept_scale, CHUNKS, ROWS, WIDTH,
        )  # fmt: skip
        xhat, rstd = normalise(u, eps, hidden, valid, row_valid)
        if weight2 is not None:
            v = xhat * elements(w, weight, channel, valid) + elements(n, norm_bias, channel, valid)
            xhat2, rstd2 = normalise(v, eps2, hidden, valid, row_valid)
            if WEIGHT2 & REQUESTED:
                dweight2 += dy * xhat2
            if NORM_BIAS2 & REQUESTED:
                dnorm_bias2 += dy
            dy = through(dy, elements(w2, weight2, channel, valid), xhat2, rstd2, hidden)
        if WEIGHT & REQUESTED:
            dweight += dy * xhat
        if NORM_BIAS & REQUESTED:
            dnorm_bias += dy
        du = through(dy, elements(w, weight, channel, valid), xhat, rstd, hidden)
        if OFFSET & REQUESTED:
            doffset += du
        if SCALE & REQUESTED:
            dscale += du * r
        if GATE & REQUESTED:
            dgate += du * d
        if dresidual is not None:
            dr = du
            if scale is not None:
                dr = du * elements(s, scale, channel, valid)
            tl.store(dresidual + at, dr.to(dresidual.dtype.element_ty), mask=inside)
        along_x = du
        if gate is not None:
            along_x = along_x * z
        if seed is not None:
            along_x = tl.where(mask, along_x * kept_scale, 0.0)
        if BIAS & REQUESTED:
            dbias += along_x
        if dx is not None:
            tl.store(dx + at, along_x.to(dx.dtype.element_ty), mask=inside)
    if sums is not None:
        to = sums + tl.program_id(0).to(tl.int64) * COUNT * hidden
        to = write_requested(to, dbias, hidden, BIAS & REQUESTED, CHUNKS, WIDTH)
        to = write_requested(to, dgate, hidden, GATE & REQUESTED, CHUNKS, WIDTH)
        to = write_requested(to, dscale, hidden, SCALE & REQUESTED, CHUNKS, WIDTH)
        to = write_requested(to, doffset, hidden, OFFSET & REQUESTED, CHUNKS, WIDTH)
        to = write_requested(to, dweight, hidden, WEIGHT & REQUESTED, CHUNKS, WIDTH)
        to = write_requested(to, dnorm_bias, hidden, NORM_BIAS & REQUESTED, CHUNKS, WIDTH)
        to = write_requested(to, dweight2, hidden, WEIGHT2 & REQUESTED, CHUNKS, WIDTH)
        to = write_requested(to, dnorm_bias2, hidden, NORM_BIAS2 & REQUESTED, CHUNKS, WIDTH)


FORWARD, BACKWARD = Kernel(forward_kernel), Kernel(backward_kernel)


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    bias: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    weight2: Tensor | None,
    norm_bias2: Tensor | None,
    eps2: float,
) -> Tensor:
    """y (..., H), contiguous, in the promoted dtype of x and residual; operands as in fastgate.ops."""
    dtype = x.dtype if x.dtype == residual.dtype else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not y.numel():
        return y
    seed, threshold, kept_scale = dropout_arguments("gated_add_norm", dropout_p, seed)
    vectors = (weight, norm_bias, bias, gate, scale, offset, seed, weight2, norm_bias2)
    tensors = tuple([contiguous(tensor) for tensor in (x, residual, *vectors)])
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    tile = forward_tile(hidden, min(x.itemsize, residual.itemsize), rows)
    FORWARD.launch(
        (-(-rows // tile.rows), 1, 1),
        (tile, aligned(*tensors, y), dtypes(*tensors)),
        (*tensors, y, rows, hidden, eps, eps2, threshold, kept_scale, *tile[:4]),
        tile.num_warps,
    )
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    bias: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    weight2: Tensor | None,
    norm_bias2: Tensor | None,
    eps2: float,
    requested: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dresidual, parameters' gradients): those that the bits of `requested` ask for, the others empty.

    grad: (..., H), of y. The parameters' gradients are stacked in the order of PARAMETERS in
    fastgate/ops/gated_add_norm.py: (number requested, H) float32; the gate's row sums to its gradient.
    """
    hidden = x.shape[-1]
    count = (requested & PARAMETER_BITS).bit_count()
    dx = torch.empty(x.shape if requested & DX else (0,), dtype=x.dtype, device=x.device)
    dresidual = torch.empty(
        residual.shape if requested & DRESIDUAL else (0,), dtype=residual.dtype, device=x.device
    )
    stacked = torch.empty((count, hidden), dtype=torch.float32, device=x.device)
    if not x.numel():
        return dx, dresidual, stacked.zero_()
    seed, threshold, kept_scale = dropout_arguments("gated_add_norm", dropout_p, seed)
    first_bias = norm_bias if weight2 is not None else None
    vectors = (weight, first_bias, bias, gate, scale, offset, seed, weight2)
    tensors = tuple([contiguous(tensor) for tensor in (grad, x, residual, *vectors)])
    rows = x.numel() // hidden
    tile = backward_tile(hidden, min(grad.itemsize, x.itemsize, residual.itemsize))
    programs = resident_programs(rows, tile, x.device)
    sums = None
    if count:
        sums = stacked if programs == 1 else torch.empty((programs, *stacked.shape), device=x.device)
    outputs = (dx if requested & DX else None, dresidual if requested & DRESIDUAL else None, sums)
    numbers = (rows, hidden, eps, eps2, threshold, kept_scale)
    keep = keeps_vectors(hidden)
    BACKWARD.launch(
        (programs, 1, 1),
        (tile, requested, aligned(*tensors, *outputs), dtypes(*tensors)),
        (*tensors, *outputs, *numbers, keep, STAGES if keep else 1, requested, count, *tile[:4]),
        tile.num_warps,
    )
    if sums is not None and programs > 1:
        add_up(sums, stacked)
    return dx, dresidual, stacked
