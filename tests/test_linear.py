"""linear: oneDNN's product and its gradients against float64, when it is taken, packed weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, FP16, FP32, allowed, error
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgate.errors import Unsupported
from fastgate.ops.linear import linear, missing_for_onednn, pack, product, refuse_packed, takes

ONEDNN = pytest.mark.skipif(missing_for_onednn() != "", reason=f"no oneDNN: {missing_for_onednn()}")
SHAPES = ((0, 8, 16), (1, 384, 96), (3, 1, 1), (5, 7, 9), (33, 768, 130), (150, 40, 270))


def make(rows, depth, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, grad = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((rows, depth), (width, depth), (rows, width))
    )
    return x, weight / depth**0.5, grad


def gradients(function, x, weight, grad):
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def check(shape, dtype, seed=0):
    operands = make(*shape, dtype, seed)
    truth = gradients(F.linear, *(t.double() for t in operands))
    torchs, found = gradients(F.linear, *operands), gradients(linear, *operands)
    for terms, got, true, own in zip((shape[1], shape[2], shape[0]), found, truth, torchs, strict=True):
        assert got.dtype == dtype and got.shape == true.shape
        growth = max(1.0, terms**0.5 / 2) if dtype == FP32 else 1.0  # orders of summing differ by as much
        assert error(got, true) <= allowed(own, true, dtype, growth)
    x, weight, _ = operands
    if takes(x, weight):
        assert error(linear(x, pack(weight)), truth[0]) <= allowed(
            torchs[0], truth[0], dtype, max(1.0, shape[1] ** 0.5 / 2)
        )


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_exact_as_torch(shape, dtype, poisoned):
    check(shape, dtype)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 60), st.integers(1, 200), st.integers(1, 200)),
    dtype=st.sampled_from([FP32, BF16]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, dtype, seed):
    check(shape, dtype, seed)


def test_backward_passes_gradcheck():
    x, weight, _ = make(4, 5, 3, torch.float64)
    assert torch.autograd.gradcheck(linear, (x.requires_grad_(), weight.requires_grad_()))


@ONEDNN
def test_what_onednn_takes():
    x, weight, _ = make(4, 8, 6, FP32)
    assert (
        takes(x, weight) and takes(x, torch.nn.Parameter(weight)) and takes(x.bfloat16(), weight.bfloat16())
    )
    assert not takes(x.double(), weight.double()) and not takes(x.bfloat16(), weight)
    assert not takes(x, torch.nn.Buffer(weight).as_subclass(type("Own", (torch.Tensor,), {})))
    with torch.autocast("cpu"):
        assert not takes(x, weight) and torch.equal(linear(x, weight), F.linear(x, weight))


@ONEDNN
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 6)], ids=["none", "bias"])
def test_product_adds_the_bias_and_the_gelu(bias):
    x, weight, _ = make(4, 8, 6, FP32)
    for w in (weight, pack(weight)):
        torch.testing.assert_close(product(x, w, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(product(x, w, bias, gelu=True), F.gelu(F.linear(x, weight, bias)))


@ONEDNN
def test_the_same_bits_at_every_call():
    x, weight, _ = make(130, 96, 70, FP32)
    packed = pack(weight)
    first, packed_first = linear(x, weight), linear(x, packed)
    for _ in range(20):
        assert torch.equal(linear(x, weight), first) and torch.equal(linear(x, packed), packed_first)


@ONEDNN
def test_a_packed_weight_is_a_copy_for_inference_only():
    x, weight, _ = make(4, 8, 6, FP32)
    packed, before = pack(weight), linear(x, weight)
    assert torch.equal(packed.to_dense(), weight)
    weight.zero_()
    torch.testing.assert_close(linear(x, packed), before)
    with pytest.raises(Unsupported, match=r"linear: weight: got a frozen one.*fastgate\.thaw"):
        linear(x.requires_grad_(), packed)
    with pytest.raises(Unsupported), torch.autocast("cpu"):
        linear(x.detach(), packed)
    refuse_packed(weight)


def test_compiling_sees_torchs_own():
    x, weight, _ = make(4, 8, 6, FP32)
    counted = torch.compile(linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(counted(x, weight), F.linear(x, weight))
