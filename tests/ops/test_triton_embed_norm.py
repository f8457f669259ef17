"""embed_norm in Triton: exactness, masks, repeatability, ids outside; in the interpreter or on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import triton_device
from helpers.cases import SHAPES
from helpers.embed_cases import (
    CALLS,
    DTYPES,
    POSITIONS,
    SEED,
    WORDS,
    check,
    check_masks,
    check_strides,
    check_unrequested,
    make,
    requested_bits,
    run,
)
from helpers.op_checks import assert_same_bits
from helpers.triton_device import DEVICE, INTERPRETED, gpu_only, moved, turns
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgate import ops
from fastgate.ops import reference
from fastgate.ops.embed_norm import BIT, OPERANDS, PARAMETERS
from fastgate.ops.embed_norm import embed_norm as public_embed_norm

pytest.importorskip("triton", reason="triton is not installed")
from fastgate.kernels import embed_norm

pytestmark = [pytest.mark.slow, *triton_device.MARKS, pytest.mark.usefixtures("few_rows")]
BACKEND = triton_device.on_device(embed_norm)
COVER = [
    pytest.param(shape, DTYPES[turn], list(CALLS)[(place + turn) % len(CALLS)], id=f"{shape}-{turn}")
    for place, shape in enumerate(SHAPES)
    for turn in turns(place, shape, DTYPES, largest=2000)
]


@pytest.mark.parametrize(("shape", "dtypes", "call"), COVER)
def test_as_exact_as_torch(shape, dtypes, call, poisoned):
    *outer, hidden = shape.sizes
    check(BACKEND, make(math.prod(outer), hidden, dtypes, call))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_every_call(call, dtypes, poisoned):
    check(BACKEND, make(11, 70, dtypes, call))


@settings(max_examples=4 if INTERPRETED else 60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 12 if INTERPRETED else 5000),
    hidden=st.integers(1, 300) if INTERPRETED else st.integers(1, 8192),
    dtypes=st.sampled_from(DTYPES),
    call=st.sampled_from(sorted(CALLS)),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows, hidden, dtypes, call, seed):
    check(BACKEND, make(rows if hidden < 1024 else rows // 16, hidden, dtypes, call, seed))


@pytest.mark.parametrize("hidden", [1, 6, 70 if INTERPRETED else 771])
@pytest.mark.parametrize("seed", [0, SEED, -3])
def test_masks_are_equal_forward_and_backward(seed, hidden):
    check_masks(BACKEND, seed, hidden)


def test_strided_operands():
    check_strides(BACKEND)


@pytest.mark.parametrize("names", [("word_table",), ("type_table", "weight"), ("norm_bias2",)])
def test_only_the_gradients_asked_for(names, poisoned):
    check_unrequested(BACKEND, names)


def test_unaligned_operands():
    """Tensors that begin between 16-byte boundaries give the same bits."""
    given = make(13, 48, DTYPES[1], "two norms and dropout")
    grad = torch.randn(13, 48, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    operands = moved([given[name] for name in OPERANDS], DEVICE)
    triton_device.check_unaligned(embed_norm, operands, grad, requested_bits(given))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("words", -1), ("words", WORDS), ("words", 2**40), ("positions", POSITIONS), ("types", 2)],
)
def test_ids_outside_a_table_show_as_nan_and_touch_nothing_else(name, wrong):
    given = make(9, 48, DTYPES[0], "two norms")
    bad = {**given, name: given[name].clone()}
    bad[name][4] = wrong
    grad = torch.randn(9, 48, generator=torch.Generator().manual_seed(1))
    (y, grads), (y_bad, grads_bad) = run(BACKEND, given, grad), run(BACKEND, bad, grad)
    others = torch.arange(9) != 4
    assert y_bad[4].isnan().all() and torch.equal(y_bad[others], y[others])
    assert grads_bad["weight"].isnan().all()
    table, ids = {
        "words": ("word_table", bad["words"]),
        "positions": ("position_table", bad["positions"]),
    }.get(name, ("word_table", bad["words"]))
    edge = ids.clamp(0, len(given[table]) - 1)[4]
    rows = torch.arange(len(given[table])) != edge
    rows[given[name if name != "types" else "words"][4]] = False  # it lost the row that went astray
    assert grads_bad[table][edge].isnan().all()
    assert torch.equal(grads_bad[table][rows], grads[table][rows])


def test_dropout_needs_a_seed():
    given = make(3, 8, DTYPES[0], "dropout")
    with pytest.raises(ValueError, match=r"embed_norm: seed: got None, wanted .*; pass a seed"):
        BACKEND.forward(*{**given, "seed": None}.values())


@pytest.mark.parametrize("call", ["plain", "two norms and dropout"])
def test_bits_repeat(call):
    given = make(*((37, 40) if INTERPRETED else (4099, 384)), DTYPES[0], call)
    grad = torch.randn(
        (len(given["words"]), len(given["weight"])), generator=torch.Generator().manual_seed(1)
    )
    first = run(BACKEND, given, grad)
    for _ in range(1 if INTERPRETED else 100):
        assert_same_bits(first, run(BACKEND, given, grad))


@pytest.fixture(params=[700, 5000])  # below and above the number of ids from which torch sorts them
def launched(request):
    """A call on the device, and what it gives: (function, operands)."""
    given = make(request.param, 384, DTYPES[1], "two norms and dropout")
    operands = moved([given[name] for name in OPERANDS], DEVICE)
    grad = torch.randn(request.param, 384, generator=torch.Generator().manual_seed(1)).to(
        DEVICE, torch.bfloat16
    )

    def call():
        backward = embed_norm.backward(grad, *operands, requested_bits(given))
        return [embed_norm.forward(*operands), *backward]

    return call, operands


@gpu_only
def test_graph_replay_reads_the_operands_anew(launched):
    call, operands = launched
    words, table, seed = (operands[OPERANDS.index(name)] for name in ("words", "word_table", "seed"))

    def change():
        words.copy_(words.roll(1))
        table.mul_(0.5)
        seed.add_(1)

    triton_device.check_replay(call, change)


@gpu_only
def test_another_stream_and_what_is_on_it(launched):
    call, operands = launched
    triton_device.check_stream(call, operands[OPERANDS.index("words")])


@gpu_only
def test_the_slot_is_filled_and_trains():
    assert ops.implementation("embed_norm", "cuda", torch.bfloat16).backend == "triton"
    given = make(50, 96, DTYPES[0], "two norms")
    ids = [given[name] for name in ("words", "positions", "types")]
    twins = [given[name].requires_grad_() for name in BIT]
    leaves = [twin.detach().to(DEVICE).requires_grad_() for twin in twins]
    found, want = (
        function(
            *[one.to(vectors[0].device) for one in ids], *vectors[:5], given["eps"],
            weight2=vectors[5], norm_bias2=vectors[6], eps2=given["eps2"],
        )
        for function, vectors in ((public_embed_norm, leaves), (reference.embed_norm, twins))
    )  # fmt: skip
    torch.testing.assert_close(found.cpu(), want, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(found.square().sum(), leaves)
    for got, true in zip(grads, torch.autograd.grad(want.square().sum(), twins), strict=True):
        torch.testing.assert_close(got.cpu(), true, rtol=1e-3, atol=1e-3)


def test_gradients_have_the_schemas_bits():
    bits = {name: getattr(embed_norm, name.upper()).value for name in PARAMETERS}
    assert bits == {name: BIT[name] for name in PARAMETERS} and embed_norm.BIT is BIT
