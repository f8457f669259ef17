"""Attention with one query a sequence in Triton: operand checks, launch choices, launches.

A program has up to HEADS of the heads of one sequence and walks blocks of its rows.

Few long sequences would leave multiprocessors idle: then the rows of a sequence are dealt to SPLITS programs
by equal runs of blocks. Each leaves what it has, with its own maximum, in scratch; merge_kernel adds them up.
How many programs a sequence gets follows from shapes alone, rows / sequences; lengths are known on the device
only. In backward each row's gradient belongs to the program that walks the row, and each probe's is summed
over the splits by sums.add_up, as are the rows' where there are more heads than one program takes. No
atomics. float32, whose products take registers rather than tensor cores, has 8 heads a program forward, 4
backward, and leaves the rows' gradient, all heads at once, to rows_kernel.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, NoReturn

import torch
import triton
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.kernels.absorbed_attention_backward import BACKWARD, ROWS
from fastgate.kernels.absorbed_attention_forward import FORWARD, MERGE, MERGED
from fastgate.kernels.dropout import threshold_argument
from fastgate.kernels.launch import aligned, multiprocessors
from fastgate.kernels.sums import add_up

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The widest rows and most heads: beyond, registers spill. Half the width where a program may have no more
# than 99 KB of shared memory (compute capabilities 8.6, 8.9, 12.0).
WIDEST, MOST_HEADS = 1024, 64
# Rows a sequence from which on a sequence is split, rows that a split gets at least, and splits at most.
SPLIT_FROM, LEAST_SPLIT, MOST_SPLITS = 256, 64, 64
MERGE_WARPS = 4
# What a program of rows_kernel works on at a time, and with how many warps.
ROWS_BLOCK, ROWS_WIDTH, ROWS_WARPS = 16, 128, 4


class Tile(NamedTuple):
    """What a program works on at a time, and with how many warps."""

    heads: int
    block: int
    chunks: int
    width: int
    stages: int
    num_warps: int


def forward_tile(hidden: int, dtype: torch.dtype, shared_memory: int) -> Tile:
    """shared_memory: KB of it that a program may have."""
    padded = max(16, triton.next_power_of_2(hidden))
    if dtype == torch.float32:  # no tensor cores: a product's operands lie in registers
        width = min(padded, 32)
        return Tile(8, 16, padded // width, width, 1, 8)
    width = min(padded, 128)
    # Two blocks of 64 KB under way at 1024 channels; half as many rows, one block, where there is less room.
    block, stages = (32, 3) if padded <= 512 or shared_memory >= 227 else (16, 2)
    return Tile(16, block, padded // width, width, stages, padded // width)


def backward_tile(hidden: int, dtype: torch.dtype) -> Tile:
    padded = max(16, triton.next_power_of_2(hidden))
    if dtype == torch.float32:
        return Tile(4, 16, padded // 16, 16, 1, 8)
    width = min(padded, 128)
    return Tile(16, 16, padded // width, width, 2, padded // width)


def shared_memory(device: torch.device) -> int:
    """KB that a program may have; devices that are not CUDA's stand for a large one."""
    return _shared_memory(device.index) if device.type == "cuda" else 227


@functools.cache
def _shared_memory(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return 64
    small, middle = major >= 12 or (major == 8 and minor in (6, 9)), major == 8
    return 99 if small else 163 if middle else 227


def fits(probe: Tensor) -> bool:
    """Whether the kernels take probes of these heads and this width, on this device."""
    _, heads, hidden = probe.shape
    room = shared_memory(probe.device)
    widest = WIDEST if room >= 163 else WIDEST // 2 if room >= 99 else 0
    return heads <= MOST_HEADS and hidden <= widest


def splits_of(sequences: int, rows: int, device: torch.device) -> int:
    """Programs that share a sequence: a power of two, from the shapes alone."""
    mean = rows // sequences
    if mean < SPLIT_FROM:
        return 1
    most = min(mean // LEAST_SPLIT, multiprocessors(device) // sequences, MOST_SPLITS)
    return 1 << max(most, 1).bit_length() - 1


class _Call(NamedTuple):
    """What forward and backward hand their kernels alike, ready for them."""

    probe: Tensor
    x: Tensor
    cu_seqlens: Tensor
    seed: Tensor | None
    c: float
    over_keep: float
    threshold: int
    splits: int


def _ready(
    probe: Tensor, x: Tensor, cu_seqlens: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> _Call:
    if probe.dim() != 3 or x.dim() != 2 or probe.shape[2] != x.shape[1] or not fits(probe):
        wanted = f"(sequences, heads, H), (rows, H); at most {MOST_HEADS} heads, H {WIDEST}"
        got = f"{tuple(probe.shape)}, {tuple(x.shape)}"
        _refuse("probe, x", got, wanted, "call fastgate.ops.absorbed_attention, which runs torch instead")
    if x.dtype not in DTYPES or probe.dtype != x.dtype:
        wanted = "one dtype of bfloat16, float16, float32"
        _refuse("probe, x", f"{probe.dtype}, {x.dtype}", wanted, "convert them first")
    sequences = probe.shape[0]
    if cu_seqlens.shape != (sequences + 1,) or (x.shape[0] and not sequences):
        got = f"shape {tuple(cu_seqlens.shape)} for {sequences} probes and {x.shape[0]} rows"
        _refuse("cu_seqlens", got, "(sequences + 1,)", "accumulate the lengths from 0")
    if dropout_p and seed is None:
        _refuse("seed", seed, "an int64 tensor of one element with dropout_p > 0", "pass a seed")
    return _Call(
        probe if probe.stride(2) == 1 else probe.contiguous(),
        x.contiguous(),
        cu_seqlens.contiguous(),
        seed if dropout_p else None,
        scale * math.log2(math.e),
        1.0 / (1.0 - dropout_p),
        threshold_argument(dropout_p),
        splits_of(sequences, x.shape[0], x.device) if sequences else 1,
    )


def _refuse(argument: str, got: object, wanted: str, remedy: str) -> NoReturn:
    raise ArgumentError(format_error("absorbed_attention", argument, got, wanted, remedy))


def _vector(item_bytes: int, *strides: int) -> int:
    """Elements that can be read at once from rows so many elements apart: a power of two."""
    vector = 16 // item_bytes
    while any(stride % vector for stride in strides):
        vector //= 2
    return vector


def forward(probe: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    """(mixed, total) of the operands of fastgate::absorbed_attention."""
    mixed, total, *_ = _forward(_ready(probe, *operands), saving=False)
    return mixed, total


def forward_saving(probe: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """(mixed, total, L, residue) for `backward_saved`: L (sequences, heads) float32, base 2; residue, as
    mixed, is what mixed's rounding took away, without elements in float32."""
    return _forward(_ready(probe, *operands), saving=True)


def _forward(call: _Call, saving: bool) -> tuple[Tensor, ...]:
    probe, x, splits = call.probe, call.x, call.splits
    sequences, heads, hidden = probe.shape
    mixed = x.new_empty((sequences, heads, hidden))
    total = x.new_empty((sequences, heads), dtype=torch.float32)
    lse = x.new_empty((sequences, heads) if saving else (0,), dtype=torch.float32)
    rounds = saving and x.dtype != torch.float32
    residue = x.new_empty(mixed.shape if rounds else (0,))
    if not mixed.numel():
        return mixed, total, lse, residue
    results = [mixed, residue if rounds else None, total, lse if saving else None]
    parts = results
    if splits > 1:
        pairs = (splits, sequences, heads)
        shapes = ((*pairs, hidden), pairs, (2, *pairs))
        mixed_parts, *others = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
        parts = [mixed_parts, None, *others]
    tile = forward_tile(hidden, x.dtype, shared_memory(x.device))
    strides = (probe.stride(0), probe.stride(1))
    vector = _vector(x.itemsize, hidden, *strides)
    tensors = (probe, x, call.cu_seqlens, call.seed, *parts)
    FORWARD.launch(
        (sequences, splits, -(-heads // tile.heads)),
        (
            tile, hidden, splits, vector, aligned(*tensors), x.dtype, call.cu_seqlens.dtype,
            call.seed is None, saving,
        ),
        (
            *tensors, sequences, heads, *strides, call.c, call.over_keep, call.threshold,
            hidden, splits, vector, *tile[:5],
        ),
        tile.num_warps,
    )  # fmt: skip
    if splits > 1:
        MERGE.launch(
            (sequences * heads, -(-hidden // MERGED.value), 1),
            (hidden, splits, aligned(*parts, *results), x.dtype, saving),
            (mixed_parts, *others, *results, sequences * heads, hidden, splits),
            MERGE_WARPS,
        )
    return mixed, total, lse, residue


def backward(grad: Tensor, grad_total: Tensor | None, probe: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    """(dprobe, dx) from the gradients of mixed and total; runs forward again for what that left behind."""
    return backward_saved(grad, grad_total, *forward_saving(probe, *operands), probe, *operands)


def backward_saved(
    grad: Tensor,
    grad_total: Tensor | None,
    mixed: Tensor,
    total: Tensor,
    lse: Tensor,
    residue: Tensor,
    probe: Tensor,
    *operands: Any,
) -> tuple[Tensor, Tensor]:
    """(dprobe, dx) from the gradients of mixed and total and what `forward_saving` gave."""
    call, scale = _ready(probe, *operands), operands[2]
    probe, x, splits = call.probe, call.x, call.splits
    sequences, heads, hidden = probe.shape
    if not x.numel() or not heads:
        return torch.zeros(probe.shape, dtype=probe.dtype, device=probe.device), torch.empty_like(x)
    tile = backward_tile(hidden, x.dtype)
    groups = -(-heads // tile.heads)
    grad = grad if grad.stride(2) == 1 else grad.contiguous()
    if grad_total is not None:
        grad_total = grad_total.contiguous() if call.seed is not None else None

    def scratch(parts: int, like: Tensor) -> Tensor:
        if parts == 1:
            return torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return torch.empty((parts, *like.shape), dtype=torch.float32, device=like.device)

    # float32 leaves dx to a kernel of its own, which takes all heads at once.
    apart = x.dtype == torch.float32
    dprobe, dx = scratch(splits, probe), scratch(1 if apart else groups, x)
    weights = x.new_empty((2, x.shape[0], heads)) if apart else None
    strides = (grad.stride(0), grad.stride(1), probe.stride(0), probe.stride(1))
    vector = _vector(x.itemsize, hidden, *strides)
    inputs = (mixed.contiguous(), residue, total.contiguous(), lse, probe, x, call.cu_seqlens, call.seed)
    tensors = (grad, grad_total, *inputs, dprobe, None if apart else dx, weights)
    BACKWARD.launch(
        (sequences, splits, groups),
        (
            tile, hidden, splits, groups == 1, vector, aligned(*tensors), x.dtype, call.cu_seqlens.dtype,
            call.seed is None, grad_total is None,
        ),
        (
            *tensors, sequences, heads, x.shape[0], *strides, call.c, scale, call.over_keep, call.threshold,
            hidden, splits, vector, *tile[:5],
        ),
        tile.num_warps,
    )  # fmt: skip
    if apart:
        given = (grad, probe, weights, call.cu_seqlens, dx)
        padded = max(16, triton.next_power_of_2(heads))
        ROWS.launch(
            (sequences, splits, -(-hidden // ROWS_WIDTH)),
            (hidden, splits, vector, padded, aligned(*given), call.cu_seqlens.dtype),
            (
                *given, heads, x.shape[0], *strides, hidden, splits, vector, padded, ROWS_BLOCK, ROWS_WIDTH,
            ),
            ROWS_WARPS,
        )  # fmt: skip
    return _added(dprobe, probe), _added(dx, x)


def _added(parts: Tensor, like: Tensor) -> Tensor:
    """The sum of the parts in `like`'s dtype, if they are parts."""
    if parts.dim() == like.dim():
        return parts
    total = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    add_up(parts, total)
    return total.to(like.dtype)
