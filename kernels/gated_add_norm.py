"""gated_add_norm in Triton, forward and backward, in fastgate/reference.py's symbols.

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
with u = scale * residual + gate * d + shift and d = m * kept * (x + bias):

    dresidual = scale * du      dscale = sum_i du * residual      dshift = sum_i du
    dx = gate * m * kept * du   dbias = sum_i dx                  dgate = sum_ij du * d

Sums over rows: each program of a fixed grid walks its tiles and keeps float32 sums a channel in registers,
then writes one row of them; a second kernel adds these rows in a fixed order. No atomics: the bits repeat.

A tile is (CHUNKS, ROWS, WIDTH): channel = chunk * WIDTH + place. WIDTH is what the warps of one row read at
once with 16 bytes a thread. Triton gives warps to the last dimension first, then to ROWS, so that a row's
chunks lie in the registers of the same threads: a row of one warp is reduced by shuffles, without a barrier.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgate.errors import ArgumentError, say
from fastgate.kernels.dropout import kept, threshold_argument
from fastgate.kernels.launch import Kernel, aligned, multiprocessors
from fastgate.kernels.sums import add_up

LANES = 32
# Up to so many rows, rows are few: more threads each, so that the multiprocessors are not left idle.
FEW_ROWS = 2048
# Of backward's grid: programs a multiprocessor, and rows that a program's row of sums must pay for.
PROGRAMS, LEAST_ROWS = 2, 8
# Tiles of rows that a program of backward has under way: one worked on, the others being read.
STAGES = 3
# In wider rows the registers do not hold the vectors beside the rows and the sums over rows: backward reads
# vectors where it needs them, rows without a lead, and may spill.
WIDEST_KEPT = 2048
# Bits of backward's `wanted`.
DX, DRESIDUAL = 1, 2
BIAS = tl.constexpr(4)
GATE = tl.constexpr(8)
SCALE = tl.constexpr(16)
SHIFT = tl.constexpr(32)
WEIGHT = tl.constexpr(64)
NORM_BIAS = tl.constexpr(128)
WEIGHT2 = tl.constexpr(256)
NORM_BIAS2 = tl.constexpr(512)


class Tile(NamedTuple):
    """What a program works on at a time, and with how many warps."""

    chunks: int
    rows: int
    width: int
    vector: int  # channels a thread reads at once: a power of two that divides hidden
    num_warps: int


@triton.jit
def _channels(hidden, ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """(channel, whether there is one): (CHUNKS, ROWS, WIDTH), alike for all rows.

    Vectors are read at the tile's full shape, so that a thread gets the channels of its rows from the
    first-level cache, in the tile's layout: a smaller shape would be laid out anew through shared memory.
    """
    chunk = tl.arange(0, CHUNKS)[:, None, None] * WIDTH
    channel = tl.broadcast_to(chunk + tl.arange(0, WIDTH)[None, None, :], (CHUNKS, ROWS, WIDTH))
    return channel, channel < hidden


@triton.jit
def _row_sum(t):
    """(CHUNKS, ROWS, WIDTH) -> (1, ROWS, 1)"""
    return tl.sum(tl.sum(t, axis=0, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def _load(at, mask):
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normalise(u, eps, hidden, there, row_there):
    """xhat (CHUNKS, ROWS, WIDTH), zero where no channel or row is, and rstd (1, ROWS, 1).

    u is zero where no channel is. Past the last row rstd is zero: with eps 0 it would be infinite there.
    """
    mean = _row_sum(u) / hidden
    centred = tl.where(there, u - mean, 0.0)
    rstd = tl.where(row_there, tl.rsqrt(_row_sum(centred * centred) / hidden + eps), 0.0)
    return centred * rstd, rstd


@triton.jit
def _elements(values, vector, channel, there):
    """A vector's elements: the values read before, or, where they are None, read now."""
    if values is not None:
        return values
    else:
        return _load(vector + channel, there)


@triton.jit
def _mix(
    x,  # (CHUNKS, ROWS, WIDTH) float32
    residual,  # (CHUNKS, ROWS, WIDTH) float32
    bias,  # (hidden,); None where not given, as all below to key
    scale,  # (hidden,)
    shift,  # (hidden,)
    gate,  # a number
    key,  # a number, int64; None: nothing is dropped
    b,  # the elements of bias, (CHUNKS, ROWS, WIDTH) float32; None where they are still to be read
    s,  # of scale
    h,  # of shift
    row,  # (1, ROWS, 1) int64
    channel,  # (CHUNKS, ROWS, WIDTH) int32
    there,  # (CHUNKS, ROWS, WIDTH) bool
    threshold,
    kept_scale,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """u, and what backward needs besides: d, and which of its elements dropout keeps."""
    u = residual
    if scale is not None:
        u = u * _elements(s, scale, channel, there)
    d = x
    if bias is not None:
        d += _elements(b, bias, channel, there)
    mask = there
    if key is not None:
        group = tl.arange(0, CHUNKS)[:, None, None] * (WIDTH // 4) + tl.arange(0, WIDTH // 4)[None, None, :]
        mask = kept(key, row, group, threshold, (CHUNKS, ROWS, WIDTH))
        d = tl.where(mask, d * kept_scale, 0.0)
    if gate is not None:
        u += d * gate
    else:
        u += d
    if shift is not None:
        u += _elements(h, shift, channel, there)
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
    shift,
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
    channel, there = _channels(hidden, ROWS, CHUNKS, WIDTH)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    at, inside = row * hidden + channel, there & (row < rows)
    z, key = None, None
    if gate is not None:
        z = tl.load(gate).to(tl.float32)
    if seed is not None:
        key = tl.load(seed)
    u, _, _ = _mix(
        _load(x + at, inside), _load(residual + at, inside), bias, scale, shift, z, key, None, None, None,
        row, channel, there, threshold, kept_scale, CHUNKS, ROWS, WIDTH,
    )  # fmt: skip
    xhat, _ = _normalise(u, eps, hidden, there, row < rows)
    out = xhat * _load(weight + channel, there) + _load(norm_bias + channel, there)
    if weight2 is not None:
        xhat, _ = _normalise(out, eps2, hidden, there, row < rows)
        out = xhat * _load(weight2 + channel, there) + _load(norm_bias2 + channel, there)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _through(dy, weight, xhat, rstd, hidden):
    """The gradient of a norm's input."""
    t = dy * weight
    return rstd * (t - _row_sum(t) / hidden - xhat * (_row_sum(t * xhat) / hidden))


@triton.jit
def _write_sums(to, total, hidden, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """One row of sums over a program's rows: to (hidden,), total (CHUNKS, ROWS, WIDTH)."""
    channel = tl.arange(0, CHUNKS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(to + channel, tl.sum(total, axis=1), mask=channel < hidden)


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
    shift,
    seed,  # () int64
    weight2,
    dx,  # (rows, hidden); None where not wanted
    dresidual,  # (rows, hidden); None where not wanted
    sums,  # (programs, parameters wanted, hidden) float32; None where none is
    rows: tl.int64,
    hidden: tl.int32,
    eps: tl.float32,
    eps2: tl.float32,
    threshold: tl.int32,
    kept_scale: tl.float32,
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
    channel, there = _channels(hidden, ROWS, CHUNKS, WIDTH)
    zeros = tl.zeros((CHUNKS, ROWS, WIDTH), tl.float32)
    dbias, dgate, dscale, dshift = zeros, zeros, zeros, zeros
    dweight, dnorm_bias, dweight2, dnorm_bias2 = zeros, zeros, zeros, zeros
    # Kept in registers where there are enough, so that only the rows' own loads are left to be pipelined.
    w, w2, n, b, s, h, z, key = None, None, None, None, None, None, None, None
    if gate is not None:
        z = tl.load(gate).to(tl.float32)
    if seed is not None:
        key = tl.load(seed)
    if KEEP:
        w = _load(weight + channel, there)
        if weight2 is not None:
            w2, n = _load(weight2 + channel, there), _load(norm_bias + channel, there)
        if bias is not None:
            b = _load(bias + channel, there)
        if scale is not None:
            s = _load(scale + channel, there)
        if shift is not None:
            h = _load(shift + channel, there)
    first, step = tl.program_id(0).to(tl.int64) * ROWS, tl.num_programs(0).to(tl.int64) * ROWS
    for start in tl.range(first, rows, step, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[None, :, None]
        row_there = row < rows
        at, inside = row * hidden + channel, there & row_there
        dy = _load(grad + at, inside)
        r = _load(residual + at, inside)
        u, d, mask = _mix(
            _load(x + at, inside), r, bias, scale, shift, z, key, b, s, h, row, channel, there, threshold,
            kept_scale, CHUNKS, ROWS, WIDTH,
        )  # fmt: skip
        xhat, rstd = _normalise(u, eps, hidden, there, row_there)
        if weight2 is not None:
            v = xhat * _elements(w, weight, channel, there) + _elements(n, norm_bias, channel, there)
            xhat2, rstd2 = _normalise(v, eps2, hidden, there, row_there)
            if WEIGHT2 & WANTED:
                dweight2 += dy * xhat2
            if NORM_BIAS2 & WANTED:
                dnorm_bias2 += dy
            dy = _through(dy, _elements(w2, weight2, channel, there), xhat2, rstd2, hidden)
        if WEIGHT & WANTED:
            dweight += dy * xhat
        if NORM_BIAS & WANTED:
            dnorm_bias += dy
        du = _through(dy, _elements(w, weight, channel, there), xhat, rstd, hidden)
        if SHIFT & WANTED:
            dshift += du
        if SCALE & WANTED:
            dscale += du * r
        if GATE & WANTED:
            dgate += du * d
        if dresidual is not None:
            dr = du
            if scale is not None:
                dr = du * _elements(s, scale, channel, there)
            tl.store(dresidual + at, dr.to(dresidual.dtype.element_ty), mask=inside)
        along_x = du
        if gate is not None:
            along_x = along_x * z
        if seed is not None:
            along_x = tl.where(mask, along_x * kept_scale, 0.0)
        if BIAS & WANTED:
            dbias += along_x
        if dx is not None:
            tl.store(dx + at, along_x.to(dx.dtype.element_ty), mask=inside)
    if sums is not None:
        to = sums + tl.program_id(0).to(tl.int64) * COUNT * hidden
        if BIAS & WANTED:
            _write_sums(to, dbias, hidden, CHUNKS, WIDTH)
            to += hidden
        if GATE & WANTED:
            _write_sums(to, dgate, hidden, CHUNKS, WIDTH)
            to += hidden
        if SCALE & WANTED:
            _write_sums(to, dscale, hidden, CHUNKS, WIDTH)
            to += hidden
        if SHIFT & WANTED:
            _write_sums(to, dshift, hidden, CHUNKS, WIDTH)
            to += hidden
        if WEIGHT & WANTED:
            _write_sums(to, dweight, hidden, CHUNKS, WIDTH)
            to += hidden
        if NORM_BIAS & WANTED:
            _write_sums(to, dnorm_bias, hidden, CHUNKS, WIDTH)
            to += hidden
        if WEIGHT2 & WANTED:
            _write_sums(to, dweight2, hidden, CHUNKS, WIDTH)
            to += hidden
        if NORM_BIAS2 & WANTED:
            _write_sums(to, dnorm_bias2, hidden, CHUNKS, WIDTH)


FORWARD, BACKWARD = Kernel(forward_kernel), Kernel(backward_kernel)


@functools.lru_cache(4096)
def _tile(hidden: int, item_bytes: int, elements: int, least_warps: int) -> Tile:
    """The tile of rows of `hidden` channels. item_bytes: of the smallest dtype; elements: a thread's."""
    block = max(16, triton.next_power_of_2(hidden))
    vector = 16 // item_bytes
    while hidden % vector:
        vector //= 2
    row_warps = min(max(1, block // (LANES * elements)), 32)
    width = min(block, vector * LANES * row_warps)
    num_warps = max(least_warps, row_warps)
    row_elements = (
        LANES * elements * row_warps
    )  # a row's, or what the threads of one warp hold of several rows
    return Tile(
        block // width, max(1, row_elements // block) * (num_warps // row_warps), width, vector, num_warps
    )


def _forward_tile(hidden: int, item_bytes: int, rows: int) -> Tile:
    few = rows <= FEW_ROWS
    return _tile(hidden, item_bytes, 8 if few else 32, 1 if few else 4)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _drop(dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """(seed, threshold, scale of what is kept) as the kernels take them."""
    if dropout_p == 0.0:
        return None, 0, 1.0
    if seed is None:
        raise ArgumentError(
            say("gated_add_norm", "seed", None, "an int64 tensor with dropout_p > 0", "pass a seed")
        )
    return seed, threshold_argument(dropout_p), 1.0 / (1.0 - dropout_p)


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple([None if tensor is None else tensor.dtype for tensor in tensors])


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    bias: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
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
    seed, threshold, kept_scale = _drop(dropout_p, seed)
    vectors = (weight, norm_bias, bias, gate, scale, shift, seed, weight2, norm_bias2)
    tensors = tuple([_dense(tensor) for tensor in (x, residual, *vectors)])
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    tile = _forward_tile(hidden, min(x.itemsize, residual.itemsize), rows)
    FORWARD.launch(
        (-(-rows // tile.rows), 1, 1),
        (tile, aligned(*tensors, y), _dtypes(*tensors)),
        (*tensors, y, rows, hidden, eps, eps2, threshold, kept_scale, *tile[:4]),
        tile.num_warps,
    )
    return y


def _backward_tile(hidden: int, item_bytes: int) -> Tile:
    return _tile(hidden, item_bytes, 8 if hidden <= 2 * WIDEST_KEPT else 16, 8)


def _programs(rows: int, tile: Tile, device: torch.device) -> int:
    """Of backward's grid: as many as are resident, fewer for few rows, counted by powers of two."""
    bucket = triton.next_power_of_2(rows)
    return min(PROGRAMS * multiprocessors(device), max(1, bucket // max(LEAST_ROWS, tile.rows)))


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
    shift: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    weight2: Tensor | None,
    norm_bias2: Tensor | None,
    eps2: float,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dresidual, parameters' gradients): those that the bits of `wanted` ask for, the others empty.

    grad: (..., H), of y. The parameters' gradients are stacked in the order of fastgate.ops.PARAMETERS:
    (number wanted, H) float32; the gate's row sums to its gradient.
    """
    hidden = x.shape[-1]
    count = (wanted >> 2).bit_count()
    dx = torch.empty(x.shape if wanted & DX else (0,), dtype=x.dtype, device=x.device)
    dresidual = torch.empty(
        residual.shape if wanted & DRESIDUAL else (0,), dtype=residual.dtype, device=x.device
    )
    stacked = torch.empty((count, hidden), dtype=torch.float32, device=x.device)
    if not x.numel():
        return dx, dresidual, stacked.zero_()
    seed, threshold, kept_scale = _drop(dropout_p, seed)
    first_bias = norm_bias if weight2 is not None else None
    vectors = (weight, first_bias, bias, gate, scale, shift, seed, weight2)
    tensors = tuple([_dense(tensor) for tensor in (grad, x, residual, *vectors)])
    rows = x.numel() // hidden
    tile = _backward_tile(hidden, min(grad.itemsize, x.itemsize, residual.itemsize))
    programs = _programs(rows, tile, x.device)
    sums = None
    if count:
        sums = stacked if programs == 1 else torch.empty((programs, *stacked.shape), device=x.device)
    outputs = (dx if wanted & DX else None, dresidual if wanted & DRESIDUAL else None, sums)
    numbers = (rows, hidden, eps, eps2, threshold, kept_scale)
    keep = hidden <= WIDEST_KEPT
    BACKWARD.launch(
        (programs, 1, 1),
        (tile, wanted, aligned(*tensors, *outputs), _dtypes(*tensors)),
        (*tensors, *outputs, *numbers, keep, STAGES if keep else 1, wanted, count, *tile[:4]),
        tile.num_warps,
    )
    if sums is not None and programs > 1:
        add_up(sums, stacked)
    return dx, dresidual, stacked
