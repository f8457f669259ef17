"""gated_add_norm: every backend against float64; gradients, dropout masks, determinism, odd operands."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import DTYPES, SHAPES, Dtypes
from helpers.norm_cases import CALLS, SEED, check, check_masks, check_strides, double, make, run
from helpers.op_checks import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgate import ops
from fastgate.ops import backends, reference
from fastgate.ops.gated_add_norm import gated_add_norm

pytestmark = pytest.mark.slow

BACKENDS = {found.backend: found for found in backends.implementations("gated_add_norm")}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        pytest.param(name, dtypes, id=f"{name}-{dtypes}")
        for name, backend in BACKENDS.items()
        for dtypes in DTYPES
        if {dtypes.x, dtypes.residual} <= backend.dtypes
    ],
)
def test_backends_are_as_exact_as_torch(name, dtypes, shape, call, poisoned):
    check(BACKENDS[name], make(shape.sizes, dtypes, call))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_run_the_reference(dtype):
    assert ops.implementation("gated_add_norm", "cpu", dtype, torch.float32).backend == "reference"
    x, vector = torch.randn(3, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    y = gated_add_norm(x, x, vector, vector, 1e-5)
    assert torch.equal(y, reference.gated_add_norm(x, x, vector, vector, 1e-5))
    if "cpp" in BACKENDS:
        with pytest.raises(
            RuntimeError, match="gated_add_norm: x: got another dtype, wanted float32 or bfloat16"
        ):
            BACKENDS["cpp"].forward(*make((3, 8), Dtypes(dtype, dtype, dtype, ""), "plain").values())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.one_of(st.sampled_from([0, 1]), st.integers(1, 20).map(lambda n: 2 * n + 1)),
    # Not 2: LayerNorm makes +1 and -1 of any two values, so its gradients are rests of terms that cancel.
    hidden=st.one_of(
        st.integers(1, 40).filter(lambda n: n != 2), st.integers(1, 8192).filter(lambda n: n & (n - 1) != 0)
    ),
    dtypes=st.sampled_from(DTYPES[:3]),
    call=st.sampled_from(sorted(CALLS)),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_any_shape(name, rows, hidden, dtypes, call, seed):
    check(BACKENDS[name], make((rows, hidden), dtypes, call, seed))


@pytest.mark.parametrize("call", CALLS)
def test_explicit_backward_passes_gradcheck(call):
    given = double(make((5, 6), DTYPES[0], call))
    names = [name for name, value in given.items() if isinstance(value, torch.Tensor) and name != "seed"]

    def function(*tensors):
        operands = {**given, **dict(zip(names, tensors, strict=True))}
        return torch.ops.fastgate.gated_add_norm(*operands.values())

    assert torch.autograd.gradcheck(function, [given[name].requires_grad_() for name in names])


def test_philox_gives_the_published_numbers():
    """Known answers of Random123: all bits clear, all bits set."""
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    clear = reference.philox(zero, (zero,) * 4)
    assert [int(w) for w in clear] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    full = reference.philox(torch.tensor(-1), (ones,) * 4)
    assert [int(w) for w in full] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_mask_keeps_the_right_share(dropout_p):
    mask = reference.keep_mask(torch.tensor(SEED), 200, 203, dropout_p)
    spread = (dropout_p * (1 - dropout_p) / mask.numel()) ** 0.5
    assert abs(mask.double().mean() - (1 - dropout_p)) < 4 * spread
    assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize("hidden", [1, 6, 384, 771])
@pytest.mark.parametrize("seed", [0, SEED, -3])
@pytest.mark.parametrize("name", BACKENDS)
def test_masks_are_equal_forward_and_backward_in_every_backend(name, seed, hidden):
    check_masks(BACKENDS[name], seed, hidden)


def test_dropout_follows_the_default_generator():
    given = make((4, 64), DTYPES[0], "plain")
    positional = [given[name] for name in ("x", "residual", "weight", "norm_bias", "eps")]
    torch.manual_seed(11)
    first = gated_add_norm(*positional, dropout_p=0.5)
    second = gated_add_norm(*positional, dropout_p=0.5)
    torch.manual_seed(11)
    again = gated_add_norm(*positional, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("call", ["bias", "everything", "two norms and dropout"])
@pytest.mark.parametrize("name", BACKENDS)
def test_bits_repeat(name, call):
    """The same bits at every call, and from memory that starts elsewhere."""
    given = make((131, 195), DTYPES[0], call)
    grad = torch.randn(131, 195, generator=torch.Generator().manual_seed(1))
    first = run(BACKENDS[name], given, grad)
    for offset in (0, 1, 5):
        moved = dict(given)
        for operand in ("x", "residual"):
            room = torch.empty(given[operand].numel() + offset)
            moved[operand] = room[offset:].view(131, 195).copy_(given[operand])
        assert_same_bits(first, run(BACKENDS[name], moved, grad))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the compiled library is not built")
def test_bits_do_not_depend_on_threads():
    given = make((1203, 130), DTYPES[0], "everything")
    grad = torch.randn(1203, 130, generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(1)
    first = run(BACKENDS["cpp"], given, grad)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(first, run(BACKENDS["cpp"], given, grad))


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_operands(name):
    check_strides(BACKENDS[name])
