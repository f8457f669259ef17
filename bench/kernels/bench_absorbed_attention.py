"""Times absorbed attention, forward and backward: `pytest bench/kernels/bench_absorbed_attention.py`.

`padded` is the same in plain torch on a padded grid. `formed` makes keys and values of all rows, as the usual
way does, and attends with one query a sequence by fastgate's packed attention.
"""

from __future__ import annotations

from typing import Any

import harness
import lengths
import pytest
import torch
from harness import DEVICE, ON_GPU, Work
from torch import Tensor
from torch.nn.functional import linear

from fastgate.ops import reference
from fastgate.ops.absorbed_attention import absorbed_attention
from fastgate.ops.attention import attention
from fastgate.ops.ragged import SequenceOffsets

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 3e-2 if ON_GPU else 1e-4
# (lengths, hidden, heads); a pair: so many sequences of that length.
MIXES = ((1, 32), (32, 25), (256, 128), *lengths.ROWS) if ON_GPU else ((1, 32), (32, 25), (8, 300))
SHAPES = [(which, hidden, heads) for which in MIXES for hidden, heads in ((384, 12), (768, 12), (1024, 16))]
IMPLEMENTATIONS = ("fastgate", "padded", "formed")


class Call:
    """q, x and the two weights in sets, and the implementations as functions of them."""

    def __init__(self, which: str | tuple[int, int], hidden: int, heads: int, matrices: int) -> None:
        counts = lengths.mix(which) if isinstance(which, str) else (which[1],) * which[0]
        self.keys, self.heads, self.hidden = SequenceOffsets(counts, DEVICE), heads, hidden
        self.queries = SequenceOffsets((1,) * len(counts), DEVICE)
        self.scale = (hidden // heads) ** -0.5
        rows, sequences = self.keys.rows, len(counts)
        self.flops = 4 * heads * hidden * rows + 4 * sequences * hidden * hidden
        self.bytes = (
            matrices * rows * hidden + 2 * hidden * hidden + 2 * sequences * hidden
        ) * DTYPE.itemsize
        self.sets = harness.sets_for(self.bytes)
        generator = torch.Generator(DEVICE).manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, device=DEVICE)).to(DTYPE)

        weights = [draw(hidden, hidden, scale=hidden**-0.5) for _ in range(2)]
        bias = draw(hidden)
        self.given = [[draw(sequences, hidden), draw(rows, hidden), *weights, bias] for _ in range(self.sets)]
        self.name = f"{which if isinstance(which, str) else '{}x{}'.format(*which)} {hidden}/{heads}"

    def fused(self, q: Tensor, x: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return absorbed_attention(q, x, key, value, bias, self.keys, self.heads, self.scale)

    def padded(self, q: Tensor, x: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        split = (self.heads, self.hidden // self.heads, -1)
        probe = torch.bmm(q.view(-1, *split[:2]).transpose(0, 1), key.view(split)).transpose(0, 1)
        mixed, _ = reference.absorbed_attention(probe, x, self.keys, self.scale)
        out = torch.bmm(mixed.transpose(0, 1), value.view(split).transpose(1, 2))
        return out.transpose(0, 1).reshape(q.shape) + bias

    def formed(self, q: Tensor, x: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        k, v = linear(x, key), linear(x, value, bias)
        return attention(q, k, v, self.queries, self.keys, self.heads, self.scale)

    def functions(self) -> dict[str, Any]:
        return {"fastgate": self.fused, "padded": self.padded, "formed": self.formed}


def forward(which: str | tuple[int, int], hidden: int, heads: int) -> Work:
    call = Call(which, hidden, heads, 1)
    return Work(
        f"absorbed_attention forward {call.name} {str(DTYPE).removeprefix('torch.')}",
        {name: harness.inference(function, call.given) for name, function in call.functions().items()},
        call.bytes,
        call.flops,
        call.sets,
        ceilings={"copy": harness.copying(call.bytes, call.sets)},
        truth=[call.padded(*(t.double() for t in call.given[0]))],
        tolerance=TOLERANCE,
    )


def backward(which: str | tuple[int, int], hidden: int, heads: int) -> Work:
    """Reads x once more and writes its gradient; the weights' gradients are written, too."""
    call = Call(which, hidden, heads, 2)
    grads = [torch.randn_like(tensors[0]) for tensors in call.given]
    leaves = [[t.requires_grad_() for t in tensors] for tensors in call.given]

    exact = [t.detach().double().requires_grad_() for t in call.given[0]]
    return Work(
        f"absorbed_attention backward {call.name} {str(DTYPE).removeprefix('torch.')}",
        {
            name: harness.differentiation(function, leaves, grads)
            for name, function in call.functions().items()
        },
        call.bytes,
        2 * call.flops,
        call.sets,
        ceilings={"copy": harness.copying(call.bytes, call.sets)},
        truth=torch.autograd.grad(call.padded(*exact), exact, grads[0].double()),
        tolerance=TOLERANCE,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("which, hidden, heads", SHAPES)
def test_forward(report, which, hidden, heads, implementation):
    report(forward, (which, hidden, heads), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("which, hidden, heads", SHAPES)
def test_backward(report, which, hidden, heads, implementation):
    report(backward, (which, hidden, heads), implementation)
