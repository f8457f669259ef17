"""The calls whose Triton kernels `kernels/resources.json` counts: one function an op, listed in OPS.

A call is the op's host code on meta tensors: it chooses the kernels and their launches as on a device, and
tests/helpers/triton_resources.py records them in place of launching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import torch
from helpers import embed_cases, shift_cases
from helpers.cases import DTYPES
from helpers.norm_cases import make, requested_bits

from fastgate.kernels import (
    absorbed_attention,
    attention,
    embed_norm,
    gated_add_norm,
    linear_gelu,
    shift_norm,
)
from fastgate.ops.embed_norm import OPERANDS as EMBED_OPERANDS
from fastgate.ops.gated_add_norm import OPERANDS
from fastgate.ops.shift_norm import OPERANDS as SHIFT_OPERANDS

Calls = Iterator[tuple[str, Callable[[], object]]]
FP32, BF16, AUTOCAST = DTYPES[:3]
MANY, FEW = 65536, 32


def gated_add_norm_calls() -> Calls:
    """Every hidden bucket that BERTs have, the dtypes, and the calls that take the most registers."""
    for hidden in (12, 128, 312, 384, 768, 771, 1024, 2048):
        yield f"{hidden} bias", _gated_add_norm(MANY, hidden, BF16, "bias")
    for hidden in (384, 768, 1024):
        yield f"{hidden} dropout", _gated_add_norm(MANY, hidden, BF16, "dropout")
    for call in ("everything", "two norms and dropout"):
        yield f"768 {call}", _gated_add_norm(MANY, 768, BF16, call)
        yield f"768 fp32 {call}", _gated_add_norm(MANY, 768, FP32, call)
    yield "768 fp32 bias", _gated_add_norm(MANY, 768, FP32, "bias")
    yield "768 autocast dropout", _gated_add_norm(MANY, 768, AUTOCAST, "dropout")
    yield "768 few rows", _gated_add_norm(FEW, 768, BF16, "bias")


def _gated_add_norm(rows: int, hidden: int, dtypes: object, call: str) -> Callable[[], object]:
    given = make((1, hidden), dtypes, call)
    operands = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in given.items()
    }
    for name in ("x", "residual"):
        operands[name] = operands[name].new_empty((rows, hidden))
    positional = [operands[name] for name in OPERANDS]

    def both() -> None:
        y = gated_add_norm.forward(*positional)
        gated_add_norm.backward(y, *positional, requested_bits(given))

    return both


def linear_gelu_calls() -> Calls:
    """BERTs' depths, each N = 4 K wide; every tile, by its number of rows; 312, which no step divides; 771,
    read an element at a time. Both forms run, whichever the op picks."""
    for depth in (384, 768, 1024):
        yield f"{depth} many rows", _linear_gelu(MANY, depth, torch.bfloat16, False)
        yield f"{depth} many rows, kept", _linear_gelu(MANY, depth, torch.bfloat16, True)
    for rows in (2048, 256, 128, FEW):
        for kept in (False, True):
            yield f"768 {rows} rows{', kept' * kept}", _linear_gelu(rows, 768, torch.bfloat16, kept)
    yield "768 many rows, fp32 bias", _linear_gelu(MANY, 768, torch.bfloat16, True, torch.float32)
    yield "768 few rows, fp32 bias", _linear_gelu(2048, 768, torch.bfloat16, True, torch.float32)
    yield "768 fp16 many rows, kept", _linear_gelu(MANY, 768, torch.float16, True)
    for kept in (False, True):
        yield f"768 fp32 many rows{', kept' * kept}", _linear_gelu(MANY, 768, torch.float32, kept)
    for depth in (312, 771):
        yield f"{depth} many rows, kept", _linear_gelu(MANY, depth, torch.bfloat16, True)


def _linear_gelu(
    rows: int, depth: int, dtype: torch.dtype, kept: bool, bias_dtype: torch.dtype | None = None
) -> Callable[[], object]:
    x = torch.empty(rows, depth, dtype=dtype, device="meta")
    weight = torch.empty(4 * depth, depth, dtype=dtype, device="meta")
    bias = torch.empty(4 * depth, dtype=bias_dtype or dtype, device="meta")

    def all_of_it() -> None:
        y, v = linear_gelu.forward_fused(x, weight, bias, kept)
        linear_gelu.forward_cublas(x, weight, bias, kept)
        if kept:
            linear_gelu.backward(y, v, x, weight, bias, 7)

    return all_of_it


def embed_norm_calls() -> Calls:
    """As above; types of two kinds and of one."""
    fp32, bf16 = embed_cases.DTYPES[:2]
    for hidden in (128, 312, 384, 768, 771, 1024, 2048):
        yield f"{hidden} plain", _embed_norm(MANY, hidden, bf16, "plain")
    for hidden in (384, 768, 1024):
        yield f"{hidden} dropout", _embed_norm(MANY, hidden, bf16, "dropout")
        yield f"{hidden} two norms and dropout", _embed_norm(MANY, hidden, bf16, "two norms and dropout")
    yield "768 two norms", _embed_norm(MANY, 768, bf16, "two norms")
    yield "768 no types", _embed_norm(MANY, 768, bf16, "no types")
    yield "768 two norms, no types, dropout", _embed_norm(MANY, 768, bf16, "two norms, no types, dropout")
    yield "768 many types", _embed_norm(MANY, 768, bf16, "many types")
    for call in ("plain", "two norms and dropout"):
        for hidden in (384, 768, 1024):
            yield f"{hidden} fp32 {call}", _embed_norm(MANY, hidden, fp32, call)
    yield "768 few rows", _embed_norm(FEW, 768, bf16, "plain")


def _embed_norm(rows: int, hidden: int, dtypes: object, call: str) -> Callable[[], object]:
    given = embed_cases.make(1, hidden, dtypes, call)
    operands = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in given.items()
    }
    for name in ("words", "positions", "types"):
        if operands[name] is not None:
            operands[name] = operands[name].new_empty(rows)
    positional = [operands[name] for name in EMBED_OPERANDS]

    def both() -> None:
        y = embed_norm.forward(*positional)
        embed_norm.backward(y, *positional, embed_cases.requested_bits(given))

    return both


def shift_norm_calls() -> Calls:
    """As above."""
    fp32, bf16, autocast = shift_cases.DTYPES[:3]
    for hidden in (128, 312, 384, 768, 771, 1024, 2048):
        yield f"{hidden}", _shift_norm(MANY, hidden, bf16)
    for hidden in (384, 768, 1024):
        yield f"{hidden} fp32", _shift_norm(MANY, hidden, fp32)
    yield "768 autocast", _shift_norm(MANY, 768, autocast)
    yield "768 few rows", _shift_norm(FEW, 768, bf16)


def _shift_norm(rows: int, hidden: int, dtypes: object) -> Callable[[], object]:
    given = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in shift_cases.make(1, hidden, dtypes).items()
    }
    given["x"], given["has_left_neighbour"] = (
        given["x"].new_empty((rows, hidden)),
        given["has_left_neighbour"].new_empty(rows),
    )
    positional = [given[name] for name in SHIFT_OPERANDS]

    def both() -> None:
        shift_norm.backward(shift_norm.forward(*positional), *positional, shift_cases.ALL)

    return both


def absorbed_attention_calls() -> Calls:
    """The widths and heads of BERTs; many short sequences, and few long ones, which are split."""
    for hidden, heads in ((384, 12), (768, 12), (1024, 16)):
        for dtype, name in ((BF16.x, "bf16"), (FP32.x, "fp32")):
            many = (1024, 1024 * 25)
            yield f"{hidden} {name} many", _absorbed(*many, hidden, heads, dtype, 0.0)
            yield f"{hidden} {name} many dropout", _absorbed(*many, hidden, heads, dtype, 0.1)
            yield f"{hidden} {name} few", _absorbed(8, 8 * 512, hidden, heads, dtype, 0.1)
    yield "1024 bf16 163 KB", _absorbed(*many, 1024, 16, BF16.x, 0.1, room=163)


def _absorbed(
    sequences: int, rows: int, hidden: int, heads: int, dtype: torch.dtype, dropout_p: float, room: int = 227
) -> Callable[[], object]:
    probe = torch.empty(heads, sequences, hidden, dtype=dtype, device="meta").transpose(0, 1)
    x = torch.empty(rows, hidden, dtype=dtype, device="meta")
    cu_seqlens = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta") if dropout_p else None
    operands = (probe, x, cu_seqlens, 0.125, dropout_p, seed)

    def both() -> None:
        with (
            mock.patch.object(absorbed_attention, "multiprocessors", lambda _: 132),
            mock.patch.object(absorbed_attention, "shared_memory", lambda _: room),
        ):
            mixed, total, *saved = absorbed_attention.forward_saving(*operands)
            absorbed_attention.backward_saved(mixed, total, mixed, total, *saved, *operands)

    return both


def attention_calls() -> Calls:
    """Every head_dim, with dropout and without, at one mean length of each range of launch choices; with the
    biases that an encoder's projections have, once without any and once with those of autocast."""
    for head_dim in attention.HEAD_DIMS:
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            for dropout_p in (0.0, 0.1):
                for length in (16, 32, 64, 128):
                    call = f"{head_dim} {name} length {length}{' dropout' if dropout_p else ''}"
                    yield call, _attention(head_dim, length, dtype, dropout_p, dtype)
                    if not dropout_p:
                        yield f"{call} inference", _attention(head_dim, length, dtype, None, dtype)
    for length in (16, 128):
        yield f"64 bf16 length {length} no biases", _attention(64, length, torch.bfloat16, 0.0, None)
    yield "64 bf16 length 128 autocast dropout", _attention(64, 128, torch.bfloat16, 0.1, torch.float32)
    yield "64 fp16 length 128 dropout", _attention(64, 128, torch.float16, 0.1, torch.float16)


def _attention(
    head_dim: int, length: int, dtype: torch.dtype, dropout_p: float | None, bias_dtype: torch.dtype | None
) -> Callable[[], object]:
    """dropout_p: None for inference."""
    sequences, hidden = 512, 768

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v, grad = (empty(sequences * length, hidden, dtype=dtype) for _ in range(4))
    biases = (empty(hidden, dtype=bias_dtype),) * 3 if bias_dtype else (None,) * 3
    ends = empty(sequences + 1, dtype=torch.int32)
    seed = empty(dtype=torch.int64) if dropout_p else None
    operands = (q, k, v, *biases, ends, ends, hidden // head_dim, head_dim**-0.5, dropout_p or 0.0, seed)

    def train() -> None:
        out, lse = attention.forward_saving(*operands)
        attention.backward_saved(grad, out, lse, *operands)

    return train if dropout_p is not None else lambda: attention.forward(*operands)


OPS: dict[str, Callable[[], Calls]] = {
    "absorbed_attention": absorbed_attention_calls,
    "attention": attention_calls,
    "embed_norm": embed_norm_calls,
    "gated_add_norm": gated_add_norm_calls,
    "linear_gelu": linear_gelu_calls,
    "shift_norm": shift_norm_calls,
}
