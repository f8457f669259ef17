"""Times shift_norm, forward and backward, against torch: `pytest bench/kernels/bench_shift_norm.py`.

Sentences of 25 tokens; the first of each is not linked to the row above.
"""

from __future__ import annotations

import harness
import kernel_baselines
import pytest
import torch
from harness import DEVICE, ON_GPU, Work
from torch import Tensor
from torch.nn.functional import layer_norm

from fastgate.ops.shift_norm import shift_norm

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 3e-2 if ON_GPU else 1e-4
ROWS = (512, 4096, 32768, 131072) if ON_GPU else (32, 800)
HIDDEN = (384, 768, 1024)
LENGTH = 25
EPS = 1e-12
IMPLEMENTATIONS = ("fastgate", "eager", "compile")


def fused(*operands: Tensor) -> Tensor:
    return shift_norm(*operands, EPS)


def eager(x, linked, shift, scale, before, after, weight, norm_bias):
    u = torch.addcmul(x + shift, scale, x)
    u = torch.addcmul(u, before, torch.where(linked[:, None], x.roll(1, 0), 0.0))
    u = torch.addcmul(u, after, torch.where(linked.roll(-1)[:, None], x.roll(-1, 0), 0.0))
    return layer_norm(u, weight.shape, weight, norm_bias, EPS)


def operands(rows: int, hidden: int, sets: int) -> list[list[Tensor]]:
    """(x, linked, six vectors); the vectors are the same in all sets."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(DTYPE)

    vectors = [draw(hidden) for _ in range(6)]
    linked = torch.arange(rows, device=DEVICE) % LENGTH != 0
    return [[draw(rows, hidden), linked, *vectors] for _ in range(sets)]


def forward(rows: int, hidden: int) -> Work:
    """x read once and y written; the rows beside come out of the cache."""
    size = 2 * rows * hidden * DTYPE.itemsize
    given = operands(rows, hidden, harness.sets_for(size))
    group = f"shift_norm forward {rows}x{hidden} {str(DTYPE).removeprefix('torch.')}"
    return kernel_baselines.inference_work(group, fused, eager, given, size, TOLERANCE)


def backward(rows: int, hidden: int) -> Work:
    """dy and x read, dx written; what a second kernel for dx costs is ours to pay."""
    size = 3 * rows * hidden * DTYPE.itemsize
    given = operands(rows, hidden, harness.sets_for(size))
    grads = [torch.randn(rows, hidden, device=DEVICE).to(DTYPE) for _ in given]
    group = f"shift_norm backward {rows}x{hidden} {str(DTYPE).removeprefix('torch.')}"
    return kernel_baselines.differentiation_work(group, fused, eager, given, grads, size, TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("rows", ROWS)
def test_forward(report, rows, hidden, implementation):
    report(forward, (rows, hidden), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("rows", ROWS)
def test_backward(report, rows, hidden, implementation):
    report(backward, (rows, hidden), implementation)
