"""Calls of gated_add_norm, their truth in float64, and what a backend must meet on them."""

from __future__ import annotations

import torch
from helpers.cases import DTYPES, allowed, error
from torch.nn.functional import layer_norm

from fastgate.ops import reference
from fastgate.ops.gated_add_norm import OPERANDS, PARAMETER_BIT, PARAMETERS

SEED = 81985529216486895
# Which optional operands a call has, and the dropout probability.
CALLS = {
    "plain": ((), 0.0),
    "bias": (("bias",), 0.0),
    "dropout": (("bias",), 0.1),
    "gate": (("bias", "gate", "offset"), 0.0),
    "everything": (("bias", "gate", "scale", "offset"), 0.3),
    "replacement": (("scale", "offset"), 0.0),
    "two norms": (("bias", "weight2", "norm_bias2"), 0.0),
    "two norms and dropout": (("bias", "scale", "weight2", "norm_bias2"), 0.5),
}


def make(sizes, dtypes, call, seed=0):
    """The operands by name, as the schema takes them."""
    names, dropout_p = CALLS[call]
    generator = torch.Generator().manual_seed(seed)
    hidden = sizes[-1:]

    def draw(shape, dtype, mean=0.0):
        return (mean + torch.randn(shape, generator=generator)).to(dtype)

    given = dict.fromkeys(OPERANDS)
    given.update(x=draw(sizes, dtypes.x), residual=draw(sizes, dtypes.residual, 0.5))
    given.update(weight=draw(hidden, dtypes.parameters, 1.0), norm_bias=draw(hidden, dtypes.parameters))
    given.update(eps=1e-5, eps2=1e-6, dropout_p=dropout_p)
    for name in names:
        given[name] = draw(
            () if name == "gate" else hidden, dtypes.parameters, 1.0 if name == "weight2" else 0.0
        )
    if dropout_p:
        given["seed"] = torch.tensor(SEED)
    return given


def keep_mask(given):
    x = given["x"]
    if not given["dropout_p"]:
        return None
    return reference.keep_mask(
        given["seed"], x.numel() // x.shape[-1], x.shape[-1], given["dropout_p"]
    ).reshape(x.shape)


def eager(given, mask):
    """What one would write in torch, in the operands' own precision."""
    sublayer, u = given["x"], given["residual"]
    if given["bias"] is not None:
        sublayer = sublayer + given["bias"]
    if mask is not None:
        sublayer = sublayer * mask / (1 - given["dropout_p"])
    if given["gate"] is not None:
        sublayer = sublayer * given["gate"]
    if given["scale"] is not None:
        u = u * given["scale"]
    u = u + sublayer
    if given["offset"] is not None:
        u = u + given["offset"]
    if given["weight"] is None:
        return u

    def norm(value, weight, bias, eps):  # torch's own wants one dtype
        return layer_norm(value, value.shape[-1:], weight.to(value.dtype), bias.to(value.dtype), eps)

    y = norm(u, given["weight"], given["norm_bias"], given["eps"])
    return y if given["weight2"] is None else norm(y, given["weight2"], given["norm_bias2"], given["eps2"])


def double(given):
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def differentiable(given):
    return {
        name: value.detach().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in given.items()
    }


def gradients(function, given, grad):
    """y and its gradients by name, of a function of the operands."""
    given = differentiable(given)
    y = function(given)
    names = [name for name, value in given.items() if isinstance(value, torch.Tensor) and value.requires_grad]
    found = torch.autograd.grad(y, [given[name] for name in names], grad.to(y.dtype))
    return y.detach(), dict(zip(names, found, strict=True))


def requested_bits(given):
    return 3 | sum(bit for name, bit in PARAMETER_BIT.items() if given[name] is not None)


def run(backend, given, grad):
    """y and the gradients by name, from one backend's own functions."""
    operands = [given[name] for name in OPERANDS]
    y = backend.forward(*operands)
    requested = requested_bits(given)
    dx, dresidual, rows = backend.backward(grad.to(y.dtype), *operands, requested)
    found = {"x": dx, "residual": dresidual}
    for name, row in zip([n for n in PARAMETERS if requested & PARAMETER_BIT[n]], rows, strict=True):
        found[name] = (row.sum() if name == "gate" else row).to(given[name].dtype)
    return y, found


def condition(given, mask):
    """A rounding of a norm's input moves its output by |input| * rstd roundings; two norms multiply."""
    grown, wide = 1.0, double(given)
    u = eager({**wide, "weight": None}, mask)
    for eps, weight, bias in (("eps", "weight", "norm_bias"), ("eps2", "weight2", "norm_bias2")):
        if wide[weight] is None or not u.numel():
            break
        rstd = (u.var(-1, unbiased=False) + given[eps]).rsqrt()
        grown *= max(1.0, float((u.abs().amax(-1) * rstd).max()))
        u = layer_norm(u, u.shape[-1:], wide[weight], wide[bias], given[eps])
    return grown


def gate_condition(given, grad, truth):
    """The gate's gradient is one sum of many terms that cancel: its unit is that of the terms' magnitudes."""
    probe = {**double(given), "gate": torch.full(given["x"].shape, float(given["gate"]), dtype=torch.float64)}
    _, terms = gradients(lambda g: eager(g, keep_mask(given)), probe, grad.double())
    return max(1.0, float(terms["gate"].abs().sum() / truth.abs()))


def check(backend, given):
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(given["x"].shape, generator=generator).to(
        torch.promote_types(given["x"].dtype, given["residual"].dtype)
    )
    mask = keep_mask(given)
    truth, true_grads = gradients(lambda g: eager(g, mask), double(given), grad)
    torchs, torchs_grads = gradients(lambda g: eager(g, mask), given, grad)
    y, grads = run(backend, given, grad)
    grown = condition(given, mask)
    assert y.shape == given["x"].shape
    assert y.dtype == grad.dtype
    assert error(y, truth) <= allowed(torchs, truth, y.dtype, grown)
    assert grads.keys() == true_grads.keys()
    for name, got in grads.items():
        assert got.dtype == given[name].dtype and got.shape == given[name].shape
        true = true_grads[name]
        terms = gate_condition(given, grad, true) if name == "gate" and true.abs() > 0 else 1.0
        assert error(got, true) <= allowed(torchs_grads[name], true, got.dtype, grown * terms), name


def check_masks(backend, seed, hidden):
    """Read back from the values: x adds 10 where it is kept; its gradient is zero where it is not."""
    rows = 9
    given = make((rows, hidden + 1), DTYPES[0], "plain")
    given.update(dropout_p=0.4, seed=torch.tensor(seed), bias=torch.full((hidden + 1,), 10.0), eps=1e-5)
    given["x"], given["residual"] = torch.zeros(rows, hidden + 1), torch.zeros(rows, hidden + 1)
    given.update(weight=torch.ones(hidden + 1), norm_bias=torch.zeros(hidden + 1))
    mask = reference.keep_mask(given["seed"], rows, hidden + 1, 0.4)
    grad = torch.randn(rows, hidden + 1, generator=torch.Generator().manual_seed(1))
    y, _ = run(backend, given, grad)
    mixed = mask.any(1) & ~mask.all(1)  # elsewhere the norm hides which it was
    assert torch.equal(y[mixed] > 0, mask[mixed])
    given["residual"] = make((rows, hidden + 1), DTYPES[0], "plain", seed=5)["residual"]
    _, grads = run(backend, given, grad)
    if hidden > 1:
        assert torch.equal(grads["x"] != 0, mask)


def check_strides(backend):
    """Operands with any strides give what dense ones give."""
    given = make((6, 20), DTYPES[0], "gate")
    wide = {
        **given,
        "x": torch.randn(6, 40)[:, ::2],
        "residual": torch.randn(20, 6).t(),
        "bias": torch.randn(40)[::2],
    }
    dense = {
        key: value.contiguous() if isinstance(value, torch.Tensor) else value for key, value in wide.items()
    }
    grad = torch.randn(20, 6).t()
    y, grads = run(backend, wide, grad)
    y_dense, grads_dense = run(backend, dense, grad.contiguous())
    assert torch.equal(y, y_dense) and y.is_contiguous()
    assert all(torch.allclose(grads[key], grads_dense[key], rtol=1e-6, atol=1e-6) for key in grads)
