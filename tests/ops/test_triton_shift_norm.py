"""shift_norm in Triton: exactness, rows not linked, repeatability; in the interpreter or on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import triton_device
from helpers.cases import SHAPES
from helpers.op_checks import assert_same_bits
from helpers.shift_cases import (
    ALL,
    DTYPES,
    check,
    check_strangers,
    check_strides,
    check_unrequested,
    make,
    run,
)
from helpers.triton_device import DEVICE, INTERPRETED, gpu_only, moved, turns
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgate import ops
from fastgate.ops import reference
from fastgate.ops.shift_norm import DX, OPERANDS, PARAMETER_BIT, PARAMETERS
from fastgate.ops.shift_norm import shift_norm as public_shift_norm

pytest.importorskip("triton", reason="triton is not installed")
from fastgate.kernels import shift_norm

pytestmark = [pytest.mark.slow, *triton_device.MARKS, pytest.mark.usefixtures("few_rows")]
BACKEND = triton_device.on_device(shift_norm)
COVER = [
    pytest.param(shape, DTYPES[turn], id=f"{shape}-{turn}")
    for place, shape in enumerate(SHAPES)
    for turn in turns(place, shape, DTYPES, largest=2000)
]


@pytest.mark.parametrize(("shape", "dtypes"), COVER)
def test_as_exact_as_torch(shape, dtypes, poisoned):
    *outer, hidden = shape.sizes
    check(BACKEND, make(math.prod(outer), hidden, dtypes))


@pytest.mark.parametrize("links", [0.0, 1.0])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_no_row_linked_and_all(dtypes, links, poisoned):
    check(BACKEND, make(11, 70, dtypes, links))


@settings(max_examples=4 if INTERPRETED else 60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 12 if INTERPRETED else 5000),
    hidden=st.integers(1, 300) if INTERPRETED else st.integers(1, 8192),
    dtypes=st.sampled_from(DTYPES),
    links=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows, hidden, dtypes, links, seed):
    check(BACKEND, make(rows if hidden < 1024 else rows // 16, hidden, dtypes, links, seed))


def test_what_is_not_linked_stays_away():
    check_strangers(BACKEND)


def test_strided_operands():
    check_strides(BACKEND)


@pytest.mark.parametrize("names", [("x",), ("offset", "weight"), ("before", "norm_bias"), ()])
def test_only_the_gradients_asked_for(names, poisoned):
    check_unrequested(BACKEND, names)


def test_unaligned_operands():
    """Tensors that begin between 16-byte boundaries give the same bits."""
    given = make(13, 48, DTYPES[1])
    grad = torch.randn(13, 48, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    operands = moved([given[name] for name in OPERANDS], DEVICE)
    triton_device.check_unaligned(shift_norm, operands, grad, ALL)


def test_bits_repeat():
    given = make(*((37, 40) if INTERPRETED else (4099, 384)), DTYPES[0])
    grad = torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(1))
    first = run(BACKEND, given, grad)
    for _ in range(1 if INTERPRETED else 100):
        assert_same_bits(first, run(BACKEND, given, grad))


@pytest.fixture
def launched():
    """A call on the device, and what it gives: (function, operands)."""
    given = make(700, 384, DTYPES[1])
    operands = moved([given[name] for name in OPERANDS], DEVICE)
    grad = torch.randn(700, 384, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)

    def call():
        return [shift_norm.forward(*operands), *shift_norm.backward(grad, *operands, ALL)]

    return call, operands


@gpu_only
def test_graph_replay_reads_the_operands_anew(launched):
    call, operands = launched
    x, has_left_neighbour, before = (
        operands[OPERANDS.index(name)] for name in ("x", "has_left_neighbour", "before")
    )

    def change():
        x.mul_(0.5)
        has_left_neighbour[5:].copy_(has_left_neighbour[5:].logical_not())
        before.add_(1)

    triton_device.check_replay(call, change)


@gpu_only
def test_another_stream_and_what_is_on_it(launched):
    call, operands = launched
    triton_device.check_stream(call, operands[OPERANDS.index("x")])


@gpu_only
def test_the_slot_is_filled_and_trains():
    assert ops.implementation("shift_norm", "cuda", torch.bfloat16).backend == "triton"
    given = make(50, 96, DTYPES[0])
    names = ("x", *PARAMETERS)
    twins = [given[name].requires_grad_() for name in names]
    leaves = [twin.detach().to(DEVICE).requires_grad_() for twin in twins]
    found = public_shift_norm(leaves[0], given["has_left_neighbour"].to(DEVICE), *leaves[1:], given["eps"])
    want = reference.shift_norm(twins[0], given["has_left_neighbour"], *twins[1:], given["eps"])
    torch.testing.assert_close(found.cpu(), want, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(found.square().sum(), leaves)
    for got, true in zip(grads, torch.autograd.grad(want.square().sum(), twins), strict=True):
        torch.testing.assert_close(got.cpu(), true, rtol=1e-3, atol=1e-3)


def test_gradients_have_the_schemas_bits():
    bits = [getattr(shift_norm, name.upper()) for name in PARAMETERS]
    assert [getattr(bit, "value", bit) for bit in bits] == list(PARAMETER_BIT.values())
    assert shift_norm.DX == DX
