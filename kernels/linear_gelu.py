"""linear_gelu in Triton: y = gelu(x W^T + b) with the exact (erf) GELU, forward and backward, in two forms.

With rows i, inputs k and outputs j, Phi and phi the standard normal distribution and density:

    v_ij = sum_k x_ik W_jk + b_j                          y = v Phi(v)
    dv = dy gelu'(v)        gelu'(v) = Phi(v) + v phi(v)  by the product rule, for Phi' = phi
    dx = dv W,  dW = dv^T x                               since v is linear in x and in W
    db = sum_i dv_i

The GELU. By symmetry Phi(v) = 1 - Phi(-v), so with a = |v| and the tail T(a) = Phi(-a) = erfc(a / sqrt 2) / 2

    y = max(v, 0) - a T(a)          gelu'(v) = g for v < 0, 1 - g for v >= 0, with g = T(a) - a phi(a)

and one function of a >= 0 is left. log2 T is nearly a parabola: a polynomial of degree 9, exact at a = 0 and
fitted on [0, 6] to the least largest error of a T(a), is off by 3e-9. In float32, a T(a) errs by 4e-8, where
0.5 v (1 + erf(v / sqrt 2)) errs by 8e-8 for v < 0; beyond 6, T is below 1e-9 and stays what it is at 6. That
takes 14 instructions an element (SASS, sm_90: 9 fused multiply-adds, one exp2); with libdevice's erf, which
picks one of two polynomials, it takes 32, and at 4 bytes an element and 4.3 TB/s an H200 has time for 27.

Two forms of the forward:
- fused: a persistent product with bias and GELU in its epilogue. Nothing of (rows, N) is read.
- cublas: cuBLAS makes v, its epilogue adds the bias, one elementwise kernel reads v and makes y. Not a
  product without bias and a kernel that adds it: x W^T would be rounded first, which errs more than torch
  where it and b cancel, and v, which backward wants, would be written a second time.
`is_fused` picks one; in float32 cuBLAS, since only torch knows whether TF32 tensor cores may be used.

What is kept for backward: x and W, which autograd holds anyway, and v in the operands' dtype, 2 bytes per
element of (rows, N) in bf16: written by forward (in the cublas form it is anyway), read by backward.
Without v (v None in `backward`) the product is made again: 2 K FLOPs an element, a third more products than
forward and backward have (6 K), while v is written and read all the same. At K = 768 on an H200, 1536 FLOPs
at 770 TFLOP/s are 2.0 ps an element of about 8 in all. So keeping is predicted to be the faster by a
quarter, and making v again to save 2 bytes an element of memory. To be confirmed on a GPU.

Backward is one kernel that reads dy and v and writes dv, with db as float32 sums over the rows that each
program walks (added up by fastgate/kernels/sums.py: no atomics, the bits repeat), then two cuBLAS products.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastgate.kernels.launch import Kernel, aligned, multiprocessors
from fastgate.kernels.sums import add_up
from fastgate.ops.linear_gelu import DBIAS, DWEIGHT, DX

# The fused form up to so many rows, where a launch counts, and up to so many inputs, where a product is short
# beside its output; see docs/predictions.md. Predicted, not measured.
FUSED_ROWS, FUSED_DEPTH = 2048, 512
# The device for which tiles are chosen: an H200's.
MULTIPROCESSORS = 132
# Compute capabilities whose programs may have the widest tile's shared memory: 128 KiB on 8.0, 176 on 9.0.
ROOMY = ((8, 0), (9, 0), (10, 0), (10, 3))
# Tiles of rows that run one after the other before the next columns: x and W come from the L2 again.
GROUP = 8


class Tile(NamedTuple):
    """What a program of the product works on at a time."""

    rows: int
    columns: int
    depth: int  # of one step of the sum over inputs
    num_warps: int
    num_stages: int  # steps under way: one multiplied, the others being read
    resident: int  # programs a multiprocessor holds
    rate: float  # of the multiprocessor, for choosing: the widest tile's is 1


# 128 x 256 reads the fewest bytes a FLOP; two programs of 128 x 128 take turns at products and epilogue.
TILES = (
    Tile(128, 256, 64, 8, 3, 1, 1.0),
    Tile(128, 128, 32, 4, 5, 2, 0.95),
    Tile(64, 128, 64, 4, 3, 2, 0.7),
    Tile(64, 64, 64, 4, 3, 3, 0.5),
    Tile(32, 32, 128, 4, 3, 4, 0.17),
)
# Of rows that are not read 16 bytes at a time: narrower reads go through registers.
NARROW_TILE = TILES[3]
FLOAT32_TILE = Tile(64, 64, 16, 8, 3, 2, 1.0)
# Of the elementwise kernels: columns a program, rows at a time, rows under way, warps.
WIDTH, ROWS, STAGES, WARPS = 256, 16, 3, 8
# Of backward's grid: programs a multiprocessor, and rows that a program's row of sums must pay for.
PROGRAMS, LEAST_ROWS = 4, 64


@triton.jit
def _tail(a):
    """T(a), the normal distribution's mass beyond a, for 0 <= a <= 6: 2 to a polynomial."""
    log = a * 4.0222445818471897e-07 - 8.012353646336123e-06
    log = log * a + 6.617878534598276e-05
    log = log * a - 2.58137471973896e-04
    log = log * a - 2.9137810997781344e-05
    log = log * a + 6.9731841795146465e-03
    log = log * a - 5.245622619986534e-02
    log = log * a - 4.592163562774658e-01
    log = log * a - 1.1511046886444092
    return tl.exp2(log * a - 1.0)


@triton.jit
def _gelu(v):
    a = tl.minimum(tl.abs(v), 6.0)
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * _tail(a)


@triton.jit
def _gelu_slope(v):
    a = tl.minimum(tl.abs(v), 6.0)
    density = tl.exp2(v * v * -0.72134752044448170) * 0.39894228040143268
    slope = _tail(a) - a * density
    return tl.where(v < 0.0, slope, 1.0 - slope)


@triton.jit
def _finish(
    product,  # (ROWS, COLUMNS) float32
    bias,  # (width,); None where not given
    y,  # (rows, width)
    v,  # (rows, width); None where not kept
    row,  # (ROWS,)
    column,  # (COLUMNS,)
    rows,
    width,
):
    """The epilogue of a tile: the bias, v, y."""
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    inside = (row < rows)[:, None] & (column < width)[None, :]
    if bias is not None:
        product += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if v is not None:
        tl.store(v + at, product.to(v.dtype.element_ty), mask=inside)
    tl.store(y + at, _gelu(product).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "width", "depth", "stride"])
def product_kernel(
    x,  # (rows, depth), row stride `stride`
    weight,  # (width, depth)
    bias,  # (width,); None where not given
    y,  # (rows, width)
    v,  # (rows, width), in x's dtype; None where not kept
    rows: tl.int32,
    width: tl.int32,
    depth: tl.int32,
    stride: tl.int64,
    READ: tl.constexpr,
    WRITTEN: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y and v. Each program takes every num_programs-th tile; the loops are flattened into one, so that the
    next tile is read while this one is finished. The epilogue goes by halves, which spares it registers.

    READ, WRITTEN: elements that rows of x and weight, of y and v are aligned to. EVEN: DEPTH divides depth.
    Rows and columns past the last read the last one again, and are not written.
    """
    depth, stride = depth // READ * READ, stride // READ * READ
    width = width // WRITTEN * WRITTEN
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(width, COLUMNS)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        group, place = tile // (GROUP * across), tile % (GROUP * across)
        height = tl.minimum(down - group * GROUP, GROUP)
        row = (group * GROUP + place % height) * ROWS + tl.arange(0, ROWS)
        first = place // height * COLUMNS
        column = first + tl.arange(0, COLUMNS)
        x_row = x + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * stride
        weight_row = weight + tl.minimum(column, width - 1).to(tl.int64)[:, None] * depth
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in tl.range(0, depth, DEPTH, num_stages=STAGES):
            k = start + tl.arange(0, DEPTH)[None, :]
            if EVEN:
                a, b = tl.load(x_row + k), tl.load(weight_row + k)
            else:
                a = tl.load(x_row + k, mask=k < depth, other=0.0)
                b = tl.load(weight_row + k, mask=k < depth, other=0.0)
            # "ieee": tf32, the default for float32, has an error a thousand times torch's.
            product = tl.dot(a, tl.trans(b), product, input_precision="ieee")
        left, right = product.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        half = first + tl.arange(0, COLUMNS // 2)
        _finish(left, bias, y, v, row, half, rows, width)
        _finish(right, bias, y, v, row, half + COLUMNS // 2, rows, width)


@triton.jit(do_not_specialize=["rows", "width"])
def gelu_kernel(
    v,  # (rows, width)
    y,  # (rows, width); may be v
    rows: tl.int64,
    width: tl.int32,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y = gelu(v), one tile a program."""
    width = width // VECTOR * VECTOR
    across = tl.cdiv(width, WIDTH)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)[None, :]
    at, inside = row * width + column, (row < rows) & (column < width)
    element = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, _gelu(element).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "width"])
def backward_kernel(
    grad,  # (rows, width), of y
    v,  # (rows, width)
    dv,  # (rows, width)
    sums,  # (programs down, width) float32; None where db is not requested
    rows: tl.int64,
    width: tl.int32,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dv, and its sums over the rows that each program walks. Grid: (programs across, programs down)."""
    width = width // VECTOR * VECTOR
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)[None, :]
    valid = column < width
    db = tl.zeros((ROWS, WIDTH), tl.float32)
    first, step = tl.program_id(1).to(tl.int64) * ROWS, tl.num_programs(1).to(tl.int64) * ROWS
    for start in tl.range(first, rows, step, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None]
        at, inside = row * width + column, valid & (row < rows)
        dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        along = dy * _gelu_slope(tl.load(v + at, mask=inside, other=0.0).to(tl.float32))
        db += along
        tl.store(dv + at, along.to(dv.dtype.element_ty), mask=inside)
    if sums is not None:
        to = sums + tl.program_id(1).to(tl.int64) * width + column
        tl.store(to, tl.sum(db, axis=0, keep_dims=True), mask=valid)


PRODUCT, GELU, BACKWARD = Kernel(product_kernel), Kernel(gelu_kernel), Kernel(backward_kernel)


@functools.lru_cache(4096)
def tile_for(rows: int, width: int, dtype: torch.dtype, roomy: bool, wide: bool) -> Tile:
    """The tile whose passes over the multiprocessors take least.

    roomy: the widest one's memory is there; wide: rows of x and weight are read 16 bytes at a time."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    if not wide:
        return NARROW_TILE

    def time(tile: Tile) -> float:
        tiles = -(-rows // tile.rows) * -(-width // tile.columns)
        return -(-tiles // MULTIPROCESSORS) * tile.rows * tile.columns / tile.rate

    return min(TILES if roomy else TILES[1:], key=time)


def is_fused(rows: int, depth: int, dtype: torch.dtype) -> bool:
    """Which form `forward` takes."""
    wide = depth % 8 == 0 and depth > 0  # rows that are read 16 bytes at a time
    return dtype != torch.float32 and wide and (rows <= FUSED_ROWS or depth <= FUSED_DEPTH)


@functools.cache
def _is_roomy(index: int) -> bool:
    return torch.cuda.get_device_capability(index) in ROOMY


def _vector(item_bytes: int, *strides: int) -> int:
    """The elements, 16 bytes of them at most, that all strides are multiples of."""
    vector = 16 // item_bytes
    while any(stride % vector for stride in strides):
        vector //= 2
    return vector


def _rows(t: Tensor) -> Tensor:
    """(..., C) -> (rows, C), unit stride within a row."""
    t = t.reshape(t.shape[:-1].numel(), t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def forward_fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, saving: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(y, v), v is None unless `saving`: one kernel. Operands as in fastgate.ops.linear_gelu."""
    flat, weight, bias = _rows(x), weight.contiguous(), None if bias is None else bias.contiguous()
    (rows, depth), width = flat.shape, weight.shape[0]
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    v = torch.empty_like(y) if saving else None
    if not y.numel():
        return y, v
    stride = flat.stride(0)
    read, at_16_bytes = _vector(x.itemsize, stride, depth), aligned(flat, weight, bias, y, v)
    roomy = x.device.type != "cuda" or _is_roomy(x.device.index)
    tile = tile_for(rows, width, x.dtype, roomy, at_16_bytes and read * x.itemsize == 16)
    options = (
        read,
        _vector(x.itemsize, width),
        depth % tile.depth == 0,
        GROUP,
        *tile[:3],
        tile.num_stages,
    )
    tiles = -(-rows // tile.rows) * -(-width // tile.columns)
    PRODUCT.launch(
        (min(tiles, tile.resident * multiprocessors(x.device)), 1, 1),
        (tile, options, at_16_bytes, x.dtype, bias is None or bias.dtype, saving),
        (flat, weight, bias, y, v, rows, width, depth, stride, *options),
        tile.num_warps,
        tile.num_stages,
    )
    return y, v


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """v (rows, width) by cuBLAS, the bias in its epilogue."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return F.linear(flat, weight, None if bias is None else bias.to(x.dtype))


def forward_cublas(
    x: Tensor, weight: Tensor, bias: Tensor | None, saving: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(y, v), v is None unless `saving`: cuBLAS and one elementwise kernel, in place where v is not kept."""
    v = _product(x, weight, bias)
    y = torch.empty_like(v) if saving else v
    rows, width = v.shape
    if v.numel():
        vector = _vector(v.itemsize, width)
        GELU.launch(
            (-(-rows // ROWS) * -(-width // WIDTH), 1, 1),
            (vector, aligned(v, y), v.dtype),
            (v, y, rows, width, vector, ROWS, WIDTH),
            WARPS,
        )
    shape = (*x.shape[:-1], width)
    return y.view(shape), v.view(shape) if saving else None


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, saving: bool) -> tuple[Tensor, Tensor | None]:
    fused = is_fused(x.shape[:-1].numel(), x.shape[-1], x.dtype)
    return (forward_fused if fused else forward_cublas)(x, weight, bias, saving)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y (..., N) of x (..., K), weight (N, K) and bias (N,)."""
    return _forward(x, weight, bias, False)[0]


def forward_saving(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(y, v), v = x W^T + b (..., N) in x's dtype, for `backward`."""
    return _forward(x, weight, bias, True)


def _before_gelu(grad: Tensor, v: Tensor, db: Tensor | None) -> Tensor:
    """dv (rows, width), and its sums over the rows into db (width,) float32 if that is given."""
    rows, width = v.shape
    dv = torch.empty_like(v)
    if not v.numel():
        if db is not None:
            db.zero_()
        return dv
    across = -(-width // WIDTH)
    bucket = triton.next_power_of_2(rows)
    down = max(1, min(PROGRAMS * multiprocessors(v.device) // across, bucket // LEAST_ROWS))
    sums = db
    if db is not None and down > 1:
        sums = torch.empty((down, width), dtype=torch.float32, device=v.device)
    vector = _vector(min(grad.itemsize, v.itemsize), width)
    stages = STAGES if vector * v.itemsize == 16 else 1  # narrower ones would lie in registers
    BACKWARD.launch(
        (across, down, 1),
        (vector, aligned(grad, v, dv, sums), grad.dtype, v.dtype, db is None),
        (grad, v, dv, sums, rows, width, vector, ROWS, WIDTH, stages),
        WARPS,
    )
    if db is not None and sums is not None and down > 1:
        add_up(sums, db)
    return dv


def backward(
    grad: Tensor, v: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, requested: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dW, db): those that the bits of `requested` ask for, the others empty; db is float32.

    grad: (..., N), of y. v: as forward_saving gave it; None to make it again.
    """
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    shape = (flat.shape[0], weight.shape[0])
    v = _product(x, weight, bias) if v is None else v.reshape(shape).contiguous()
    db = torch.empty(shape[1] if requested & DBIAS else 0, dtype=torch.float32, device=x.device)
    dv = _before_gelu(grad.reshape(shape).contiguous(), v, db if requested & DBIAS else None)
    dx = torch.mm(dv, weight).view(x.shape) if requested & DX else x.new_empty(0)
    dweight = torch.mm(dv.t(), flat) if requested & DWEIGHT else weight.new_empty(0)
    return dx, dweight, db
