"""Times packed attention, forward and backward, against torch's: `pytest bench/kernels/bench_attention.py`.

Packed are fastgate, torch's varlen flash attention, and FlexAttention with a mask of sequences; padded to the
longest, with a mask where lengths differ, is what Hugging Face hands to SDPA. Equal lengths need no mask, and
have cuDNN's attention too. Padding and unpadding themselves are not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import kernel_baselines
import lengths
import pytest
import torch
from harness import DEVICE, ON_GPU, Work
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastgate.ops import reference
from fastgate.ops.attention import attention
from fastgate.ops.ragged import SequenceOffsets

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 1e-2 if ON_GPU else 1e-5
ROWS = 32768 if ON_GPU else 1024
IMPLEMENTATIONS = ("fastgate", "flash", "cudnn", "flex", "sdpa")
# (lengths, heads, head_dim); a number: sequences of that length, ROWS in all.
SHAPES = [
    *((length, 12, 64) for length in (32, 64, 128, 256, 512)),
    *((mix, 12, 64) for mix in lengths.ROWS),
    *((which, 12, 32) for which in (32, 128, "sst2")),
    *((which, 8, 128) for which in (128, 512, "imdb")),
]
if not ON_GPU:
    SHAPES = [(32, 12, 32), *((which, 12, 64) for which in (16, 64, 128, 512, "sst2"))]


class Call:
    """q, k, v packed in sets, and in torch's padded form."""

    def __init__(self, which: int | str, heads: int, head_dim: int, matrices: int) -> None:
        counts = lengths.mix(which) if isinstance(which, str) else (which,) * (ROWS // which)
        self.ragged = SequenceOffsets(counts if ON_GPU else counts[:32], DEVICE)
        self.heads, self.head_dim, self.hidden = heads, head_dim, heads * head_dim
        self.scale = head_dim**-0.5
        rows = self.ragged.rows
        self.bytes = matrices * rows * self.hidden * DTYPE.itemsize
        self.flops = 4 * sum(n * n for n in self.ragged.lengths) * self.hidden
        self.sets = harness.sets_for(self.bytes)
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.packed = [
            [torch.randn(rows, self.hidden, generator=generator, device=DEVICE).to(DTYPE) for _ in range(4)]
            for _ in range(self.sets)
        ]

    def grid(self, t: Tensor) -> Tensor:
        """(rows, hidden) -> (sequences, heads, longest, head_dim)."""
        count, longest = len(self.ragged.lengths), self.ragged.longest
        if not self.ragged.equal:
            flat = t.new_zeros(count * longest, self.hidden)
            t = flat.index_copy(0, self.ragged.padded[0], t)
        return t.view(count, longest, self.heads, self.head_dim).transpose(1, 2)

    def rows(self, t: Tensor) -> Tensor:
        """The way back."""
        t = t.transpose(1, 2).reshape(-1, self.hidden)
        return t if self.ragged.equal else t.index_select(0, self.ragged.padded[0])

    def by_head(self, t: Tensor) -> Tensor:
        return t.view(-1, self.heads, self.head_dim)


# An implementation: its operands of a set, the function, and the unpadded rows of its result.
Form = tuple[Callable[[Tensor], Tensor], Callable[..., Tensor], Callable[[Tensor], Tensor]]


def forms(call: Call) -> tuple[dict[str, Form], dict[str, str]]:
    """(what runs here, why the rest does not)."""
    ragged, scale = call.ragged, call.scale

    def same(t: Tensor) -> Tensor:
        return t

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, ragged, ragged, call.heads, scale)

    mask = None if ragged.equal else ragged.padded[1][:, None, None, :]

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, scale=scale)

    found: dict[str, Form] = {"fastgate": (same, packed, same), "sdpa": (call.grid, padded, call.rows)}
    if not ON_GPU:
        return found, dict.fromkeys(("flash", "cudnn", "flex"), "no CUDA device")
    absent = {}
    if ragged.equal:
        found["cudnn"] = (call.grid, cudnn, call.rows)
    else:
        absent["cudnn"] = "takes sequences of one length here"
    found["flash"] = (call.by_head, _flash(call), lambda t: t.reshape(-1, call.hidden))
    found["flex"] = _flex(call)
    return found, absent


def _flash(call: Call) -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = call.ragged.cu_seqlens.to(torch.int32), call.ragged.longest

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(q, k, v, ends, ends, longest, longest)  # its scale is head_dim ** -0.5

    return flash


def _flex(call: Call) -> Form:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, _ = kernel_baselines.compiled(flex_attention)
    assert compiled is not None
    if call.ragged.equal:
        return call.grid, lambda q, k, v: compiled(q, k, v, scale=call.scale), call.rows
    counts = torch.tensor(call.ragged.lengths, device=DEVICE)
    sequence = torch.repeat_interleave(torch.arange(len(counts), device=DEVICE), counts)

    def together(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        return sequence[query] == sequence[key]

    rows = call.ragged.rows
    mask = torch.compile(create_block_mask)(together, None, None, rows, rows, device=DEVICE.type)
    return (
        lambda t: call.by_head(t).transpose(0, 1)[None],
        lambda q, k, v: compiled(q, k, v, block_mask=mask, scale=call.scale),
        lambda t: t[0].transpose(0, 1).reshape(-1, call.hidden),
    )


def forward(which: int | str, heads: int, head_dim: int) -> Work:
    call = Call(which, heads, head_dim, 4)
    found, absent = forms(call)

    def implementation(form: Form) -> harness.Call:
        into, function, _ = form
        return harness.inference(function, [[into(t) for t in tensors[:3]] for tensors in call.packed])

    implementations = {name: implementation(form) for name, form in found.items()}
    checked = {name: _then(found[name][2], run) for name, run in implementations.items()}
    truth = reference.attention(
        *(t.double() for t in call.packed[0][:3]), call.ragged, call.ragged, heads, call.scale
    )
    return Work(
        f"attention forward {which} {heads}x{head_dim} {str(DTYPE).removeprefix('torch.')}",
        implementations,
        call.bytes,
        call.flops,
        call.sets,
        absent,
        {
            "copy": harness.copying(call.bytes, call.sets),
            "product": harness.multiplying(call.flops, DTYPE),
        },
        [truth],
        TOLERANCE,
        checked,
    )


def backward(which: int | str, heads: int, head_dim: int) -> Work:
    call = Call(which, heads, head_dim, 8)
    found, absent = forms(call)

    def implementation(form: Form) -> harness.Call:
        into, function, _ = form
        given = [[into(t).detach().requires_grad_() for t in tensors[:3]] for tensors in call.packed]
        grads = [into(tensors[3]).contiguous() for tensors in call.packed]
        return harness.differentiation(function, given, grads)

    implementations = {name: implementation(form) for name, form in found.items()}
    checked = {name: _then(found[name][2], run) for name, run in implementations.items()}
    leaves = [t.double().requires_grad_() for t in call.packed[0][:3]]
    out = reference.attention(*leaves, call.ragged, call.ragged, heads, call.scale)
    truth = torch.autograd.grad(out, leaves, call.packed[0][3].double())
    flops = 5 * call.flops // 2
    return Work(
        f"attention backward {which} {heads}x{head_dim} {str(DTYPE).removeprefix('torch.')}",
        implementations,
        call.bytes,
        flops,
        call.sets,
        absent,
        {"copy": harness.copying(call.bytes, call.sets), "product": harness.multiplying(flops, DTYPE)},
        truth,
        TOLERANCE,
        checked,
    )


def _then(rows: Callable[[Tensor], Tensor], run: harness.Call) -> harness.Call:
    def both(place: int) -> Any:
        found: Any = run(place)
        return rows(found) if isinstance(found, Tensor) else [rows(t) for t in found]

    return both


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("which, heads, head_dim", SHAPES)
def test_forward(report, which, heads, head_dim, implementation):
    report(forward, (which, heads, head_dim), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("which, heads, head_dim", SHAPES)
def test_backward(report, which, heads, head_dim, implementation):
    report(backward, (which, heads, head_dim), implementation)
