"""linear: oneDNN's product and its gradients against float64, when it is taken, packed weights."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.bfloat16 import NEEDS_BFLOAT16, PACKED_DTYPES
from helpers.cases import BF16, FP16, FP32, allowed, error
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgate.errors import Unsupported
from fastgate.ops import backends, onednn_shapes
from fastgate.ops.linear import Packed, linear, missing_for_onednn, onednn_product, onednn_supports, pack

pytestmark = pytest.mark.slow

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
    if onednn_supports(x, weight):
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
def test_what_onednn_onednn_supports():
    x, weight, _ = make(4, 8, 6, FP32)
    assert onednn_supports(x, weight) and onednn_supports(x, torch.nn.Parameter(weight))
    bfloat16 = onednn_supports(x.bfloat16(), weight.bfloat16())
    assert bfloat16 == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert not onednn_supports(x.double(), weight.double()) and not onednn_supports(x.bfloat16(), weight)
    assert not onednn_supports(x, torch.nn.Buffer(weight).as_subclass(type("Own", (torch.Tensor,), {})))
    with torch.autocast("cpu"):
        assert not onednn_supports(x, weight) and torch.equal(linear(x, weight), F.linear(x, weight))


@ONEDNN
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 6)], ids=["none", "bias"])
def test_product_adds_the_bias_and_the_gelu(bias):
    x, weight, _ = make(4, 8, 6, FP32)
    want = F.linear(x, weight, bias)
    torch.testing.assert_close(onednn_product(x, weight, bias), want)
    torch.testing.assert_close(onednn_product(x, weight, bias, gelu=True), F.gelu(want))


@ONEDNN
def test_the_same_bits_at_every_call():
    x, weight, _ = make(130, 96, 70, FP32)
    first = linear(x, weight)
    assert all(torch.equal(linear(x, weight), first) for _ in range(20))


FORMS = {"panels": backends.load_cpu_library(), "oneDNN": missing_for_onednn()}
WIDTHS = (1, 3, 31, 32, 33, 64, 70, 96)


@pytest.fixture(params=[form for form, missing in FORMS.items() if not missing])
def form(request, monkeypatch):
    """The layout that `pack` gives float32 weights."""
    linear(torch.zeros(1, 1), torch.zeros(1, 1))
    if request.param == "oneDNN":
        monkeypatch.setattr(sys.modules["fastgate.ops.linear"], "PACKED_LINEAR", "absent")
    return request.param


@pytest.mark.parametrize("gelu", [False, True], ids=["", "gelu"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", [0, 1, 7, 200, 400])
def test_packed_weights_are_as_exact_as_torch(form, rows, biased, gelu, poisoned):
    """Depths beyond a block's, widths beside a panel's, rows beyond a block's."""
    for width in WIDTHS:
        for depth in (1, 17, 770):
            x, weight, _ = make(rows, depth, width, FP32, seed=width)
            bias = torch.linspace(-1, 1, width) if biased else None
            packed = pack(weight)
            assert packed.data.is_mkldnn == (form == "oneDNN") and torch.equal(packed.dense(), weight)

            def eager(x, weight, bias, gelu=gelu):
                y = F.linear(x, weight, bias)
                return F.gelu(y) if gelu else y

            truth = eager(x.double(), weight.double(), None if bias is None else bias.double())
            bound = allowed(eager(x, weight, bias), truth, FP32, max(1.0, depth**0.5 / 2)) + 4e-7
            y = packed.product(x, bias, gelu)
            assert y.shape == (rows, width) and error(y, truth) <= bound


@pytest.mark.skipif(FORMS["panels"] != "", reason=FORMS["panels"])
@pytest.mark.parametrize("gelu", [False, True], ids=["", "gelu"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 200, 700])
def test_packed_pairs_are_as_exact_as_torch(rows, biased, gelu, poisoned):
    """Rows beside a tile's, beside those finished at once, beyond a block's; odd depths go to oneDNN,
    multiples of 32 to Intel's tiles (AMX) where there are any."""
    if not torch.ops.fastgate_cpu.packs_bfloat16():
        pytest.skip("no AVX512-BF16")
    for width in WIDTHS:
        for depth in (2, 17, 34, 96, 770, 768):
            x, weight, _ = make(rows, depth, width, BF16, seed=width)
            bias = torch.linspace(-1, 1, width).to(BF16) if biased else None
            packed = pack(weight)
            assert packed.in_panels == (depth % 2 == 0) and torch.equal(packed.dense(), weight)
            y = packed.product(x, bias, gelu)
            truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
            own = F.linear(x, weight, bias)
            truth, own = (F.gelu(truth), F.gelu(own)) if gelu else (truth, own)
            assert y.dtype == BF16 and y.shape == (rows, width)
            assert error(y, truth) <= allowed(own, truth, BF16)


@NEEDS_BFLOAT16
@pytest.mark.parametrize("depth", [96, 98])
def test_bits_of_packed_bfloat16_do_not_depend_on_the_rows_beside(depth, poisoned):
    x, weight, _ = make(130, depth, 270, BF16)
    packed = pack(weight)
    whole = packed.product(x, gelu=True)
    if packed.in_panels:
        for first in (70, 113, 125, 129):  # 60, 17, 5 rows and one
            assert torch.equal(packed.product(x[first:], gelu=True), whole[first:])


@pytest.mark.skipif(FORMS["panels"] != "", reason=FORMS["panels"])
@pytest.mark.parametrize("dtype", PACKED_DTYPES, ids=["float32", "bfloat16"])
def test_the_gelu_is_exact_to_4e_7_and_lets_what_is_no_number_through(dtype):
    """Of numbers that a product with the identity leaves as they are."""
    ends = torch.tensor([0.0, -0.0, 1e-20, -80.0, 80.0, 3e38])
    x = torch.cat([torch.linspace(-9, 9, 180_001), ends]).to(dtype)
    x = F.pad(x, (0, -len(x) % 32)).view(-1, 32)
    packed = pack(torch.eye(32, dtype=dtype))
    if not packed.in_panels:
        pytest.skip("no AVX512-BF16")
    y, truth = packed.product(x, gelu=True), F.gelu(x.double())
    rounding = 0.0 if dtype == FP32 else 2**-8
    assert bool(((y.double() - truth).abs() <= 4e-7 + (6e-8 + rounding) * truth.abs()).all())
    assert packed.product(torch.zeros(1, 32, dtype=dtype), gelu=True).eq(0).all()
    odd = torch.full((1, 32), float("nan"), dtype=dtype)
    assert packed.product(odd, gelu=True).isnan().all()


@NEEDS_BFLOAT16
def test_bits_of_packed_bfloat16_are_the_same_for_any_threads():
    x, weight, _ = make(130, 96, 270, BF16)
    packed, threads = pack(weight), torch.get_num_threads()
    whole = packed.product(x, gelu=True)
    try:
        torch.set_num_threads(1)
        assert torch.equal(packed.product(x, gelu=True), whole)
    finally:
        torch.set_num_threads(threads)


def test_packed_products_have_the_same_bits_for_any_threads(form):
    x, weight, _ = make(130, 96, 270, FP32)
    packed, threads = pack(weight), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 7) if form == "panels" else (1, 1):
            torch.set_num_threads(count)
            found.append(packed.product(x, gelu=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_packed_rows_may_be_strided_and_deep(form):
    x, weight, _ = make(6, 40, 33, FP32)
    packed, want = pack(weight), F.linear(x, weight)
    torch.testing.assert_close(packed.product(x.t().contiguous().t()), want)
    torch.testing.assert_close(packed.product(x.view(2, 3, 40)), want.view(2, 3, 33))


def test_a_packed_weight_is_a_copy_for_inference_only(form):
    x, weight, _ = make(4, 8, 6, FP32)
    packed, before = pack(weight), linear(x, weight)
    assert isinstance(packed, Packed)
    weight.zero_()
    torch.testing.assert_close(linear(x, packed), before)
    with pytest.raises(Unsupported, match=r"linear: weight: got a frozen one.*fastgate\.thaw"):
        linear(x.requires_grad_(), packed)
    with pytest.raises(Unsupported), torch.autocast("cpu"):
        linear(x.detach(), packed)
    with pytest.raises(Unsupported, match=r"of torch\.float32 for rows of torch\.float64"):
        linear(x.detach().double(), packed)


@pytest.mark.skipif(FORMS["panels"] != "", reason=FORMS["panels"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(2, 9)}, "shapes that do not fit"),
        ({"x": torch.zeros(2, 8).double()}, "another dtype"),
        ({"x": torch.zeros(2, 8).bfloat16()}, "another dtype"),
        ({"panels": torch.zeros(1, 4, 64).bfloat16()}, "another dtype"),
        ({"bias": torch.zeros(5)}, "shapes that do not fit"),
        ({"panels": torch.zeros(1, 32, 8).transpose(1, 2)}, "not contiguous"),
        ({"columns": 33}, "shapes that do not fit"),
        ({"columns": 0}, "shapes that do not fit"),
    ],
)
def test_the_compiled_product_refuses(change, match):
    given = {
        "x": torch.zeros(2, 8),
        "panels": torch.zeros(1, 8, 32),
        "bias": None,
        "columns": 6,
        "gelu": False,
    }
    with pytest.raises(RuntimeError, match=match):
        torch.ops.fastgate_cpu.packed_linear(*(given | change).values())


def test_compiling_sees_torchs_own():
    x, weight, _ = make(4, 8, 6, FP32)
    counted = torch.compile(linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(counted(x, weight), F.linear(x, weight))


@pytest.fixture
def in_pieces(monkeypatch):
    """As in a process that has compiled products for many numbers of rows."""
    monkeypatch.setattr(onednn_shapes, "MAX_EXACT_PRODUCTS", 0)
    monkeypatch.setattr(onednn_shapes, "_compiled", set())


@ONEDNN
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1100, 64, 96), (513, 5, 3)], ids=str)
def test_pieces_are_as_exact_as_torch(shape, dtype, poisoned, in_pieces):
    check(shape, dtype)


@ONEDNN
@pytest.mark.parametrize("dtype", PACKED_DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64, 65, 200, 511, 512, 513, 778, 1100])
def test_pieces_have_the_bits_of_the_whole(rows, dtype, monkeypatch, poisoned):
    """Of products, with a bias and the GELU too, and of both gradients.

    The gradient of a bfloat16 weight on AMX is the exception: oneDNN splits its sum by the number of rows.
    """
    x, weight, grad = make(rows, 96, 80, dtype)
    bias = torch.linspace(-1, 1, 80).to(dtype)
    found = []
    for exact in (10**9, 0):
        monkeypatch.setattr(onednn_shapes, "MAX_EXACT_PRODUCTS", exact)
        monkeypatch.setattr(onednn_shapes, "_compiled", set())
        gelu = onednn_product(x.view(1, rows, 96), weight, bias, gelu=True)
        assert gelu.shape == (1, rows, 80) and gelu.is_contiguous()
        assert gelu.untyped_storage().nbytes() == gelu.nbytes  # rows of zeros are not kept
        found.append((gelu, *gradients(linear, x, weight, grad)))
    *exact, (whole_weight, pieces_weight) = zip(*found, strict=True)
    for whole, pieces in exact:
        assert torch.equal(whole, pieces)
    if dtype == BF16 and torch.cpu._is_amx_tile_supported():
        torch.testing.assert_close(pieces_weight, whole_weight, rtol=2**-7, atol=1e-4)
    else:
        assert torch.equal(whole_weight, pieces_weight)


@given(rows=st.integers(2, 20_000))
def test_pieces_are_of_few_sizes_and_cover_all_rows(rows):
    rounded = onednn_shapes.round_up(rows)
    assert rows <= rounded <= max(rows + 3, 1.25 * rows) and rounded % 4 == 0
    assert len({onednn_shapes.round_up(n) for n in range(2, onednn_shapes.LARGEST_PIECE + 1)}) <= 24
    if rows > onednn_shapes.LARGEST_PIECE:
        pieces = list(onednn_shapes.pieces(rows))
        covered = {row for begin, end in pieces for row in range(begin, end)}
        assert covered == set(range(rows))
        sizes = {end - begin for begin, end in pieces}
        assert all(onednn_shapes.round_up(size) == size <= onednn_shapes.LARGEST_PIECE for size in sizes)


def test_the_first_products_are_compiled_as_they_are(monkeypatch):
    monkeypatch.setattr(onednn_shapes, "MAX_EXACT_PRODUCTS", 2)
    monkeypatch.setattr(onednn_shapes, "_compiled", set())
    assert [onednn_shapes.is_exact(n, 8) for n in (5, 6, 7, 5, 6)] == [True, True, False, True, True]
