"""shift_norm in Triton, forward and backward, in fastgate/ops/reference/shift_norm.py's symbols.

Forward reads a row and the two beside it, which the program before and after it read too, so all but one come
out of the cache; it writes y once and keeps nothing for backward.

Backward is two kernels, because dx of a row needs du of three: the first reads grad and x once, computes u,
xhat and rstd again, writes du in float32 and sums the parameters' gradients; the second mixes du as forward
mixes x, with `before` and `after` in each other's place:

    dx_i = du_i + scale * du_i + [l_(i+1)] before * du_(i+1) + [l_i] after * du_(i-1)

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
    dtypes,
    elements,
    forward_tile,
    keeps_vectors,
    normalise,
    read,
    resident_programs,
    through,
    write_requested,
)
from fastgate.kernels.sums import add_up
from fastgate.ops.shift_norm import DX, PARAMETER_BIT

# The bits of backward's `requested`, and each as the kernel reads it.
PARAMETER_BITS = sum(PARAMETER_BIT.values())
OFFSET = tl.constexpr(PARAMETER_BIT["offset"])
SCALE = tl.constexpr(PARAMETER_BIT["scale"])
BEFORE = tl.constexpr(PARAMETER_BIT["before"])
AFTER = tl.constexpr(PARAMETER_BIT["after"])
WEIGHT = tl.constexpr(PARAMETER_BIT["weight"])
NORM_BIAS = tl.constexpr(PARAMETER_BIT["norm_bias"])


@triton.jit
def _three(
    x,  # (rows, hidden)
    has_left_neighbour,  # (rows,) bool
    row,  # (1, ROWS, 1) int64
    rows,
    hidden,
    channel,  # (CHUNKS, ROWS, WIDTH) int32
    valid,  # (CHUNKS, ROWS, WIDTH) bool
):
    """A tile's rows of x and those above and below, zeros where it is no neighbour: (CHUNKS, ROWS, WIDTH)."""
    at = row * hidden + channel
    above = tl.load(has_left_neighbour + row, mask=(row > 0) & (row < rows), other=0) != 0
    below = tl.load(has_left_neighbour + row + 1, mask=row + 1 < rows, other=0) != 0
    return (
        read(x + at, valid & (row < rows)),
        read(x + at - hidden, valid & above),
        read(x + at + hidden, valid & below),
    )


@triton.jit(do_not_specialize=["rows", "hidden"])
def forward_kernel(
    x,  # (rows, hidden)
    has_left_neighbour,  # (rows,) bool
    offset,  # (hidden,), as all vectors
    scale,
    before,
    after,
    weight,
    norm_bias,
    y,  # (rows, hidden)
    rows: tl.int64,
    hidden: tl.int32,
    eps: tl.float32,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    hidden = hidden // VECTOR * VECTOR  # which tells the compiler how far rows are aligned
    channel, valid = channels(hidden, ROWS, CHUNKS, WIDTH)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    current, above, below = _three(x, has_left_neighbour, row, rows, hidden, channel, valid)
    u = current + read(offset + channel, valid) + read(scale + channel, valid) * current
    u += read(before + channel, valid) * above + read(after + channel, valid) * below
    xhat, _ = normalise(u, eps, hidden, valid, row < rows)
    out = xhat * read(weight + channel, valid) + read(norm_bias + channel, valid)
    tl.store(y + row * hidden + channel, out.to(y.dtype.element_ty), mask=valid & (row < rows))


@triton.jit(do_not_specialize=["rows", "hidden"])
def backward_kernel(
    grad,  # (rows, hidden)
    x,  # (rows, hidden)
    has_left_neighbour,  # (rows,) bool
    offset,  # (hidden,), as all vectors
    scale,
    before,
    after,
    weight,
    du,  # (rows, hidden) float32; None where dx is not requested
    sums,  # (programs, parameters requested, hidden) float32; None where none is requested
    rows: tl.int64,
    hidden: tl.int32,
    eps: tl.float32,
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
    doffset, dscale, dbefore, dafter, dweight, dnorm_bias = zeros, zeros, zeros, zeros, zeros, zeros
    # Kept in registers where there are enough, so that only the rows' own loads are left to be pipelined.
    h, s, b, a, w = None, None, None, None, None
    if KEEP:
        h, s, w = read(offset + channel, valid), read(scale + channel, valid), read(weight + channel, valid)
        b, a = read(before + channel, valid), read(after + channel, valid)
    first, step = tl.program_id(0).to(tl.int64) * ROWS, tl.num_programs(0).to(tl.int64) * ROWS
    for start in tl.range(first, rows, step, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[None, :, None]
        at, inside = row * hidden + channel, valid & (row < rows)
        dy = read(grad + at, inside)
        current, above, below = _three(x, has_left_neighbour, row, rows, hidden, channel, valid)
        u = current + elements(h, offset, channel, valid) + elements(s, scale, channel, valid) * current
        u += elements(b, before, channel, valid) * above + elements(a, after, channel, valid) * below
        xhat, rstd = normalise(u, eps, hidden, valid, row < rows)
        if WEIGHT & REQUESTED:
            dweight += dy * xhat
        if NORM_BIAS & REQUESTED:
            dnorm_bias += dy
        d = through(dy, elements(w, weight, channel, valid), xhat, rstd, hidden)
        if OFFSET & REQUESTED:
            doffset += d
        if SCALE & REQUESTED:
            dscale += d * current
        if BEFORE & REQUESTED:
            dbefore += d * above
        if AFTER & REQUESTED:
            dafter += d * below
        if du is not None:
            tl.store(du + at, d, mask=inside)
    if sums is not None:
        to = sums + tl.program_id(0).to(tl.int64) * COUNT * hidden
        to = write_requested(to, doffset, hidden, OFFSET & REQUESTED, CHUNKS, WIDTH)
        to = write_requested(to, dscale, hidden, SCALE & REQUESTED, CHUNKS, WIDTH)
        to = write_requested(to, dbefore, hidden, BEFORE & REQUESTED, CHUNKS, WIDTH)
        to = write_requested(to, dafter, hidden, AFTER & REQUESTED, CHUNKS, WIDTH)
        to = write_requested(to, dweight, hidden, WEIGHT & REQUESTED, CHUNKS, WIDTH)
        to = write_requested(to, dnorm_bias, hidden, NORM_BIAS & REQUESTED, CHUNKS, WIDTH)


@triton.jit(do_not_specialize=["rows", "hidden"])
def dx_kernel(
    du,  # (rows, hidden) float32
    has_left_neighbour,  # (rows,) bool
    scale,  # (hidden,), as all vectors
    before,
    after,
    dx,  # (rows, hidden)
    rows: tl.int64,
    hidden: tl.int32,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    hidden = hidden // VECTOR * VECTOR
    channel, valid = channels(hidden, ROWS, CHUNKS, WIDTH)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    current, above, below = _three(du, has_left_neighbour, row, rows, hidden, channel, valid)
    out = current + read(scale + channel, valid) * current
    out += read(before + channel, valid) * below + read(after + channel, valid) * above
    tl.store(dx + row * hidden + channel, out.to(dx.dtype.element_ty), mask=valid & (row < rows))


FORWARD, BACKWARD, ALONG_X = Kernel(forward_kernel), Kernel(backward_kernel), Kernel(dx_kernel)


def forward(
    x: Tensor,
    has_left_neighbour: Tensor,
    offset: Tensor,
    scale: Tensor,
    before: Tensor,
    after: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """y (rows, H), contiguous, in the dtype of x; operands as in fastgate.ops."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    operands = (x, has_left_neighbour, offset, scale, before, after, weight, norm_bias)
    tensors = tuple([contiguous(tensor) for tensor in operands])
    rows, hidden = x.shape
    tile = forward_tile(hidden, x.itemsize, rows)
    FORWARD.launch(
        (-(-rows // tile.rows), 1, 1),
        (tile, aligned(*tensors, y), dtypes(*tensors)),
        (*tensors, y, rows, hidden, eps, *tile[:4]),
        tile.num_warps,
    )
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    has_left_neighbour: Tensor,
    offset: Tensor,
    scale: Tensor,
    before: Tensor,
    after: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    requested: int,
) -> tuple[Tensor, Tensor]:
    """(dx, parameters' gradients): those that the bits of `requested` ask for, the others empty.

    grad: (rows, H), of y. The parameters' gradients are stacked in the order of PARAMETERS in
    fastgate/ops/shift_norm.py: (number requested, H) float32.
    """
    rows, hidden = x.shape
    count = (requested & PARAMETER_BITS).bit_count()
    dx = torch.empty(x.shape if requested & DX else (0,), dtype=x.dtype, device=x.device)
    stacked = torch.empty((count, hidden), dtype=torch.float32, device=x.device)
    if not x.numel():
        return dx, stacked.zero_()
    operands = (grad, x, has_left_neighbour, offset, scale, before, after, weight)
    tensors = tuple([contiguous(tensor) for tensor in operands])
    tile = backward_tile(hidden, min(grad.itemsize, x.itemsize))
    programs = resident_programs(rows, tile, x.device)
    sums = None
    if count:
        sums = stacked if programs == 1 else torch.empty((programs, *stacked.shape), device=x.device)
    du = torch.empty(x.shape, dtype=torch.float32, device=x.device) if requested & DX else None
    keep = keeps_vectors(hidden)
    BACKWARD.launch(
        (programs, 1, 1),
        (tile, requested, aligned(*tensors, du, sums), dtypes(*tensors)),
        (*tensors, du, sums, rows, hidden, eps, keep, STAGES if keep else 1, requested, count, *tile[:4]),
        tile.num_warps,
    )
    if sums is not None and programs > 1:
        add_up(sums, stacked)
    if du is not None:
        along = (du, *tensors[2:3], *tensors[4:7], dx)
        tile = forward_tile(hidden, x.itemsize, rows)
        ALONG_X.launch(
            (-(-rows // tile.rows), 1, 1),
            (tile, aligned(*along), dtypes(*along)),
            (*along, rows, hidden, *tile[:4]),
            tile.num_warps,
        )
    return dx, stacked
