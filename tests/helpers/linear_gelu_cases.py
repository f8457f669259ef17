"""Calls of linear_gelu, their truth in float64, and what a backend must meet on them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from helpers.cases import BF16, FP16, FP32, allowed, error

from fastgate.ops.linear_gelu import DBIAS, DWEIGHT, DX

ALL = DX | DWEIGHT | DBIAS


class Case(NamedTuple):
    rows: tuple[int, ...]
    depth: int
    width: int
    reason: str

    def __str__(self):
        return f"{'x'.join(map(str, self.rows))}x{self.depth}to{self.width}"


CASES = (
    Case((0,), 8, 16, "no rows: nothing is attended"),
    Case((1,), 384, 96, "one row: batch 1 above the last kept attention; MiniLM's depth"),
    Case((3,), 1, 1, "one input, one output"),
    Case((5,), 7, 9, "odd everywhere: nothing is read 16 bytes at a time"),
    Case((2, 9), 768, 40, "a padded batch in three dimensions, BERT-base's depth"),
    Case((150,), 40, 270, "several tiles each way, the last ones short; a depth that no step divides"),
    Case((33,), 1024, 36, "BERT-large's depth; a width aligned to 8 bytes"),
    Case((65,), 64, 256, "whole steps and columns, one row more than a tile"),
    Case((70,), 130, 33, "rows of x aligned to 4 bytes, of y to 2"),
)
DTYPES = (FP32, BF16, FP16)


def make(case, dtype, seed=0, bias=True, bias_dtype=None):
    """x, weight, bias of unit pre-activations, so that both tails of the GELU are met."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((*case.rows, case.depth), generator=generator)
    weight = torch.randn((case.width, case.depth), generator=generator) * 1.5 / math.sqrt(case.depth)
    b = torch.randn(case.width, generator=generator)
    return x.to(dtype), weight.to(dtype), b.to(bias_dtype or dtype) if bias else None


def draw_grad(case, dtype, seed=1):
    shape = (*case.rows, case.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def eager(x, weight, bias):
    """What one would write in torch, in the operands' own precision."""
    return F.gelu(F.linear(x, weight, None if bias is None else bias.to(x.dtype)))


def gradients(function, operands, grad):
    """y, and the gradients of x, weight and bias, None where it is not given."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in operands]
    y = function(*leaves)
    found = torch.autograd.grad(y, [t for t in leaves if t is not None], grad.to(y.dtype))
    return y.detach(), [*found, None][:3]


def double(operands):
    return [None if t is None else t.double() for t in operands]


# Largest error of oneDNN's float32 GELU over (-8, 8), a polynomial's; torch's own is 1.2e-6 there.
ONEDNN_GELU = 4e-7


def growth(dtype, terms):
    """A float32 sum is rounded at every term, a random walk, and orders of summing differ by as much; sums of
    the half precisions are float32 too, and round once that shows."""
    return max(1.0, math.sqrt(terms) / 2) if dtype == FP32 else 1.0


def check_forward(backend, case, dtype, bias=True, seed=0, bias_dtype=None):
    """With and without v kept, against float64. Returns v."""
    operands = make(case, dtype, seed, bias, bias_dtype)
    truth, torchs = eager(*double(operands)), eager(*operands)
    y = backend.forward(*operands)
    assert y.shape == truth.shape and y.dtype == dtype
    bound = allowed(torchs, truth, dtype, growth(dtype, case.depth))
    if backend.backend == "onednn" and dtype == FP32:
        bound += ONEDNN_GELU
    assert error(y, truth) <= bound
    kept_y, v = backend.saving[0](*operands)
    assert v.shape == y.shape and v.dtype == dtype
    # oneDNN's GELU within the product is not the GELU of v to the last bit.
    assert error(kept_y, truth) <= bound if backend.backend == "onednn" else torch.equal(kept_y, y)
    return v


def check(backend, case, dtype, bias=True, seed=0, bias_dtype=None):
    """Forward, and backward from the v it kept and from none, against float64."""
    v = check_forward(backend, case, dtype, bias, seed, bias_dtype)
    operands, grad = make(case, dtype, seed, bias, bias_dtype), draw_grad(case, dtype)
    _, truth = gradients(eager, double(operands), grad.double())
    _, torchs = gradients(eager, operands, grad)
    rows = math.prod(case.rows)
    for kept in (None, v):
        found = backend.backward(grad, kept, *operands, ALL if bias else DX | DWEIGHT)
        for terms, got, true, torchs_own, operand in zip(
            (case.width, rows, rows), found, truth, torchs, operands, strict=True
        ):
            if operand is None:
                assert not got.numel()
                continue
            got = got.to(operand.dtype)
            assert got.shape == operand.shape
            assert error(got, true) <= allowed(torchs_own, true, got.dtype, growth(got.dtype, terms))
