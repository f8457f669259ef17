"""Self-attention over unpadded batches in Triton, on the host: operands, launch choices, launches.

The equations are in attention_forward.py and attention_backward.py, who does what in attention_tiles.py.
rows / sequences, known from the shapes, chooses how sequences are cut; every choice is right for any lengths.
Without a saved L and O (`backward`, in place of `backward_saved`) forward runs again before backward.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.kernels.attention_backward import BACKWARD_KEYS, BACKWARD_QUERIES, BACKWARD_WHOLE
from fastgate.kernels.attention_forward import FORWARD
from fastgate.kernels.dropout import threshold_argument
from fastgate.kernels.launch import Kernel, aligned

HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Blocks(NamedTuple):
    """How a kernel cuts up a sequence. whole: one program a sequence and head, else one a block."""

    whole: bool
    queries: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def _blocks_float32(head_dim: int) -> Blocks:
    """No tensor core: small blocks, for the products' operands lie in registers; 128 a thread hold them."""
    return Blocks(False, 32, 16 if head_dim == 128 else 32, 4 if head_dim == 32 else 8, 1, 128)


def _key_blocks_float32(head_dim: int) -> Blocks:
    """dK and dV take twice the registers of dQ: more threads, or half the queries at a time."""
    return Blocks(False, 16 if head_dim == 128 else 32, 32, 8, 1, 128)


def forward_blocks(head_dim: int, dtype: torch.dtype, dropout: bool, queries: int) -> Blocks:
    """queries: rows a sequence, on average. Blocks of 64 rows run wgmma on sm_90, smaller ones waste less."""
    if dtype == torch.float32:
        return _blocks_float32(head_dim)
    wide = head_dim == 128
    if queries <= 32 and not wide:
        return Blocks(True, 32, 32, 2, 2)
    if queries <= 64:
        if dropout and not wide:
            return Blocks(True, 64, 32, 4, 2)  # the mask is drawn in registers
        return Blocks(True, 64, 64, 8 if wide else 4, 2)
    return Blocks(False, 128, 32 if wide else 64, 8, 3)


def backward_blocks(head_dim: int, dtype: torch.dtype, dropout: bool, longest: int) -> tuple[Blocks, Blocks]:
    """(for dQ, for dK and dV); the same whole one for all three. longest: the larger of queries and keys a
    sequence, on average. Whole only where most sequences of the usual spread of lengths fit one block."""
    if dtype == torch.float32:
        return _blocks_float32(head_dim), _key_blocks_float32(head_dim)
    if longest <= 20 or (longest <= 40 and head_dim < 128):
        block = 32 if longest <= 20 else 64
        blocks = Blocks(True, block, block, 8 if dropout and block == 64 else 4, 1)
        return blocks, blocks
    if head_dim == 128:
        return Blocks(False, 64, 64, 8, 2), Blocks(False, 32, 64, 8, 2)
    walk = 32 if dropout else 64
    return Blocks(False, 64, walk, 4, 2), Blocks(False, walk, 64, 4, 2)


class _Call(NamedTuple):
    """What forward and backward hand their kernels alike, ready for them."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_bias: Tensor | None
    v_bias: Tensor | None
    seed: Tensor | None
    cu_q: Tensor
    cu_k: Tensor
    sequences: int
    heads: int
    head_dim: int
    c: float
    scale: float
    over_keep: float
    threshold: int


def _ready(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    heads: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> _Call:
    hidden = q.shape[-1]
    if q.dim() != 2 or k.dim() != 2 or k.shape != v.shape or hidden != k.shape[1] or hidden % heads:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        _refuse(
            "q, k, v", shapes, f"(queries, hidden), (keys, hidden) twice, {heads} heads in hidden", "reshape"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        got = f"{q.dtype}, {k.dtype}, {v.dtype}"
        _refuse("q, k, v", got, "one dtype of bfloat16, float16, float32", "convert them first")
    if hidden // heads not in HEAD_DIMS:
        wanted = f"hidden / heads of {', '.join(map(str, HEAD_DIMS))}"
        _refuse(
            "heads",
            f"hidden / heads of {hidden // heads}",
            wanted,
            "call fastgate.ops.attention, which runs torch instead",
        )
    for name, bias in (("q_bias", q_bias), ("k_bias", k_bias), ("v_bias", v_bias)):
        if bias is not None and bias.shape != (hidden,):
            _refuse(name, f"shape {tuple(bias.shape)}", f"({hidden},)", "pass one number a column of q")
    rows = q.shape[0] + k.shape[0]
    if cu_q.shape != cu_k.shape or cu_q.dim() != 1 or cu_q.numel() < (2 if rows else 1):
        got = f"shapes {tuple(cu_q.shape)}, {tuple(cu_k.shape)} for {rows} rows"
        _refuse("cu_q, cu_k", got, "(sequences + 1,) twice", "accumulate the lengths from 0")
    if not scale > 0.0:
        _refuse("scale", scale, "a positive number", "negate q and the scale")
    if dropout_p and seed is None:
        _refuse("seed", seed, "an int64 tensor of one element with dropout_p > 0", "pass a seed")
    return _Call(
        _unit_stride(q), _unit_stride(k), _unit_stride(v), _dense(q_bias), _dense(v_bias),
        seed if dropout_p else None, cu_q.contiguous(), cu_k.contiguous(), cu_q.numel() - 1, heads,
        hidden // heads, scale * math.log2(math.e), scale, 1.0 / (1.0 - dropout_p),
        threshold_argument(dropout_p),
    )  # fmt: skip


def _refuse(argument: str, got: object, wanted: str, remedy: str) -> NoReturn:
    raise ArgumentError(format_error("attention", argument, got, wanted, remedy))


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _dense(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.is_contiguous() else bias.contiguous()


def _slots(rows: int, block: int, call: _Call) -> int:
    return (rows // block + call.sequences) * call.heads if rows else 0


def _launch(
    kernel: Kernel,
    grid: int,
    tensors: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    numbers: tuple[int | float, ...],
    call: _Call,
    blocks: Blocks,
    cut: tuple[int, ...],
) -> None:
    """The parameters of every kernel here: tensors, strides and numbers, then D, VECTOR and how it is cut."""
    if not grid:
        return
    # Elements that all rows begin at a multiple of: 16 bytes' worth, or 1.
    vector = 16 // call.q.itemsize
    if any(stride % vector for stride in strides):
        vector = 1
    dtypes = tuple([None if tensor is None else tensor.dtype for tensor in tensors])
    kernel.launch(
        (grid, 1, 1),
        (call.head_dim, vector, blocks, aligned(*tensors), dtypes),
        (*tensors, *numbers, call.head_dim, vector, *cut),
        blocks.num_warps,
        blocks.num_stages,
        blocks.max_registers,
    )


def forward(q: Tensor, *operands: Any) -> Tensor:
    """O (queries, hidden) of the operands of fastgate::attention, for which see fastgate/ops/attention.py."""
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
    blocks = forward_blocks(call.head_dim, call.q.dtype, call.seed is not None, rows // call.sequences)
    grid = call.sequences * call.heads if blocks.whole else _slots(rows, blocks.queries, call)
    tensors = (
        call.q, call.k, call.v, call.q_bias, call.v_bias, out, lse if saving else None, call.seed,
        call.cu_q, call.cu_k,
    )  # fmt: skip
    strides = (call.q.stride(0), call.k.stride(0), call.v.stride(0))
    numbers = (rows, call.sequences, call.heads, *strides, call.c, call.over_keep, call.threshold)
    cut = (blocks.queries, blocks.keys, blocks.whole)
    _launch(FORWARD, grid, tensors, strides, numbers, call, blocks, cut)
    return out, lse


def backward(grad: Tensor, q: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) from the gradient of O; runs forward again for O and L."""
    return backward_saved(grad, *forward_saving(q, *operands), q, *operands)


def backward_saved(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, *operands: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) from the gradient of O and what `forward_saving` gave."""
    call = _ready(q, *operands)
    grad, out = _unit_stride(grad), out.contiguous()
    dq, dk, dv = (t.new_empty(t.shape) for t in (call.q, call.k, call.v))
    rows_q, rows_k = call.q.shape[0], call.k.shape[0]
    if not rows_q + rows_k:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    biased = None if call.q_bias is None else torch.empty_like(dq)
    longest = max(rows_q, rows_k) // call.sequences
    by_query, by_key = backward_blocks(call.head_dim, call.q.dtype, call.seed is not None, longest)
    operands = (call.q, call.k, call.v, call.q_bias, call.v_bias)
    ends = (call.seed, call.cu_q, call.cu_k)
    strides = (grad.stride(0), call.q.stride(0), call.k.stride(0), call.v.stride(0))
    factors = (call.c, call.scale, call.over_keep, call.threshold)
    if by_query.whole:
        _launch(
            BACKWARD_WHOLE, call.sequences * call.heads,
            (grad, out, lse, delta, biased, *operands, dq, dk, dv, *ends), strides,
            (rows_q, call.heads, *strides, *factors), call, by_query, (by_query.queries,),
        )  # fmt: skip
        return dq, dk, dv
    _launch(
        BACKWARD_QUERIES, _slots(rows_q, by_query.queries, call),
        (grad, out, lse, delta, biased, *operands, dq, *ends), strides,
        (rows_q, call.sequences, call.heads, *strides, *factors), call, by_query,
        (by_query.queries, by_query.keys),
    )  # fmt: skip
    queries = call.q if biased is None else biased
    strides = (strides[0], queries.stride(0), *strides[2:])
    _launch(
        BACKWARD_KEYS, _slots(rows_k, by_key.keys, call),
        (grad, lse, delta, queries, call.k, call.v, call.v_bias, dk, dv, *ends), strides,
        (rows_q, call.sequences, call.heads, *strides, *factors), call, by_key,
        (by_key.queries, by_key.keys),
    )  # fmt: skip
    return dq, dk, dv
