"""Times gated_add_norm on the CPU against torch: `pytest bench/bench_gated_add_norm.py`.

Rows are MiniLM's and BERT-base's widths at a short batch, a batch of sentences and a batch of documents.
`norm` is torch's layer_norm alone, without what comes before it. extra_info holds the bytes that must move
(operands read once, results written once) and the rate.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import dropout, layer_norm

from fastgate.ops.gated_add_norm import gated_add_norm

EPS = 1e-12
SHAPES = [(32, 384), (300, 384), (4000, 384), (300, 768), (4000, 768)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def fused(x, residual, weight, norm_bias, bias, p=0.0):
    return gated_add_norm(x, residual, weight, norm_bias, EPS, bias=bias, dropout_p=p)


def eager(x, residual, weight, norm_bias, bias, p=0.0):
    return layer_norm(dropout(x + bias, p, training=True) + residual, weight.shape, weight, norm_bias, EPS)


def norm(x, residual, weight, norm_bias, bias, p=0.0):
    return layer_norm(x, weight.shape, weight, norm_bias, EPS)


def operands(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, shape, shape[1:], shape[1:], shape[1:])
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def record(benchmark, tensors, matrices):
    moved = matrices * tensors[0].numel() * tensors[0].element_size()
    benchmark.extra_info.update(bytes=moved, gb_per_s=round(moved / benchmark.stats["median"] / 1e9, 2))


def verify(tensors, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(fused(*tensors), eager(*tensors), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("function", [fused, eager, norm])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_forward(benchmark, threads, shape, dtype, function):
    tensors = operands(shape, DTYPES[dtype])
    verify(tensors, DTYPES[dtype])
    benchmark.group = f"forward {shape[0]}x{shape[1]} {dtype} {threads} thread"
    with torch.inference_mode():
        benchmark(function, *tensors)
    record(benchmark, tensors, 2 if function is norm else 3)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("function", [fused, eager])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_training_step(benchmark, threads, shape, dtype, function, dropout_p):
    tensors = operands(shape, DTYPES[dtype])
    verify(tensors, DTYPES[dtype])
    leaves = [tensor.requires_grad_() for tensor in tensors]
    grad = torch.ones(shape, dtype=DTYPES[dtype])
    benchmark.group = f"forward and backward {shape[0]}x{shape[1]} {dtype} p={dropout_p} {threads} thread"
    benchmark(lambda: torch.autograd.grad(function(*leaves, dropout_p), leaves, grad))
    record(benchmark, tensors, 7)
