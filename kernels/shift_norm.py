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
    write_sums,
)
from fastgate.kernels.sums import add_up

# Bits of backward's `wanted`.
DX = 1
SHIFT = tl.constexpr(2)
SCALE = tl.constexpr(4)
BEFORE = tl.constexpr(8)
AFTER = tl.constexpr(16)
WEIGHT = tl.constexpr(32)
NORM_BIAS = tl.constexpr(64)


@triton.jit
def _three(
    x,  # (rows, hidden)
    linked,  # (rows,) bool
    row,  # (1, ROWS, 1) int64
    rows,
    hidden,
    channel,  # (CHUNKS, ROWS, WIDTH) int32
    there,  # (CHUNKS, ROWS, WIDTH) bool
):
    """A tile's rows of x and those above and below, zeros where none is linked: (CHUNKS, ROWS, WIDTH)."""
    at = row * hidden + channel
    above = tl.load(linked + row, mask=(row > 0) & (row < rows), other=0) != 0
    below = tl.load(linked + row + 1, mask=row + 1 < rows, other=0) != 0
    return (
        read(x + at, there & (row < rows)),
        read(x + at - hidden, there & above),
        read(x + at + hidden, there & below),
    )


@triton.jit(do_not_specialize=["rows", "hidden"])
def forward_kernel(
    x,  # (rows, hidden)
    linked,  # (rows,) bool
    shift,  # (hidden,), as all vectors
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
    channel, there = channels(hidden, ROWS, CHUNKS, WIDTH)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    mine, above, below = _three(x, linked, row, rows, hidden, channel, there)
    u = mine + read(shift + channel, there) + read(scale + channel, there) * mine
    u += read(before + channel, there) * above + read(after + channel, there) * below
    xhat, _ = normalise(u, eps, hidden, there, row < rows)
    out = xhat * read(weight + channel, there) + read(norm_bias + channel, there)
    tl.store(y + row * hidden + channel, out.to(y.dtype.element_ty), mask=there & (row < rows))


@triton.jit(do_not_specialize=["rows", "hidden"])
def backward_kernel(
    grad,  # (rows, hidden)
    x,  # (rows, hidden)
    linked,  # (rows,) bool
    shift,  # (hidden,), as all vectors
    scale,
    before,
    after,
    weight,
    du,  # (rows, hidden) float32; None where dx is not wanted
    sums,  # (programs, parameters wanted, hidden) float32; None where none is
    rows: tl.int64,
    hidden: tl.int32,
    eps: tl.float32,
    KEEP: tl.constexpr,
    STAGES: tl.constexpr,
    WANTED: tl.constexpr,
    COUNT: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    hidden = hidden // VECTOR * VECTOR  # which tells the compiler how far rows are aligned
    channel, there = channels(hidden, ROWS, CHUNKS, WIDTH)
    zeros = tl.zeros((CHUNKS, ROWS, WIDTH), tl.float32)
    dshift, dscale, dbefore, dafter, dweight, dnorm_bias = zeros, zeros, zeros, zeros, zeros, zeros
    # Kept in registers where there are enough, so that only the rows' own loads are left to be pipelined.
    h, s, b, a, w = None, None, None, None, None
    if KEEP:
        h, s, w = read(shift + channel, there), read(scale + channel, there), read(weight + channel, there)
        b, a = read(before + channel, there), read(after + channel, there)
    first, step = tl.program_id(0).to(tl.int64) * ROWS, tl.num_programs(0).to(tl.int64) * ROWS
    for start in tl.range(first, rows, step, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[None, :, None]
        at, inside = row * hidden + channel, there & (row < rows)
        dy = read(grad + at, inside)
        mine, above, below = _three(x, linked, row, rows, hidden, channel, there)
        u = mine + elements(h, shift, channel, there) + elements(s, scale, channel, there) * mine
        u += elements(b, before, channel, there) * above + elements(a, after, channel, there) * below
        xhat, rstd = normalise(u, eps, hidden, there, row < rows)
        if WEIGHT & WANTED:
            dweight += dy * xhat
        if NORM_BIAS & WANTED:
            dnorm_bias += dy
        d = through(dy, elements(w, weight, channel, there), xhat, rstd, hidden)
        if SHIFT & WANTED:
            dshift += d
        if SCALE & WANTED:
            dscale += d * mine
        if BEFORE & WANTED:
            dbefore += d * above
        if AFTER & WANTED:
            dafter += d * below
        if du is not None:
            tl.store(du + at, d, mask=inside)
    if sums is not None:
        to = sums + tl.program_id(0).to(tl.int64) * COUNT * hidden
        if SHIFT & WANTED:
            write_sums(to, dshift, hidden, CHUNKS, WIDTH)
            to += hidden
        if SCALE & WANTED:
            write_sums(to, dscale, hidden, CHUNKS, WIDTH)
            to += hidden
        if BEFORE & WANTED:
            write_sums(to, dbefore, hidden, CHUNKS, WIDTH)
            to += hidden
        if AFTER & WANTED:
            write_sums(to, dafter, hidden, CHUNKS, WIDTH)
            to += hidden
        if WEIGHT & WANTED:
            write_sums(to, dweight, hidden, CHUNKS, WIDTH)
            to += hidden
        if NORM_BIAS & WANTED:
            write_sums(to, dnorm_bias, hidden, CHUNKS, WIDTH)


@triton.jit(do_not_specialize=["rows", "hidden"])
def dx_kernel(
    du,  # (rows, hidden) float32
    linked,  # (rows,) bool
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
    channel, there = channels(hidden, ROWS, CHUNKS, WIDTH)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    mine, above, below = _three(du, linked, row, rows, hidden, channel, there)
    out = mine + read(scale + channel, there) * mine
    out += read(before + channel, there) * below + read(after + channel, there) * above
    tl.store(dx + row * hidden + channel, out.to(dx.dtype.element_ty), mask=there & (row < rows))


FORWARD, BACKWARD, ALONG_X = Kernel(forward_kernel), Kernel(backward_kernel), Kernel(dx_kernel)


def forward(
    x: Tensor,
    linked: Tensor,
    shift: Tensor,
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
    given = (x, linked, shift, scale, before, after, weight, norm_bias)
    tensors = tuple([contiguous(tensor) for tensor in given])
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
    linked: Tensor,
    shift: Tensor,
    scale: Tensor,
    before: Tensor,
    after: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    wanted: int,
) -> tuple[Tensor, Tensor]:
    """(dx, parameters' gradients): those that the bits of `wanted` ask for, the others empty.

    grad: (rows, H), of y. The parameters' gradients are stacked in the order of fastgate.ops.PARAMETERS:
    (number wanted, H) float32.
    """
    rows, hidden = x.shape
    count = (wanted >> 1).bit_count()
    dx = torch.empty(x.shape if wanted & DX else (0,), dtype=x.dtype, device=x.device)
    stacked = torch.empty((count, hidden), dtype=torch.float32, device=x.device)
    if not x.numel():
        return dx, stacked.zero_()
    given = (grad, x, linked, shift, scale, before, after, weight)
    tensors = tuple([contiguous(tensor) for tensor in given])
    tile = backward_tile(hidden, min(grad.itemsize, x.itemsize))
    programs = resident_programs(rows, tile, x.device)
    sums = None
    if count:
        sums = stacked if programs == 1 else torch.empty((programs, *stacked.shape), device=x.device)
    du = torch.empty(x.shape, dtype=torch.float32, device=x.device) if wanted & DX else None
    keep = keeps_vectors(hidden)
    BACKWARD.launch(
        (programs, 1, 1),
        (tile, wanted, aligned(*tensors, du, sums), dtypes(*tensors)),
        (*tensors, du, sums, rows, hidden, eps, keep, STAGES if keep else 1, wanted, count, *tile[:4]),
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
