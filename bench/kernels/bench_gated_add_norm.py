"""Times gated_add_norm against torch, both ways: `pytest bench/kernels/bench_gated_add_norm.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import kernel_baselines
import pytest
import torch
from harness import DEVICE, ON_GPU, Work
from torch import Tensor
from torch.nn.functional import dropout, layer_norm

from fastgate.ops.gated_add_norm import DRESIDUAL, DX, PARAMETER_BIT, gated_add_norm

EPS = 1e-12
ROWS = (512, 4096, 32768, 131072) if ON_GPU else (32, 300, 4000)
HIDDEN = (384, 768, 1024)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {"bf16": 3e-2, "fp32": 1e-5}  # eager rounds u to bf16 before the norm
IMPLEMENTATIONS = ("fastgate", "cuda", "triton", "eager", "compile", "liger")


def fused(x, residual, weight, norm_bias, bias, dropout_p):
    return gated_add_norm(x, residual, weight, norm_bias, EPS, bias=bias, dropout_p=dropout_p)


def eager(x, residual, weight, norm_bias, bias, dropout_p):
    return layer_norm(
        dropout(x + bias, dropout_p, training=True) + residual, weight.shape, weight, norm_bias, EPS
    )


def with_liger(norm, x, residual, weight, norm_bias, bias, dropout_p):
    return norm(dropout(x + bias, dropout_p, training=True) + residual, weight, norm_bias, EPS)


def operands(rows: int, hidden: int, dtype: str, sets: int) -> list[list[Tensor]]:
    """(x, residual, weight, norm_bias, bias) of each set; the vectors are the same in all."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(DTYPES[dtype])

    vectors = [draw(hidden) for _ in range(3)]
    return [[draw(rows, hidden), draw(rows, hidden), *vectors] for _ in range(sets)]


def functions() -> tuple[dict[str, Any], dict[str, str]]:
    """(those that run here, why the others do not), alike for forward and backward; the languages apart."""
    found, absent = {"fastgate": fused, "eager": eager}, {}
    for name, (function, reason) in {
        "compile": kernel_baselines.compiled(eager),
        "liger": kernel_baselines.liger("liger_layer_norm"),
    }.items():
        if function is None:
            absent[name] = reason
        else:
            found[name] = partial(with_liger, function) if name == "liger" else function
    return found, absent


def positional(tensors: list[Tensor], dropout_p: float, seed: Tensor | None) -> tuple[Any, ...]:
    """As the op's schema takes them."""
    x, residual, weight, norm_bias, bias = tensors
    return (x, residual, weight, norm_bias, EPS, bias, None, None, None, dropout_p, seed, None, None, 0.0)


def size_of(rows: int, hidden: int, dtype: str, matrices: int) -> int:
    return matrices * rows * hidden * DTYPES[dtype].itemsize


def forward(rows: int, hidden: int, dtype: str) -> Work:
    size = size_of(rows, hidden, dtype, 3)
    sets = harness.sets_for(size)
    given = operands(rows, hidden, dtype, sets)
    found, absent = functions()

    implementations = {
        name: harness.inference(function, [(*tensors, 0.0) for tensors in given])
        for name, function in found.items()
    }
    for language in kernel_baselines.GPU_LANGUAGES:
        implementation, reason = kernel_baselines.implementation("gated_add_norm", language)
        if implementation is None:
            absent[language] = reason
        else:
            implementations[language] = lambda place, run=implementation.forward: run(
                *positional(given[place], 0.0, None)
            )
    return Work(
        f"gated_add_norm forward {rows}x{hidden} {dtype}",
        implementations,
        size,
        sets=sets,
        absent=absent,
        ceilings={"copy": harness.copying(size, sets)},
        truth=[eager(*(t.double() for t in given[0]), 0.0)],
        tolerance=TOLERANCE[dtype],
    )


def backward(rows: int, hidden: int, dtype: str, dropout_p: float) -> Work:
    """With dropout the gradients of x and of the residual differ, and both are written."""
    size = size_of(rows, hidden, dtype, 5 if dropout_p else 4)
    sets = harness.sets_for(size)
    given = operands(rows, hidden, dtype, sets)
    grads = [torch.randn_like(tensors[0]) for tensors in given]
    found, absent = functions()

    leaves = [(*(t.detach().requires_grad_() for t in tensors), dropout_p) for tensors in given]
    implementations = {
        name: harness.differentiation(function, leaves, grads) for name, function in found.items()
    }
    wanted = sum(PARAMETER_BIT[name] for name in ("bias", "weight", "norm_bias")) | DRESIDUAL
    wanted |= DX if dropout_p else 0
    seed = torch.tensor(7, device=DEVICE) if dropout_p else None
    for language in kernel_baselines.GPU_LANGUAGES:
        implementation, reason = kernel_baselines.implementation("gated_add_norm", language)
        if implementation is None:
            absent[language] = reason
            continue

        def call(place: int, run: Any = implementation.backward) -> Any:
            dx, dresidual, rows = run(grads[place], *positional(given[place], dropout_p, seed), wanted)
            dbias, dweight, dnorm_bias = rows.unbind(0)
            return dx if dropout_p else dresidual, dresidual, dweight, dnorm_bias, dbias

        implementations[language] = call
    truth: list[Tensor] = []
    if not dropout_p:
        exact = [t.double().requires_grad_() for t in given[0]]
        truth = list(torch.autograd.grad(eager(*exact, 0.0), exact, grads[0].double()))
    return Work(
        f"gated_add_norm backward {rows}x{hidden} {dtype} p={dropout_p}",
        implementations,
        size,
        sets=sets,
        absent=absent,
        ceilings={"copy": harness.copying(size, sets)},
        truth=truth,
        tolerance=TOLERANCE[dtype],
    )


# float32 at one width.
SHAPES = [
    (rows, hidden, dtype)
    for dtype in DTYPES
    for hidden in HIDDEN
    for rows in ROWS
    if dtype == "bf16" or hidden == 768
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows, hidden, dtype", SHAPES)
def test_forward(report, rows, hidden, dtype, implementation):
    report(forward, (rows, hidden, dtype), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("rows, hidden, dtype", SHAPES)
def test_backward(report, rows, hidden, dtype, dropout_p, implementation):
    report(backward, (rows, hidden, dtype, dropout_p), implementation)


HOST_IMPLEMENTATIONS = {
    "fastgate": fused,
    "layer_norm": lambda x, r, w, n, b, p: layer_norm(x, w.shape, w, n, EPS),
}


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device: on the CPU a call is its own work")
@pytest.mark.parametrize("implementation", HOST_IMPLEMENTATIONS)
def test_host_time_of_a_call(benchmark, write_line, implementation):
    """What a call costs the host while the device is behind: the aim is at most twice F.layer_norm's."""
    (given,) = operands(64, 768, "bf16", 1)
    benchmark.group = "gated_add_norm host time of a call, inference"
    with torch.inference_mode():
        benchmark.extra_info.update(
            implementation=implementation,
            host_us=1e6 * harness.host_seconds(partial(HOST_IMPLEMENTATIONS[implementation], *given, 0.0)),
        )
        benchmark.pedantic(lambda: None)
    write_line(benchmark)
