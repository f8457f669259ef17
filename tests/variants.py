"""The calls whose Triton kernels `kernels/resources.json` counts: one function an op, listed in OPS.

A call is the op's host code on meta tensors: it chooses the kernels and their launches as on a device, and
tests/resources.py records them in place of launching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from cases import DTYPES
from norm_cases import make, wanted_bits

from fastgate.kernels import attention, gated_add_norm
from fastgate.ops.gated_add_norm import OPERANDS

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
        gated_add_norm.backward(y, *positional, wanted_bits(given))

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
    "attention": attention_calls,
    "gated_add_norm": gated_add_norm_calls,
}
