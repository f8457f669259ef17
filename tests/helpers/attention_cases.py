"""Calls of packed attention, their truth in float64, and what a compiled backend must meet on them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from helpers.cases import BF16, FP16, FP32, allowed, error
from helpers.poisoned_memory import poisoned
from torch import Tensor

from fastgate import ops
from fastgate.ops import reference
from fastgate.ops.attention import attention
from fastgate.ops.ragged import SequenceOffsets

SEED = 81985529216486895


class Case(NamedTuple):
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int
    head_dim: int
    dtype: torch.dtype
    dropout_p: float
    reason: str
    strided: bool = False  # q, k, v are the thirds of one product's rows
    int64: bool = False  # cu_seqlens are int64
    bias: torch.dtype | None = None  # of the biases; None: there are none

    def __str__(self) -> str:
        biases = ", biases" if self.bias else ""
        return f"{self.reason} ({str(self.dtype).removeprefix('torch.')}, head_dim {self.head_dim}{biases})"


MIXED = (1, 3, 17, 64, 65, 130)
UNEVEN = ((70, 3, 130), (40, 129, 66))
CASES = (
    Case(MIXED, MIXED, 1, 64, BF16, 0.1, "around the edges of blocks"),
    Case(MIXED, MIXED, 1, 32, FP16, 0.0, "around the edges of blocks"),
    Case((65, 1, 64, 31), (65, 1, 64, 31), 1, 128, FP32, 0.1, "around the edges of blocks"),
    Case((5, 1, 12, 3), (5, 1, 12, 3), 2, 64, BF16, 0.1, "a few tokens, one block a sequence", strided=True),
    Case((5, 1, 12, 3), (5, 1, 12, 3), 2, 32, FP32, 0.1, "a few tokens, one block a sequence"),
    Case((10, 25, 0, 33, 7, 60), (10, 25, 0, 33, 7, 60), 2, 32, BF16, 0.0, "SST-2", strided=True),
    Case((10, 70, 0, 3, 1), (10, 70, 0, 3, 1), 1, 64, BF16, 0.1, "one long among short ones"),
    Case((10, 70, 0, 3, 1), (10, 70, 0, 3, 1), 1, 128, FP16, 0.1, "one long among short ones"),
    Case((1, 1, 1), (4, 9, 100), 2, 64, BF16, 0.1, "one query a sequence", int64=True),
    Case((1, 1, 1), (4, 9, 50), 1, 32, FP32, 0.0, "one query a sequence"),
    Case((3, 0, 2), (0, 4, 2), 2, 64, FP32, 0.1, "no keys, no queries"),
    Case((130, 0, 90), (0, 80, 90), 1, 32, BF16, 0.1, "no keys, no queries, by blocks"),
    Case(*UNEVEN, 1, 128, BF16, 0.1, "blocks, queries and keys apart"),
    Case(*UNEVEN, 1, 64, FP16, 0.0, "blocks, queries and keys apart", int64=True),
    Case((40, 3), (7, 70), 1, 32, FP32, 0.0, "blocks, queries and keys apart"),
    Case(MIXED[:-1], MIXED[:-1], 1, 64, BF16, 0.1, "around the edges of blocks", bias=FP32),
    Case((40, 3, 70), (7, 70, 40), 1, 128, FP16, 0.0, "blocks, queries and keys apart", bias=FP16),
    Case((40, 3), (7, 70), 2, 32, FP32, 0.1, "blocks, queries and keys apart", bias=FP32),
    Case((5, 1, 12, 3), (5, 1, 12, 3), 2, 64, BF16, 0.1, "a few tokens", strided=True, bias=BF16),
    Case((10, 70, 0, 3, 1), (10, 70, 0, 3, 1), 1, 32, BF16, 0.1, "one long among short ones", bias=BF16),
    Case((3, 0, 2), (0, 4, 2), 2, 64, BF16, 0.1, "no keys, no queries", bias=FP32),
    Case((), (), 2, 64, BF16, 0.0, "nothing"),
    Case((0, 0), (0, 0), 2, 64, BF16, 0.0, "sequences, but no rows"),
)
# For a real device: the interpreter would take minutes.
LONG = tuple(
    Case(lengths, lengths, 2, head_dim, dtype, dropout_p, reason)
    for lengths, dropout_p, reason in (
        ((8192, 1, 4095), 0.0, "the longest"),
        ((513, 2000, 77), 0.1, "long, with dropout"),
        ((25, 11, 60, 33, 7) * 60, 0.1, "hundreds of short ones"),
        ((100, 1, 129, 64) * 80, 0.0, "hundreds of blocks"),
    )
    for head_dim in (32, 64, 128)
    for dtype in (BF16, FP16, FP32)
)


class Call(NamedTuple):
    grad: Tensor
    tensors: tuple[Tensor, Tensor, Tensor]
    operands: tuple[Any, ...]  # the rest of the schema's, from the biases on
    queries: SequenceOffsets
    keys: SequenceOffsets


def make(case: Case, device: torch.device) -> Call:
    generator = torch.Generator().manual_seed(0)
    hidden = case.heads * case.head_dim

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(device, case.dtype)

    queries, keys = (SequenceOffsets(n, device) for n in (case.queries, case.keys))
    if case.strided:
        q, k, v = draw(queries.rows, 3 * hidden).split(hidden, 1)
    else:
        q, k, v = draw(queries.rows, hidden), draw(keys.rows, hidden), draw(keys.rows, hidden)
    ends = [r.cu_seqlens.long() if case.int64 else r.cu_seqlens for r in (queries, keys)]
    seed = torch.tensor(SEED, device=device) if case.dropout_p else None
    grad = draw(queries.rows, hidden)
    biases: tuple[Tensor | None, ...] = (None, None, None)
    if case.bias:
        biases = tuple(draw(1, hidden)[0].to(case.bias) for _ in range(3))
    operands = (*biases, *ends, case.heads, case.head_dim**-0.5, case.dropout_p, seed)
    return Call(grad, (q, k, v), operands, queries, keys)


def torchs(call: Call, dtype: torch.dtype) -> list[Tensor]:
    """O, dQ, dK, dV by torch at a precision, every bias added: the keys' too, which kernels leave out."""
    leaves = [t.to(dtype).detach().requires_grad_() for t in call.tensors]
    sums = [
        leaf if bias is None else (leaf + bias).to(dtype)
        for leaf, bias in zip(leaves, call.operands[:3], strict=True)
    ]
    out = reference.attention(*sums, call.queries, call.keys, *call.operands[5:])
    grads = torch.autograd.grad(out, leaves, call.grad.to(dtype), materialize_grads=True)
    return [out.detach(), *grads]


def ours(kernels: Any, call: Call) -> list[Tensor]:
    """The same by `kernels`, with the log-sum-exp saved."""
    with poisoned():
        out, lse = kernels.forward_saving(*call.tensors, *call.operands)
        grads = kernels.backward_saved(call.grad, out, lse, *call.tensors, *call.operands)
    return [out, *grads]


def check_without_saving(kernels: Any, case: Case, device: torch.device) -> None:
    """Nothing saved, and forward run again: the same bits."""
    call = make(case, device)
    with poisoned():
        out = kernels.forward(*call.tensors, *call.operands)
        grads = kernels.backward(call.grad, *call.tensors, *call.operands)
    for one, two in zip(ours(kernels, call), (out, *grads), strict=True):
        assert torch.equal(one, two)


def check(kernels: Any, case: Case, device: torch.device) -> None:
    call = make(case, device)
    truth, own = torchs(call, torch.float64), torchs(call, case.dtype)
    for name, got, torch_got, true in zip(
        ("O", "dQ", "dK", "dV"), ours(kernels, call), own, truth, strict=True
    ):
        assert got.shape == true.shape and got.dtype == case.dtype, name
        bound = allowed(torch_got, true, case.dtype)
        assert error(got, true) <= bound, f"{name}: error {error(got, true)}, allowed {bound}"


def check_autograd(kernels: Any, device: torch.device) -> None:
    """Through the registry: eager, with nothing to differentiate, traced; other head_dims run in torch."""
    saving = ops.Saving(kernels.forward_saving, kernels.backward_saved)
    ours = ops.Implementation(
        "triton",
        kernels.forward,
        kernels.backward,
        frozenset(kernels.DTYPES),
        saving,
        lambda head_dim: head_dim in kernels.HEAD_DIMS,
    )
    ops.implementation("attention", device.type, FP32)  # loads the registry
    before = ops.IMPLEMENTATIONS.get(("attention", device.type))
    ops.IMPLEMENTATIONS["attention", device.type] = ours
    try:
        lengths = SequenceOffsets((5, 1, 9), device)
        for heads in (2, 4):  # head_dim 32, 16
            leaves = [torch.randn(15, 64, device=device, requires_grad=True) for _ in range(3)]
            biases = [torch.randn(64, device=device, requires_grad=True) for _ in range(3)]
            named = dict(zip(("q_bias", "k_bias", "v_bias"), biases, strict=True))
            out = attention(*leaves, lengths, lengths, heads, 0.2, **named)
            sums = [leaf + bias for leaf, bias in zip(leaves, biases, strict=True)]
            wanted = reference.attention(*sums, lengths, lengths, heads, 0.2)
            grad = torch.randn_like(out)
            for one, two in zip(
                torch.autograd.grad(out, [*leaves, *biases], grad),
                torch.autograd.grad(wanted, [*leaves, *biases], grad),
                strict=True,
            ):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                assert torch.equal(attention(*leaves, lengths, lengths, heads, 0.2, **named), out)
            torch.library.opcheck(
                torch.ops.fastgate.attention.default,
                (*leaves, *biases, lengths.cu_seqlens, lengths.cu_seqlens, heads, 0.2, 0.0, None),
            )
    finally:
        ops.IMPLEMENTATIONS.pop(("attention", device.type))
        if before is not None:
            ops.IMPLEMENTATIONS["attention", device.type] = before


MASKS = ((31, 0, FP32), (31, -3, FP32), (64, SEED, BF16), (128, -3, BF16))


def check_mask(kernels: Any, n: int, seed: int, dtype: torch.dtype, device: torch.device) -> None:
    """Every probability equal, value j and gradient i unit vectors: O_ij and dV_ji are zero where dropped."""
    heads, width, dropout_p = 2, max(n, 32), 0.4
    queries = SequenceOffsets((n - 1, n), device)
    unit = torch.eye(width, dtype=dtype, device=device)[:n].repeat(1, heads)
    rows = torch.cat((unit[:-1], unit))
    seed_tensor = torch.tensor(seed, device=device)
    mask = reference.keep_mask(seed_tensor, queries.rows * heads, n, dropout_p)
    operands = (None, None, None, *(queries.cu_seqlens,) * 2, heads, 1.0, dropout_p, seed_tensor)
    nothing = torch.zeros_like(rows)
    out, lse = kernels.forward_saving(nothing, nothing, rows, *operands)
    _, _, dv = kernels.backward_saved(rows, out, lse, nothing, nothing, rows, *operands)
    for first, length in ((0, n - 1), (n - 1, n)):
        for head in range(heads):
            wanted = mask[torch.arange(first, first + length, device=device) * heads + head, :length]
            part = slice(head * width, head * width + length)
            assert torch.equal(out[first : first + length, part] != 0, wanted), "forward"
            assert torch.equal(dv[first : first + length, part].T != 0, wanted), "backward"
