"""linear_gelu: the reference, the registered ops, autograd, autocast, compiling, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.linear_gelu_cases import (
    ALL,
    CASES,
    DTYPES,
    Case,
    check,
    double,
    draw_grad,
    eager,
    gradients,
    make,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgate import ops
from fastgate.errors import ArgumentError
from fastgate.ops import backends, reference, registry
from fastgate.ops.linear_gelu import DBIAS, DWEIGHT, DX, linear_gelu

pytestmark = pytest.mark.slow

BACKENDS = {found.backend: found for found in backends.implementations("linear_gelu")}
SMALL = Case((2, 3), 5, 7, "")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_backends_are_as_exact_as_torch(name, case, dtype, bias, poisoned):
    if dtype not in BACKENDS[name].dtypes:
        pytest.skip(f"{name} does not take {dtype}: the reference runs")
    check(BACKENDS[name], case, dtype, bias)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    depth=st.integers(1, 200),
    width=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_any_shape(name, rows, depth, width, dtype, seed):
    if dtype not in BACKENDS[name].dtypes:
        dtype = torch.float32
    check(BACKENDS[name], Case((rows,), depth, width, ""), dtype, seed=seed)


class Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *operands):
        ctx.save_for_backward(*operands)
        return reference.linear_gelu(*operands)

    @staticmethod
    def backward(ctx, grad):
        return reference.linear_gelu_backward(grad, *ctx.saved_tensors)


FORMS = {
    "reference": Reference.apply,
    "op": torch.ops.fastgate.linear_gelu,
    "saving op": lambda *operands: torch.ops.fastgate.linear_gelu_saving(*operands)[0],
    "public": linear_gelu,
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("form", FORMS)
def test_backward_passes_gradcheck(form, bias):
    operands = double(make(SMALL, torch.float32, bias=bias))
    leaves = [t.requires_grad_() for t in operands if t is not None]
    assert torch.autograd.gradcheck(lambda *t: FORMS[form](*t, *[None] * (3 - len(t))), leaves)


def test_the_reference_is_the_exact_gelu():
    operands = double(make(CASES[5], torch.float32))
    torch.testing.assert_close(reference.linear_gelu(*operands), eager(*operands), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("autocast", [False, True])
def test_on_the_cpu_it_is_what_torch_runs(autocast):
    """What F.linear and F.gelu give, forward and backward, and no more memory kept than theirs."""
    operands, grad = make(CASES[4], torch.float32), draw_grad(CASES[4], torch.float32)
    kept, found = [], []
    for function in (linear_gelu, eager):
        sizes = []

        def note(tensor, sizes=sizes):
            if tensor.shape != operands[2].shape:  # the bias is a parameter, which is there anyway
                sizes.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                leaves = [t.clone().requires_grad_() for t in operands]
                y = function(*leaves)
            assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
            found.append([y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))])
        kept.append(sorted(sizes))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0 if autocast else 1e-5, atol=0 if autocast else 1e-5)
    assert kept[0] == kept[1]


@pytest.fixture
def stood_in(monkeypatch):
    """Registers a CPU backend with a saving forward, in torch. Gives what was called, and with what."""
    registry.implementation("linear_gelu", "cpu")  # loads the registry before this one is entered
    called = []

    def forward(x, weight, bias):
        called.append(("forward", x.dtype, weight.dtype, bias.dtype))
        return reference.linear_gelu(x, weight, bias)

    def saving(x, weight, bias):
        called.append(("saving", x.dtype, weight.dtype, bias.dtype))
        return reference.linear_gelu(x, weight, bias), F.linear(x, weight, bias.to(x.dtype))

    def backward(grad, v, x, weight, bias, wanted):
        called.append(("backward", None if v is None else tuple(v.shape), wanted))
        return ops.REFERENCE["linear_gelu"].backward(grad, v, x, weight, bias, wanted)

    found = ops.Implementation(
        "stand-in", forward, backward, frozenset(registry.DTYPES), ops.Saving(saving, backward)
    )
    monkeypatch.setitem(registry.IMPLEMENTATIONS, ("linear_gelu", "cpu"), found)
    return called


def test_training_keeps_the_product_and_inference_nothing(stood_in):
    operands, grad = make(SMALL, torch.float32), draw_grad(SMALL, torch.float32)
    y, grads = gradients(linear_gelu, operands, grad)
    truth, true_grads = gradients(eager, operands, grad)
    for got, want in zip([y, *grads], [truth, *true_grads], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    fp32 = torch.float32
    assert stood_in == [("saving", fp32, fp32, fp32), ("backward", (2, 3, 7), ALL)]
    stood_in.clear()
    with torch.no_grad():
        assert torch.equal(linear_gelu(*[t.requires_grad_() for t in operands]), y)
    with torch.inference_mode():
        assert linear_gelu(*operands).grad_fn is None
    assert [name for name, *_ in stood_in] == ["forward", "forward"]


@pytest.mark.parametrize(("place", "bit"), enumerate((DX, DWEIGHT, DBIAS)))
def test_only_the_gradients_asked_for(place, bit, stood_in):
    operands, grad = make(SMALL, torch.float32), draw_grad(SMALL, torch.float32)
    operands[place].requires_grad_()
    (got,) = torch.autograd.grad(linear_gelu(*operands), operands[place], grad)
    assert stood_in[-1] == ("backward", (2, 3, 7), bit)
    _, want = gradients(eager, operands, grad)
    torch.testing.assert_close(got, want[place], rtol=1e-5, atol=1e-6)
    found = ops.REFERENCE["linear_gelu"].backward(grad, None, *[t.detach() for t in operands], bit)
    assert [bool(t.numel()) for t in found] == [i == place for i in range(3)]


@pytest.mark.parametrize("compiled", [False, True], ids=["direct", "compiled"])
def test_autocast_casts_x_and_weight(compiled, stood_in):
    """As F.linear's: the bias alone stays as it is, for a kernel adds it in float32."""
    operands, grad = make(SMALL, torch.float32), draw_grad(SMALL, torch.bfloat16)
    function = torch.compile(linear_gelu, fullgraph=True, backend="aot_eager") if compiled else linear_gelu

    def cast(*leaves):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*leaves)

    y, grads = gradients(cast, operands, grad)
    bf16 = torch.bfloat16
    assert ("saving", bf16, bf16, torch.float32) in stood_in and y.dtype == bf16
    assert all(grad.dtype == torch.float32 for grad in grads)
    truth, true_grads = gradients(eager, double(operands), grad)
    for got, want in zip([y, *grads], [truth, *true_grads], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert function(*operands).dtype == torch.float32


@pytest.mark.parametrize("op", ["linear_gelu", "linear_gelu_saving"])
def test_registered_ops_cast_too(op):
    """Called by themselves under autocast, with what the fake kernel says."""
    operands = make(SMALL, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = getattr(torch.ops.fastgate, op)(*operands)
    y = found if op == "linear_gelu" else found[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(y, eager(*operands), rtol=0.02, atol=1e-3)  # rounded once, not twice


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_opcheck(bias):
    operands = [None if t is None else t.requires_grad_() for t in make(SMALL, torch.float32, bias=bias)]
    torch.library.opcheck(torch.ops.fastgate.linear_gelu.default, operands)
    torch.library.opcheck(torch.ops.fastgate.linear_gelu_saving.default, operands)
    plain = [None if t is None else t.detach() for t in operands]
    wanted = ALL if bias else DX | DWEIGHT
    for v in (None, F.linear(*plain)):
        arguments = (draw_grad(SMALL, torch.float32), v, *plain, wanted)
        torch.library.opcheck(torch.ops.fastgate.linear_gelu_backward.default, arguments)


def test_opcheck_of_a_saving_backend(stood_in):
    operands = [t.requires_grad_() for t in make(SMALL, torch.float32)]
    torch.library.opcheck(torch.ops.fastgate.linear_gelu_saving.default, operands)


@pytest.mark.parametrize("saving", [False, True])
def test_compiles_whole(saving, request):
    """torch.compile without a graph break, forward and backward, to the eager values."""
    called = request.getfixturevalue("stood_in") if saving else []
    operands, grad = make(SMALL, torch.float32), draw_grad(SMALL, torch.float32)

    def function(x, weight, bias):
        return linear_gelu(x.tanh(), weight, bias).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    y, grads = gradients(compiled, operands, grad)
    if saving:
        assert [name for name, *_ in called] == ["saving", "backward"]
    want, want_grads = gradients(function, operands, grad)
    for got, true in zip([y, *grads], [want, *want_grads], strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*operands), want, rtol=1e-5, atol=1e-6)
    assert not saving or [name for name, *_ in called[-2:]] == ["backward", "forward"]


def test_other_dtypes_run_the_reference(stood_in, monkeypatch):
    """float64 on a device whose kernels do not take it."""
    key = ("linear_gelu", "cpu")
    float32_only = replace(registry.IMPLEMENTATIONS[key], dtypes=frozenset({torch.float32}))
    monkeypatch.setitem(registry.IMPLEMENTATIONS, key, float32_only)
    operands = double(make(SMALL, torch.float32))
    assert torch.equal(linear_gelu(*operands), eager(*operands)) and not stood_in


REFUSED = {
    "depth": (dict(x=torch.zeros(3, 7)), "x, weight"),
    "a scalar": (dict(x=torch.zeros(())), "x, weight"),
    "weight's dimensions": (dict(weight=torch.zeros(4, 8, 1)), "x, weight"),
    "bias": (dict(bias=torch.zeros(8)), "bias"),
    "integers": (dict(x=torch.zeros(3, 8, dtype=torch.int64)), "x, weight, bias"),
    "two dtypes": (dict(x=torch.zeros(3, 8, dtype=torch.bfloat16)), "x, weight, bias"),
    "device": (dict(weight=torch.zeros(4, 8, device="meta")), "x, weight, bias"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_the_argument_and_a_remedy(what):
    wrong, argument = REFUSED[what]
    given = dict(x=torch.zeros(3, 8), weight=torch.zeros(4, 8), bias=torch.zeros(4))
    with pytest.raises(ArgumentError, match=f"^linear_gelu: {argument}: got .*, wanted .*; "):
        linear_gelu(**{**given, **wrong})
