"""Calls of absorbed attention, their truth in float64, and what a backend must meet on them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from helpers.cases import BF16, FP16, FP32, allowed, error
from helpers.poisoned_memory import poisoned
from torch import Tensor

from fastgate import ops
from fastgate.ops import reference
from fastgate.ops.ragged import SequenceOffsets

SEED = 81985529216486895


class Case(NamedTuple):
    lengths: tuple[int, ...]
    heads: int
    hidden: int
    dtype: torch.dtype
    dropout_p: float
    reason: str
    spread: float = 1.0  # of the scores
    int64: bool = False  # cu_seqlens is int64

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.reason} ({dtype}, {self.hidden}/{self.heads}, p {self.dropout_p})"


MIXED = (1, 16, 3, 33, 65)
CASES = (
    Case(MIXED, 3, 48, BF16, 0.1, "around the edges of blocks"),
    Case(MIXED, 3, 48, FP16, 0.0, "around the edges of blocks", int64=True),
    Case((1, 8, 3, 17), 3, 48, FP32, 0.1, "around the edges of blocks"),
    Case((9, 2), 2, 40, FP32, 0.0, "one weight is nearly 1", spread=12.0),
    Case((9, 2), 2, 40, BF16, 0.3, "one weight is nearly 1", spread=12.0, int64=True),
    Case((40, 3), 12, 384, BF16, 0.0, "MiniLM-L6's width and heads"),
    Case((5, 18), 6, 384, BF16, 0.1, "its width with heads of 64"),
    Case((20, 33), 12, 768, BF16, 0.1, "BERT-base"),
    Case((2, 9), 12, 768, FP32, 0.0, "BERT-base"),
    Case((20, 33), 16, 1024, BF16, 0.0, "BERT-large"),
    Case((3, 10), 12, 312, FP16, 0.1, "TinyBERT's width: no power of two divides it far"),
    Case((20, 7), 5, 35, BF16, 0.0, "an odd width: rows do not begin at multiples of 16 bytes"),
    Case((6, 3, 11), 9, 1, FP32, 0.3, "one channel"),
    Case((18, 4), 20, 40, BF16, 0.1, "more heads than one program takes"),
    Case((6, 2), 64, 64, BF16, 0.0, "the most heads"),
    Case((4, 0, 2, 0), 2, 32, BF16, 0.1, "empty sequences"),
    Case((0, 3), 2, 32, FP32, 0.0, "empty sequences"),
    Case((0, 0), 2, 32, BF16, 0.1, "sequences, but no rows"),
    Case((), 2, 32, FP32, 0.0, "nothing"),
)
# Long enough for a sequence to be shared by several programs.
SPLIT = (
    Case((130, 77, 0), 2, 40, BF16, 0.1, "split: runs of unequal length, and none"),
    Case((90,), 2, 40, FP32, 0.1, "split: one sequence"),
    Case((130, 1), 20, 32, FP16, 0.0, "split: the second sequence has rows for one program"),
)
# For a real device: the interpreter would take minutes.
LONG = tuple(
    Case(lengths, heads, hidden, dtype, dropout_p, reason)
    for lengths, dropout_p, reason in (
        ((8192,), 0.0, "the longest"),
        ((513, 2000, 77, 0), 0.1, "long, with dropout"),
        ((25, 11, 60, 33, 7) * 60, 0.1, "hundreds of short ones"),
        ((300, 1, 129, 700) * 8, 0.0, "a few dozen"),
    )
    for heads, hidden in ((12, 384), (12, 768), (16, 1024))
    for dtype in (BF16, FP16, FP32)
)


class Call(NamedTuple):
    grad: Tensor
    grad_total: Tensor
    probe: Tensor
    x: Tensor
    rest: tuple[Any, ...]  # of the schema's operands
    keys: SequenceOffsets

    @property
    def operands(self) -> tuple[Any, ...]:
        return (self.probe, self.x, *self.rest)


def make(case: Case, device: Any = "cpu", seed: int = 0) -> Call:
    """Probes and their gradients lie as products a head leave them: (heads, sequences, hidden) in memory."""
    generator = torch.Generator().manual_seed(seed)
    keys = SequenceOffsets(case.lengths, torch.device(device))

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, case.dtype)

    by_head = (case.heads, len(case.lengths), case.hidden)
    cu_seqlens = keys.cu_seqlens.long() if case.int64 else keys.cu_seqlens
    mask_seed = torch.tensor(SEED, device=device) if case.dropout_p else None
    return Call(
        draw(*by_head).transpose(0, 1),
        draw(*by_head[:2]).t().to(torch.promote_types(case.dtype, torch.float32)),
        draw(*by_head).transpose(0, 1),
        draw(keys.rows, case.hidden),
        (cu_seqlens, case.spread * case.hidden**-0.5, case.dropout_p, mask_seed),
        keys,
    )


def traceable(keys: SequenceOffsets) -> Any:
    """The same in plain attributes: before Python 3.12 Dynamo stops at the lock of a cached property."""
    names = ("lengths", "rows", "longest", "equal", "padded", "cu_seqlens")
    plain = SimpleNamespace(**{name: getattr(keys, name) for name in names})
    plain.grid = lambda rows: SequenceOffsets.grid(plain, rows)
    return plain


def by_definition(probe: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """One sequence and one head at a time."""
    _, scale, dropout_p, seed = call.rest
    sequences, heads, _ = probe.shape
    mixed, total, at = [probe.flatten(0, 1)[:0]], [probe.flatten()[:0]], 0
    for s, n in enumerate(call.keys.lengths):
        rows = x[at : at + n]
        at += n
        for h in range(heads):
            p = torch.softmax(scale * (rows @ probe[s, h]), 0)
            if dropout_p:
                kept = reference.keep_mask(seed, sequences * heads, n, dropout_p)[s * heads + h]
                p = p * kept / (1 - dropout_p)
            mixed.append((p @ rows).unsqueeze(0))
            total.append(p.sum().unsqueeze(0))
    return torch.cat(mixed).view(probe.shape), torch.cat(total).view(probe.shape[:2])


def differentiated(function: Any, call: Call, dtype: torch.dtype) -> list[Tensor]:
    """mixed, total, dprobe, dx of function(probe, x) at a precision."""
    leaves = [t.to(dtype).detach().requires_grad_() for t in (call.probe, call.x)]
    outputs = function(*leaves)
    grads = [grad.to(out.dtype) for grad, out in zip((call.grad, call.grad_total), outputs, strict=True)]
    found = torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)
    return [*(t.detach() for t in outputs), *found]


def truth(call: Call) -> list[Tensor]:
    return differentiated(lambda *leaves: by_definition(*leaves, call), call, torch.float64)


def torchs_own(call: Call) -> list[Tensor]:
    return differentiated(
        lambda probe, x: reference.absorbed_attention(probe, x, call.keys, *call.rest[1:]), call, call.x.dtype
    )


def run(backend: Any, call: Call) -> list[Tensor]:
    """The same from a backend's own functions: an ops.Implementation or a module of kernels."""
    forward, backward = getattr(backend, "saving", None) or (
        getattr(backend, "forward_saving", None),
        getattr(backend, "backward_saved", None),
    )
    if forward is None:
        outputs = backend.forward(*call.operands)
        return [*outputs, *backend.backward(call.grad, call.grad_total, *call.operands)]
    mixed, total, *saved = forward(*call.operands)
    return [mixed, total, *backward(call.grad, call.grad_total, mixed, total, *saved, *call.operands)]


NAMES = ("mixed", "total", "dprobe", "dx")


def check(backend: Any, case: Case, device: Any = "cpu", seed: int = 0) -> None:
    call = make(case, device, seed)
    with poisoned():
        found = run(backend, call)
    for name, got, own, true in zip(NAMES, found, torchs_own(call), truth(call), strict=True):
        assert got.shape == true.shape and got.dtype == own.dtype, name
        bound = allowed(own, true, got.dtype)
        assert error(got, true) <= bound, f"{name}: error {error(got, true)}, allowed {bound}"


def check_without_saving(kernels: Any, case: Case, device: Any = "cpu") -> None:
    """Nothing saved, and forward run again: the same bits."""
    call = make(case, device)
    with poisoned():
        found = [*kernels.forward(*call.operands)]
        found += kernels.backward(call.grad, call.grad_total, *call.operands)
    assert all(torch.equal(one, two) for one, two in zip(run(kernels, call), found, strict=True))


def check_masks(backend: Any, longest: int, seed: int, dtype: torch.dtype, device: Any = "cpu") -> None:
    """Weights all equal, row j the unit vector j, gradient h the unit vector h: mixed_hj and dx_jh are zero
    where dropped."""
    heads, dropout_p = 3, 0.4
    keys = SequenceOffsets((longest - 1, longest), torch.device(device))
    unit = torch.eye(longest, max(longest, heads), dtype=dtype, device=device)
    x = torch.cat((unit[:-1], unit))
    probe = torch.zeros(2, heads, x.shape[1], dtype=dtype, device=device)
    grad = torch.eye(heads, x.shape[1], dtype=dtype, device=device).expand(2, -1, -1)
    seed_tensor = torch.tensor(seed, device=device)
    mask = reference.keep_mask(seed_tensor, 2 * heads, longest, dropout_p).view(2, heads, longest)
    call = Call(
        grad, grad[..., 0].float() * 0, probe, x, (keys.cu_seqlens, 1.0, dropout_p, seed_tensor), keys
    )
    mixed, total, _, dx = run(backend, call)
    at = 0
    for s, n in enumerate(keys.lengths):
        assert torch.equal(mixed[s, :, :n] != 0, mask[s, :, :n]), "forward"
        assert torch.equal(dx[at : at + n, :heads].T != 0, mask[s, :, :n]), "backward"
        share = mask[s, :, :n].float().mean(1) / (1 - dropout_p)
        torch.testing.assert_close(total[s].float(), share, rtol=1e-2, atol=1e-3)
        at += n


def as_implementation(kernels: Any) -> ops.Implementation:
    saving = ops.Saving(kernels.forward_saving, kernels.backward_saved)
    return ops.Implementation(
        "triton", kernels.forward, kernels.backward, frozenset(kernels.DTYPES), saving, kernels.fits
    )
