"""linear_gelu in Triton: both forms, every tile, exactness, repeatability, odd operands."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import triton_device
from helpers.cases import BF16, FP16, FP32
from helpers.linear_gelu_cases import (
    ALL,
    CASES,
    DTYPES,
    Case,
    check,
    check_forward,
    draw_grad,
    eager,
    gradients,
    make,
)
from helpers.triton_device import DEVICE, INTERPRETED, gpu_only, moved, shifted
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from fastgate import ops
from fastgate.ops.linear_gelu import DBIAS, DWEIGHT, DX
from fastgate.ops.linear_gelu import linear_gelu as public_linear_gelu

pytest.importorskip("triton", reason="triton is not installed")
from fastgate.kernels import linear_gelu

pytestmark = [pytest.mark.slow, *triton_device.MARKS]
TILES = {f"{tile.rows}x{tile.columns}": tile for tile in linear_gelu.TILES}


@pytest.fixture
def form(request, monkeypatch):
    """One form of the forward, and for the fused one each of its tiles."""
    tile = TILES.get(request.param)
    monkeypatch.setattr(linear_gelu, "is_fused", lambda *_: tile is not None)
    if tile is not None:
        monkeypatch.setattr(
            linear_gelu, "tile_for", lambda *of: linear_gelu.FLOAT32_TILE if of[2] == FP32 else tile
        )
    return request.param


BACKEND = triton_device.on_device(linear_gelu)


@pytest.mark.parametrize("form", ["cublas", *TILES], indirect=True)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_torch(case, form, poisoned):
    """Backward is one for all forms; float32 has a tile of its own, and float16 is as bfloat16."""
    if form == "cublas":
        for dtype in DTYPES:
            check(BACKEND, case, dtype)
    else:
        for dtype in DTYPES if form == "64x64" else (BF16,):
            check_forward(BACKEND, case, dtype)


@pytest.mark.parametrize("form", ["cublas", "64x64"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_bias_and_with_a_float32_one(dtype, form, poisoned):
    check(BACKEND, CASES[3], dtype, bias=False)
    check(BACKEND, CASES[3], dtype, bias_dtype=FP32)


@settings(max_examples=6 if INTERPRETED else 60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 70 if INTERPRETED else 5000),
    depth=st.integers(1, 70) if INTERPRETED else st.integers(1, 4096),
    width=st.integers(1, 140) if INTERPRETED else st.integers(1, 4096),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows, depth, width, dtype, seed):
    check(BACKEND, Case((rows,), depth, width, ""), dtype, seed=seed)


def test_the_gelu_is_exact_in_float32():
    """y of a product with 1, all over both tails: closer to the truth than torch's own in float32."""
    v = torch.linspace(-9, 9, 40_001 if INTERPRETED else 2_000_001)
    y, _ = linear_gelu.forward_cublas(torch.ones(1, 1, device=DEVICE), v.to(DEVICE).unsqueeze(1), None)
    truth = v.double() * torch.from_numpy(ndtr(v.double().numpy()))
    error, torchs = ((t.cpu().double() - truth).abs() for t in (y[0], torch.nn.functional.gelu(v)))
    negative = v <= 0
    assert error[negative].max() <= min(8e-8, torchs[negative].max())
    assert (error[~negative] <= 1.5e-7 * truth[~negative].clamp(min=1.0)).all()


@pytest.mark.parametrize("form", ["cublas", "64x64"], indirect=True)
def test_infinities_and_nan_stay(form):
    x = torch.tensor([[math.inf], [-100.0], [math.nan], [0.0]], dtype=BF16)
    y = BACKEND.forward(x, torch.ones(3, 1, dtype=BF16), torch.zeros(3, dtype=BF16))
    assert (y[0] == math.inf).all() and (y[1].abs() < 1e-8).all()
    assert y[2].isnan().all() and (y[3] == 0.0).all()
    grad = torch.ones(4, 3, dtype=BF16)
    dx, _, _ = BACKEND.backward(grad, x.expand(4, 3).contiguous(), x, torch.ones(3, 1, dtype=BF16), None, DX)
    assert dx[0] == 3.0 and dx[1].abs() < 1e-8 and dx[2].isnan() and dx[3] == 1.5


@pytest.mark.parametrize("form", ["cublas", "64x128"], indirect=True)
def test_strided_and_unaligned_operands(form):
    """Rows that lie apart, columns that do, memory that begins between 16-byte boundaries.

    The values, not the bits: what is read in other pieces is added in another order."""
    case = Case((40,), 24, 48, "")
    operands, grad = make(case, BF16), draw_grad(case, BF16)
    operands = moved(operands, DEVICE)
    grad = grad.to(DEVICE)
    x, weight, bias = operands

    def apart(t, columns):
        wide = torch.full((t.shape[0], columns), math.nan, dtype=t.dtype, device=DEVICE)
        wide[:, : t.shape[1]] = t
        return wide[:, : t.shape[1]]

    y, v = linear_gelu.forward_saving(*operands)
    grads = linear_gelu.backward(grad, v, *operands, ALL)
    others = (
        (apart(x, 40), weight, bias),
        (apart(x, 29), apart(weight, 31), bias),
        (x.t().contiguous().t(), weight.t().contiguous().t(), bias.repeat_interleave(2)[::2]),
        tuple(map(shifted, operands)),
    )
    for other in others:
        for got, want in zip(linear_gelu.forward_saving(*other), (y, v), strict=True):
            assert got.is_contiguous() and torch.allclose(got, want, rtol=0.01, atol=0.01)
        found = linear_gelu.backward(shifted(grad), shifted(v), *other, ALL)
        assert all(torch.allclose(*pair, rtol=0.02, atol=0.02) for pair in zip(found, grads, strict=True))
        assert torch.allclose(found[2], grads[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bit", [DX, DWEIGHT, DBIAS])
def test_only_the_gradients_asked_for(bit, poisoned):
    case = CASES[5]
    operands, grad = moved(make(case, FP32), DEVICE), draw_grad(case, FP32).to(DEVICE)
    _, v = linear_gelu.forward_saving(*operands)
    full = linear_gelu.backward(grad, v, *operands, ALL)
    part = linear_gelu.backward(grad, v, *operands, bit)
    for place, (got, want) in enumerate(zip(part, full, strict=True)):
        assert torch.equal(got, want) if bit == 1 << place else not got.numel()


@pytest.mark.parametrize("form", ["cublas", "128x256"], indirect=True)
def test_bits_repeat(form):
    case = CASES[5] if INTERPRETED else Case((4099,), 384, 1536, "")
    operands, grad = moved(make(case, BF16), DEVICE), draw_grad(case, BF16).to(DEVICE)

    def call():
        y, v = linear_gelu.forward_saving(*operands)
        return [y, v, *linear_gelu.backward(grad, v, *operands, ALL)]

    first = call()
    for _ in range(1 if INTERPRETED else 100):
        assert all(torch.equal(one, other) for one, other in zip(first, call(), strict=True))


@pytest.mark.parametrize("rows", [1, 33, 200])
def test_sums_over_rows_are_of_every_row(rows, monkeypatch):
    """Few rows and many a program: far to the right gelu' is 1, and db counts the rows."""
    monkeypatch.setattr(linear_gelu, "LEAST_ROWS", 16)
    v = torch.full((rows, 300), 50.0, dtype=BF16, device=DEVICE)
    x, weight = (
        torch.zeros(rows, 2, dtype=BF16, device=DEVICE),
        torch.zeros(300, 2, dtype=BF16, device=DEVICE),
    )
    _, _, db = linear_gelu.backward(torch.ones_like(v), v, x, weight, None, DBIAS)
    assert (db == rows).all()


def test_choices():
    """Many rows take the widest tile where its memory is there; few take one that fills the device."""
    tile = linear_gelu.tile_for
    assert tile(65536, 3072, BF16, True, True) == linear_gelu.TILES[0]
    assert tile(65536, 3072, BF16, False, True) == linear_gelu.TILES[1]
    assert tile(65536, 3072, BF16, True, False) == linear_gelu.NARROW_TILE
    assert tile(32, 3072, BF16, True, True) == linear_gelu.TILES[-1]
    assert tile(65536, 3072, FP32, True, True) == linear_gelu.FLOAT32_TILE
    assert linear_gelu.is_fused(512, 768, BF16) and linear_gelu.is_fused(65536, 384, FP16)
    assert not linear_gelu.is_fused(65536, 768, BF16)
    assert not any(
        linear_gelu.is_fused(32, depth, dtype) for depth, dtype in ((768, FP32), (771, BF16), (0, BF16))
    )


@pytest.fixture
def launched():
    """A call on the device, and what it gives: (function, operands)."""
    case = Case((700,), 384, 1536, "")
    operands, grad = moved(make(case, BF16), DEVICE), draw_grad(case, BF16).to(DEVICE)

    def call():
        found = []
        for form in (linear_gelu.forward_fused, linear_gelu.forward_cublas):
            y, v = form(*operands, True)
            found += [y, v, *linear_gelu.backward(grad, v, *operands, ALL)]
        return found

    return call, operands


@gpu_only
def test_graph_replay_reads_the_operands_anew(launched):
    call, operands = launched
    triton_device.check_replay(call, lambda: operands[0].mul_(0.5))


@gpu_only
def test_another_stream_and_what_is_on_it(launched):
    call, operands = launched
    triton_device.check_stream(call, operands[0])


@gpu_only
@pytest.mark.parametrize("autocast", [False, True])
def test_the_slot_is_filled_and_trains(autocast):
    assert ops.implementation("linear_gelu", "cuda", BF16).backend == "triton"
    assert ops.implementation("linear_gelu", "cuda", torch.float64).backend == "reference"
    case = Case((4, 50), 96, 160, "")
    dtype = FP32 if autocast else BF16
    operands, grad = make(case, dtype), draw_grad(case, BF16)

    def on_device(*leaves):
        with torch.autocast("cuda", BF16, enabled=autocast):
            return public_linear_gelu(*moved(leaves, DEVICE)).cpu()

    y, grads = gradients(on_device, operands, grad)
    want, want_grads = gradients(eager, [t.to(BF16) for t in operands], grad)
    assert y.dtype == BF16
    for got, true, operand in zip([y, *grads], [want, *want_grads], [y, *operands], strict=True):
        assert got.dtype == operand.dtype
        torch.testing.assert_close(got.float(), true.float(), rtol=0.02, atol=0.02 * float(true.abs().max()))
