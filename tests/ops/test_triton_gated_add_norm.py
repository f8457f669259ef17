"""gated_add_norm in Triton: exactness, masks, repeatability, odd operands; in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from helpers import triton_device
from helpers.cases import DTYPES, SHAPES
from helpers.norm_cases import CALLS, SEED, check, check_masks, check_strides, make, requested_bits, run
from helpers.op_checks import assert_same_bits
from helpers.triton_device import DEVICE, INTERPRETED, gpu_only, moved, turns
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgate import ops
from fastgate.ops import reference
from fastgate.ops.gated_add_norm import DRESIDUAL, DX, OPERANDS, PARAMETER_BIT, PARAMETERS
from fastgate.ops.gated_add_norm import gated_add_norm as public_gated_add_norm

pytest.importorskip("triton", reason="triton is not installed")
from fastgate.kernels import dropout, gated_add_norm

pytestmark = [pytest.mark.slow, *triton_device.MARKS, pytest.mark.usefixtures("few_rows")]
BACKEND = triton_device.on_device(gated_add_norm)
COVER = [
    pytest.param(shape, DTYPES[turn], list(CALLS)[(place + turn) % len(CALLS)], id=f"{shape}-{DTYPES[turn]}")
    for place, shape in enumerate(SHAPES)
    for turn in turns(place, shape, DTYPES, largest=10_000)
]


@pytest.mark.parametrize(("shape", "dtypes", "call"), COVER)
def test_as_exact_as_torch(shape, dtypes, call, poisoned):
    check(BACKEND, make(shape.sizes, dtypes, call))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_every_call(call, dtypes, poisoned):
    check(BACKEND, make((11, 70), dtypes, call))


@settings(max_examples=4 if INTERPRETED else 60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 12 if INTERPRETED else 5000),
    hidden=st.integers(1, 300) if INTERPRETED else st.integers(1, 8192),
    dtypes=st.sampled_from(DTYPES),
    call=st.sampled_from(sorted(CALLS)),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows, hidden, dtypes, call, seed):
    check(BACKEND, make((rows if hidden < 1024 else rows // 16, hidden), dtypes, call, seed))


@pytest.mark.parametrize("hidden", [1, 6, 70 if INTERPRETED else 771])
@pytest.mark.parametrize("seed", [0, SEED, -3])
def test_masks_are_equal_forward_and_backward(seed, hidden):
    check_masks(BACKEND, seed, hidden)


@pytest.mark.parametrize("dropout_p", [0.0, 1e-9, 0.1, 0.5, 0.9, 1 - 1e-12])
def test_threshold_has_the_references_bits(dropout_p):
    assert dropout.threshold_argument(dropout_p) % 2**32 == reference.dropout_threshold(dropout_p)
    assert -(2**31) <= dropout.threshold_argument(dropout_p) < 2**31


def test_strided_operands():
    check_strides(BACKEND)


def test_unaligned_operands():
    """Tensors that begin between 16-byte boundaries give the same bits."""
    given = make((13, 48), DTYPES[1], "everything")
    grad = torch.randn(13, 48, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    operands = moved([given[name] for name in OPERANDS], DEVICE)
    triton_device.check_unaligned(gated_add_norm, operands, grad, requested_bits(given))


@pytest.mark.parametrize("names", [("x",), ("residual", "weight"), ("gate",), ("bias", "offset")])
def test_only_the_gradients_asked_for(names, poisoned):
    """The same bits as when all are asked for; the others have no elements."""
    given = make((40, 24), DTYPES[0], "everything")
    operands = moved([given[name] for name in OPERANDS], DEVICE)
    grad = torch.randn(40, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    bits = {"x": DX, "residual": DRESIDUAL, **PARAMETER_BIT}
    every = requested_bits(given)
    dx, dresidual, rows = gated_add_norm.backward(grad, *operands, every)
    asked = [name for name in PARAMETERS if every & bits[name]]
    full = {"x": dx, "residual": dresidual, **dict(zip(asked, rows, strict=True))}
    dx, dresidual, rows = gated_add_norm.backward(grad, *operands, sum(bits[name] for name in names))
    part = {"x": dx, "residual": dresidual}
    part.update(zip([name for name in PARAMETERS if name in names], rows, strict=True))
    for name, value in part.items():
        assert torch.equal(value, full[name]) if name in names else not value.numel()


def test_dropout_needs_a_seed():
    given = make((3, 8), DTYPES[0], "dropout")
    with pytest.raises(ValueError, match=r"gated_add_norm: seed: got None, wanted .*; pass a seed"):
        BACKEND.forward(*{**given, "seed": None}.values())


@pytest.mark.parametrize("call", ["bias", "everything", "two norms and dropout"])
def test_bits_repeat(call):
    given = make((37, 40) if INTERPRETED else (4099, 384), DTYPES[0], call)
    grad = torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(1))
    first = run(BACKEND, given, grad)
    for _ in range(1 if INTERPRETED else 100):
        assert_same_bits(first, run(BACKEND, given, grad))


@pytest.fixture
def launched():
    """A call on the device, and what it gives: (function, operands)."""
    given = make((700, 384), DTYPES[1], "everything")
    operands = moved([given[name] for name in OPERANDS], DEVICE)
    grad = torch.randn(700, 384, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)

    def call():
        backward = gated_add_norm.backward(grad, *operands, requested_bits(given))
        return [gated_add_norm.forward(*operands), *backward]

    return call, operands


@gpu_only
def test_graph_replay_reads_the_operands_anew(launched):
    call, operands = launched

    def change():
        operands[OPERANDS.index("x")].mul_(0.5)
        operands[OPERANDS.index("seed")].add_(1)

    triton_device.check_replay(call, change)


@gpu_only
def test_another_stream_and_what_is_on_it(launched):
    call, operands = launched
    triton_device.check_stream(call, operands[OPERANDS.index("x")])


@gpu_only
def test_the_slot_is_filled_and_trains():
    assert ops.implementation("gated_add_norm", "cuda", torch.bfloat16, torch.float32).backend == "triton"
    given = make((50, 96), DTYPES[0], "gate")
    leaves = {
        name: value.to(DEVICE).requires_grad_()
        for name, value in given.items()
        if isinstance(value, torch.Tensor)
    }
    positional = [leaves.pop(name) for name in ("x", "residual", "weight", "norm_bias")]
    y = public_gated_add_norm(*positional, given["eps"], **leaves)
    found = torch.autograd.grad(y.square().sum(), [*positional, *leaves.values()])
    twins = [leaf.detach().cpu().requires_grad_() for leaf in (*positional, *leaves.values())]
    keywords = dict(zip(leaves, twins[4:], strict=True))
    want = reference.gated_add_norm(*twins[:4], given["eps"], **keywords)
    torch.testing.assert_close(y.cpu(), want, rtol=1e-4, atol=1e-4)
    for got, true in zip(found, torch.autograd.grad(want.square().sum(), twins), strict=True):
        torch.testing.assert_close(got.cpu(), true, rtol=1e-3, atol=1e-3)


def test_parameters_have_the_schemas_bits():
    bits = {name: getattr(gated_add_norm, name.upper()).value for name in PARAMETERS}
    assert bits == PARAMETER_BIT
    assert (gated_add_norm.DX, gated_add_norm.DRESIDUAL) == (DX, DRESIDUAL)
