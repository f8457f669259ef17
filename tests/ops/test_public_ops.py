"""The public ops: autograd, autocast, inference, tracing, compiling, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import DTYPES
from helpers.norm_cases import CALLS, differentiable, eager, gradients, keep_mask, make, requested_bits
from helpers.op_checks import check_compiles, check_inference
from torch.nn.functional import layer_norm

from fastgate import ops
from fastgate.errors import ArgumentError
from fastgate.ops.gated_add_norm import OPERANDS, gated_add_norm


@pytest.mark.parametrize("call", CALLS)
def test_public_function_trains_like_the_reference(call):
    """ops.gated_add_norm with autograd against the reference's own mathematics under plain autograd."""
    given = make((7, 48), DTYPES[0], call)
    grad = torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    keywords = [
        name for name in OPERANDS if name not in ("x", "residual", "weight", "norm_bias", "eps", "seed")
    ]

    def public(operands):
        torch.manual_seed(5)
        positional = [operands[name] for name in ("x", "residual", "weight", "norm_bias", "eps")]
        return gated_add_norm(*positional, **{name: operands[name] for name in keywords})

    if given["dropout_p"]:
        torch.manual_seed(5)
        given["seed"] = torch.randint(2**63 - 1, (), dtype=torch.int64)
    y, grads = gradients(public, given, grad)
    truth, true_grads = gradients(lambda g: eager(g, keep_mask(given)), given, grad)
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
    for name, true in true_grads.items():
        torch.testing.assert_close(grads[name], true, rtol=1e-4, atol=1e-4, msg=name)


def test_only_the_gradients_asked_for():
    given = make((4, 16), DTYPES[0], "everything")
    gate = given["gate"].requires_grad_()
    y = gated_add_norm(
        given["x"],
        given["residual"],
        given["weight"],
        given["norm_bias"],
        1e-5,
        gate=gate,
        bias=given["bias"],
    )
    (got,) = torch.autograd.grad(y.square().sum(), gate)
    twin = given["gate"].detach().requires_grad_()
    again = eager({**given, "gate": twin, "scale": None, "offset": None}, None)
    (want,) = torch.autograd.grad(again.square().sum(), twin)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_x_and_residual_do_not_share_their_grad():
    x, residual = (torch.randn(3, 8).requires_grad_() for _ in range(2))
    gated_add_norm(x, residual, torch.ones(8), torch.zeros(8), 1e-5).sum().backward()
    x.grad.add_(1.0)
    assert not torch.equal(x.grad, residual.grad)


def test_autocast_mixes_precisions():
    linear = torch.nn.Linear(32, 48)
    residual = torch.randn(5, 48, requires_grad=True)
    weight, norm_bias = torch.ones(48, requires_grad=True), torch.zeros(48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        x = linear(torch.randn(5, 32))
        y = gated_add_norm(x, residual, weight, norm_bias, 1e-12, bias=linear.bias)
    assert x.dtype == torch.bfloat16 and y.dtype == torch.float32
    y.square().sum().backward()
    assert linear.weight.grad.dtype == torch.float32 and linear.weight.grad.isfinite().all()
    want = layer_norm(x.detach().float() + linear.bias + residual, (48,), weight, norm_bias, 1e-12)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


def test_inference_calls_the_implementation_without_autograd():
    given = make((3, 16), DTYPES[0], "plain")
    positional = [given[name] for name in ("x", "residual", "weight", "norm_bias", "eps")]
    positional[2] = positional[2].requires_grad_()
    check_inference(gated_add_norm, *positional)


@pytest.mark.parametrize("gate", [0.0, 0.25, 1.0])
def test_gate_may_be_a_number(gate):
    given = make((3, 16), DTYPES[0], "bias")
    positional = [given[name] for name in ("x", "residual", "weight", "norm_bias", "eps")]
    as_number = gated_add_norm(*positional, bias=given["bias"], gate=gate)
    as_tensor = gated_add_norm(*positional, bias=given["bias"], gate=torch.tensor(gate))
    assert torch.equal(as_number, as_tensor)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["plain", "everything", "two norms"])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=str)
def test_opcheck(call, dtypes):
    given = make((3, 10), dtypes, call)
    grad = torch.randn(3, 10)
    torch.library.opcheck(torch.ops.fastgate.gated_add_norm.default, tuple(differentiable(given).values()))
    torch.library.opcheck(
        torch.ops.fastgate.gated_add_norm_backward.default, (grad, *given.values(), requested_bits(given))
    )


@pytest.mark.parametrize("call", ["bias", "everything"])
def test_compiles_whole(call):
    given = make((6, 24), DTYPES[0], call)
    keywords = {name: given[name] for name in ("gate", "scale", "offset")}
    dropout_p = given["dropout_p"]

    def function(x, residual, weight, norm_bias, bias):
        return gated_add_norm(
            x.tanh(), residual, weight, norm_bias, 1e-5, bias=bias, dropout_p=dropout_p, **keywords
        ).sin()

    inputs = [given[name].requires_grad_() for name in ("x", "residual", "weight", "norm_bias", "bias")]
    check_compiles(function, inputs, inputs)


REFUSED = {
    "residual": (dict(residual=torch.zeros(2, 8)), "x, residual, weight, norm_bias"),
    "weight": (dict(weight=torch.zeros(7)), "x, residual, weight, norm_bias"),
    "integers": (dict(x=torch.zeros(3, 8, dtype=torch.int64)), "x, residual"),
    "bias": (dict(bias=torch.zeros(9)), "bias"),
    "scale": (dict(scale=torch.zeros(1)), "scale"),
    "offset": (dict(offset=torch.zeros(3, 8)), "offset"),
    "gate": (dict(gate=torch.zeros(1)), "gate"),
    "dropout_p": (dict(dropout_p=1.0), "dropout_p"),
    "negative dropout_p": (dict(dropout_p=-0.1), "dropout_p"),
    "half a norm": (dict(weight2=torch.zeros(8)), "weight2, norm_bias2"),
    "second norm's shape": (dict(weight2=torch.zeros(8), norm_bias2=torch.zeros(2)), "weight2, norm_bias2"),
    "gate and second norm": (dict(weight2=torch.zeros(8), norm_bias2=torch.zeros(8), gate=0.5), "gate"),
    "device": (dict(residual=torch.zeros(3, 8, device="meta")), "x, residual, weight"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_the_argument_and_a_remedy(what):
    wrong, argument = REFUSED[what]
    given = dict(
        x=torch.zeros(3, 8),
        residual=torch.zeros(3, 8),
        weight=torch.ones(8),
        norm_bias=torch.zeros(8),
        eps=1e-5,
    )
    with pytest.raises(ArgumentError, match=f"^gated_add_norm: {argument}: got .*, wanted .*; ") as caught:
        gated_add_norm(**{**given, **wrong})
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("lengths", [[1.5], "12", [-1], [None]])
def test_lengths_that_are_none(lengths):
    with pytest.raises(ArgumentError, match="SequenceOffsets: lengths: got"):
        ops.SequenceOffsets.from_lengths(lengths)


def test_ends_that_do_not_begin_with_0():
    with pytest.raises(ArgumentError, match="SequenceOffsets: cu_seqlens: got ends from 1"):
        ops.SequenceOffsets.from_cu_seqlens(torch.tensor([1, 3]))


@pytest.mark.parametrize("weight", [(4, 3), (8,), ()])
def test_a_weight_that_does_not_fit(weight):
    with pytest.raises(ArgumentError, match=r"linear: x, weight: got shapes \(5, 8\) and"):
        ops.linear(torch.randn(5, 8), torch.randn(weight))
