"""The calls whose Triton kernels `kernels/resources.json` counts: one function an op, listed in OPS.

A call is the op's host code on meta tensors: it chooses the kernels and their launches as on a device, and
tests/resources.py records them in place of launching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import torch
from cases import DTYPES
from norm_cases import make, wanted_bits

from fastgate.kernels import absorbed_attention, gated_add_norm
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


OPS: dict[str, Callable[[], Calls]] = {
    "absorbed_attention": absorbed_attention_calls,
    "gated_add_norm": gated_add_norm_calls,
}
