"""shift_norm: every backend against float64; rows not linked, gradients, autograd, tracing, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.cases import FP16, FP32, SHAPES
from helpers.norm_cases import differentiable, double, gradients
from helpers.op_checks import assert_same_bits, backends_and_dtypes, check_compiles, check_inference
from helpers.shift_cases import (
    ALL,
    DTYPES,
    check,
    check_strangers,
    check_strides,
    check_unrequested,
    eager,
    make,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgate import ops
from fastgate.errors import ArgumentError
from fastgate.nn.replacement import make_replacement
from fastgate.ops import backends
from fastgate.ops.shift_norm import OPERANDS, PARAMETERS, shift_norm

pytestmark = pytest.mark.slow

BACKENDS = {found.backend: found for found in backends.implementations("shift_norm")}
LEAVES = ("x", *PARAMETERS)


@pytest.mark.parametrize("links", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "dtypes"), backends_and_dtypes(BACKENDS, DTYPES))
def test_backends_are_as_exact_as_torch(name, dtypes, shape, links, poisoned):
    *outer, hidden = shape.sizes
    check(BACKENDS[name], make(math.prod(outer), hidden, dtypes, links))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 131),
    hidden=st.one_of(st.integers(1, 40), st.integers(1, 8192).filter(lambda n: n & (n - 1) != 0)),
    dtypes=st.sampled_from(DTYPES[:4]),
    links=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_any_shape(name, rows, hidden, dtypes, links, seed):
    check(BACKENDS[name], make(rows, hidden, dtypes, links, seed))


def test_explicit_backward_passes_gradcheck():
    given = double(make(7, 5, DTYPES[0]))

    def function(*tensors):
        return torch.ops.fastgate.shift_norm(*{**given, **dict(zip(LEAVES, tensors, strict=True))}.values())

    assert torch.autograd.gradcheck(function, [given[name].requires_grad_() for name in LEAVES])


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_not_linked_stays_away(name):
    check_strangers(BACKENDS[name])


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_operands(name):
    check_strides(BACKENDS[name])


@pytest.mark.parametrize("names", [("x",), ("offset", "weight"), ("before", "norm_bias"), ()])
@pytest.mark.parametrize("name", BACKENDS)
def test_only_the_gradients_asked_for(name, names, poisoned):
    check_unrequested(BACKENDS[name], names)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_bits_do_not_depend_on_threads(name):
    """Large enough for seven threads to share."""
    given = make(2117, 96, DTYPES[0])
    grad = torch.randn(2117, 96)
    first = run(BACKENDS[name], given, grad)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert_same_bits(first, run(BACKENDS[name], given, grad))


def test_it_is_the_norm_of_a_replacement():
    given = make(31, 48, DTYPES[0])
    replacement = make_replacement("shift", 48)
    vectors = zip(("shift", "scale", "before", "after"), PARAMETERS, strict=False)  # as checkpoints name them
    replacement.load_state_dict({key: given[name] for key, name in vectors})
    u = given["x"] + replacement(given["x"], given["has_left_neighbour"])
    want = torch.nn.functional.layer_norm(u, (48,), given["weight"], given["norm_bias"], given["eps"])
    torch.testing.assert_close(shift_norm(**given), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_the_compiled_op_refuses_what_would_read_elsewhere(name):
    given = make(9, 24, DTYPES[0])
    backend, grad = BACKENDS[name], torch.randn(9, 24)
    wrong = {
        "x, (linked|has_left_neighbour): got other dtypes or shapes": dict(
            has_left_neighbour=given["has_left_neighbour"][:3]
        ),
        "x, (linked|has_left_neighbour): got other dtypes": dict(
            has_left_neighbour=given["has_left_neighbour"].int()
        ),
        "x, (linked|has_left_neighbour): got other": dict(x=given["x"].double()),
        "vectors: got 23 elements, wanted 24": dict(after=torch.randn(23)),
    }
    for message, changed in wrong.items():
        with pytest.raises(RuntimeError, match=f"shift_norm: {message}"):
            backend.forward(*{**given, **changed}.values())
    with pytest.raises(RuntimeError, match="shift_norm_backward: grad: got another shape or dtype"):
        backend.backward(grad[:3], *given.values(), ALL)


def public(given):
    return shift_norm(**given)


def test_public_function_trains_like_torch():
    given = make(39, 48, DTYPES[0])
    grad = torch.randn(39, 48, generator=torch.Generator().manual_seed(1))
    y, grads = gradients(public, given, grad)
    truth, true_grads = gradients(eager, given, grad)
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
    for name, true in true_grads.items():
        torch.testing.assert_close(grads[name], true, rtol=1e-4, atol=1e-4, msg=name)


def test_inference_calls_the_implementation_without_autograd():
    given = differentiable(make(3, 16, DTYPES[0]))
    check_inference(public, given)


@pytest.mark.parametrize("dtype", [FP16, torch.float64])
def test_other_precisions_run_the_reference(dtype):
    assert ops.implementation("shift_norm", "cpu", dtype).backend == "reference"
    check(ops.implementation("shift_norm", "cpu", dtype), make(9, 24, (dtype, dtype)))


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=str)
def test_opcheck(dtypes):
    given = make(5, 10, dtypes)
    grad = torch.randn(5, 10).to(dtypes[0])
    torch.library.opcheck(torch.ops.fastgate.shift_norm.default, tuple(differentiable(given).values()))
    torch.library.opcheck(torch.ops.fastgate.shift_norm_backward.default, (grad, *given.values(), ALL))


def test_compiles_whole():
    given = differentiable(make(6, 24, DTYPES[0]))
    leaves = [given[name] for name in LEAVES]

    def function(*tensors):
        return shift_norm(*tensors).sin()

    check_compiles(function, [given[name] for name in OPERANDS], leaves)


REFUSED = {
    "rows": (dict(x=torch.zeros(8)), "x, has_left_neighbour"),
    "links": (dict(has_left_neighbour=torch.zeros(4, dtype=torch.bool)), "x, has_left_neighbour"),
    "link dtype": (dict(has_left_neighbour=torch.zeros(3)), "x, has_left_neighbour"),
    "integers": (dict(x=torch.zeros(3, 8, dtype=torch.int64)), "x, has_left_neighbour"),
    "device": (dict(x=torch.zeros(3, 8, device="meta")), "x, has_left_neighbour, weight"),
    **{name: ({name: torch.zeros(7)}, name) for name in PARAMETERS},
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_the_argument_and_a_remedy(what):
    wrong, argument = REFUSED[what]
    given = make(3, 8, (FP32, FP32))
    with pytest.raises(ArgumentError, match=f"^shift_norm: {argument}: got .*, wanted .*; "):
        shift_norm(**{**given, **wrong})
