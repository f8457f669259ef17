"""Times linear_gelu, forward and backward, against torch: `pytest bench/kernels/bench_linear_gelu.py`.

`fused` is one kernel, `cublas` a library's product and one kernel after it: fastgate takes one of the two.
The ceiling is the library's product alone at the same shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import kernel_baselines
import pytest
import torch
from harness import DEVICE, ON_GPU, Work
from torch import Tensor
from torch.nn.functional import gelu, linear

from fastgate.ops.linear_gelu import linear_gelu

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 3e-2 if ON_GPU else 1e-5
ROWS = (512, 4096, 32768, 131072) if ON_GPU else (32, 800)
HIDDEN = (384, 768, 1024)
FORMS = ("fused", "cublas")
IMPLEMENTATIONS = ("fastgate", *FORMS, "eager", "compile")


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gelu(linear(x, weight, bias))


def operands(rows: int, hidden: int, sets: int) -> list[list[Tensor]]:
    """(x, weight, bias) of each set; the weight is the same in all, as it is in a step's micro-batches."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=DEVICE)).to(DTYPE)

    weight, bias = draw(4 * hidden, hidden, scale=hidden**-0.5), draw(4 * hidden)
    return [[draw(rows, hidden), weight, bias] for _ in range(sets)]


def forward(rows: int, hidden: int) -> Work:
    elements = rows * hidden + 4 * hidden * hidden + 4 * rows * hidden
    sets = harness.sets_for(elements * DTYPE.itemsize)
    given = operands(rows, hidden, sets)
    found, absent = kernel_baselines.with_compiled({"fastgate": linear_gelu, "eager": eager}, eager)
    module, reason = kernel_baselines.triton_kernels("linear_gelu")
    for form in FORMS:
        if module is None:
            absent[form] = reason
        else:
            found[form] = _y(getattr(module, f"forward_{form}"))

    return Work(
        f"linear_gelu forward {rows}x{hidden} {str(DTYPE).removeprefix('torch.')}",
        {name: harness.inference(function, given) for name, function in found.items()},
        elements * DTYPE.itemsize,
        8 * rows * hidden * hidden,
        sets,
        absent,
        {
            "copy": harness.copying(elements * DTYPE.itemsize, sets),
            "product": lambda place: linear(given[place][0], given[place][1]),
        },
        [eager(*(t.double() for t in given[0]))],
        TOLERANCE,
    )


def _y(form: Callable[..., Any]) -> Callable[..., Tensor]:
    """The first of a form's results: it can give what backward wants, too."""
    return lambda *operands: form(*operands)[0]


def backward(rows: int, hidden: int) -> Work:
    """Reads dy, u, x and the weight, writes du and reads it twice, and writes dx, dW and db."""
    elements = (2 + 3) * 4 * rows * hidden + 2 * rows * hidden + 2 * 4 * hidden * hidden
    sets = harness.sets_for(elements * DTYPE.itemsize)
    given = [[t.requires_grad_() for t in tensors] for tensors in operands(rows, hidden, sets)]
    grads = [torch.randn(rows, 4 * hidden, device=DEVICE).to(DTYPE) for _ in given]
    found, absent = kernel_baselines.with_compiled({"fastgate": linear_gelu, "eager": eager}, eager)
    absent |= dict.fromkeys(FORMS, "forms of the forward only")

    def products(place: int) -> Any:
        x, weight, _ = given[place]
        with torch.no_grad():
            return grads[place] @ weight, grads[place].t() @ x

    leaves = [t.detach().double().requires_grad_() for t in given[0]]
    return Work(
        f"linear_gelu backward {rows}x{hidden} {str(DTYPE).removeprefix('torch.')}",
        {name: harness.differentiation(function, given, grads) for name, function in found.items()},
        elements * DTYPE.itemsize,
        16 * rows * hidden * hidden,
        sets,
        absent,
        {"copy": harness.copying(elements * DTYPE.itemsize, sets), "product": products},
        torch.autograd.grad(eager(*leaves), leaves, grads[0].double()),
        TOLERANCE,
    )


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
