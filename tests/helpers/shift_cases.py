"""Calls of shift_norm, their truth in float64, and what a backend must meet on them."""

from __future__ import annotations

import torch
from helpers.cases import BF16, FP16, FP32, allowed, error
from helpers.norm_cases import double, gradients
from torch.nn.functional import layer_norm

from fastgate.ops.shift_norm import DX, OPERANDS, PARAMETER_BIT, PARAMETERS

ALL = DX | sum(PARAMETER_BIT.values())
# (of x, of the vectors)
DTYPES = ((FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, BF16), (FP16, FP16))


def make(rows, hidden, dtypes, links=0.8, seed=0):
    """The operands by name, as the schema takes them. links: share of the rows with a left neighbour."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, mean=0.0):
        return mean + torch.randn(shape, generator=generator)

    has_left_neighbour = torch.rand(rows, generator=generator) < links
    has_left_neighbour[:1] = False
    given = {
        "x": (1.5 * draw(rows, hidden, mean=0.3)).to(dtypes[0]),
        "has_left_neighbour": has_left_neighbour,
    }
    given |= {name: draw(hidden).to(dtypes[1]) for name in PARAMETERS}
    given["weight"] = draw(hidden, mean=1.0).to(dtypes[1])
    return given | {"eps": 1e-5}


def mixed(given):
    """u as one would write it in torch with an index for each row beside, in the operands' own precision."""
    x, has_left_neighbour = given["x"], given["has_left_neighbour"]
    padded = torch.cat([x.new_zeros(1, x.shape[1]), x, x.new_zeros(1, x.shape[1])])
    place = torch.arange(1, len(x) + 1)
    above = padded[torch.where(has_left_neighbour, place - 1, 0)]
    below = padded[
        torch.where(torch.cat([has_left_neighbour, has_left_neighbour.new_zeros(1)])[1:], place + 1, 0)
    ]
    return x + given["offset"] + given["scale"] * x + given["before"] * above + given["after"] * below


def eager(given):
    u = mixed(given)
    # Torch's own wants one dtype.
    weight, bias = (given[name].to(u.dtype) for name in ("weight", "norm_bias"))
    return layer_norm(u, u.shape[-1:], weight, bias, given["eps"]).to(given["x"].dtype)


def run(backend, given, grad, requested=ALL):
    """y and the gradients by name, from one backend's own functions."""
    operands = [given[name] for name in OPERANDS]
    y = backend.forward(*operands)
    dx, rows = backend.backward(grad.to(y.dtype), *operands, requested)
    asked = [name for name in PARAMETERS if requested & PARAMETER_BIT[name]]
    found = {name: row.to(given[name].dtype) for name, row in zip(asked, rows, strict=True)}
    return y, {"x": dx} | found


def condition(given):
    """A rounding of the norm's input moves its output by |input| * rstd roundings."""
    u = mixed(double(given))
    if not u.numel():
        return 1.0
    rstd = (u.var(-1, unbiased=False) + given["eps"]).rsqrt()
    return max(1.0, float((u.abs().amax(-1) * rstd).max()))


def check(backend, given):
    grad = torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(7)).to(given["x"].dtype)
    truth, true_grads = gradients(eager, double(given), grad)
    torchs, torchs_grads = gradients(eager, given, grad)
    y, grads = run(backend, given, grad)
    grown = condition(given)
    assert y.shape == grad.shape and y.dtype == grad.dtype
    assert error(y, truth) <= allowed(torchs, truth, y.dtype, grown)
    assert grads.keys() == true_grads.keys()
    for name, got in grads.items():
        assert got.dtype == given[name].dtype and got.shape == given[name].shape
        true = true_grads[name]
        assert error(got, true) <= allowed(torchs_grads[name], true, got.dtype, grown), name


def check_strangers(backend):
    """A row without neighbours, even of NaN, changes neither the rows beside it nor their gradients."""
    given = make(70, 24, DTYPES[0], links=1.0)
    given["has_left_neighbour"][[0, 31, 32, 33, 64]] = False  # at the edges of what is summed together, too
    grad = torch.randn(70, 24, generator=torch.Generator().manual_seed(1))
    y, grads = run(backend, given, grad)
    changed = {**given, "x": given["x"].clone()}
    changed["x"][32] = float("nan")
    other, other_grads = run(backend, changed, grad)
    rest = torch.arange(70) != 32
    assert torch.equal(y[rest], other[rest]) and torch.equal(grads["x"][rest], other_grads["x"][rest])
    assert other[32].isnan().all()


def check_strides(backend):
    """Operands with any strides give what dense ones give."""
    given = make(6, 20, DTYPES[0])
    wide = {
        **given,
        "x": torch.randn(20, 6).t(),
        "has_left_neighbour": torch.zeros(12, dtype=torch.bool)[::2],
    }
    wide |= {name: torch.randn(40)[::2] for name in ("scale", "weight")}
    dense = {key: t.contiguous() if isinstance(t, torch.Tensor) else t for key, t in wide.items()}
    grad = torch.randn(20, 6).t()
    y, grads = run(backend, wide, grad)
    y_dense, grads_dense = run(backend, dense, grad.contiguous())
    assert torch.equal(y, y_dense) and y.is_contiguous()
    assert all(torch.allclose(grads[key], grads_dense[key], rtol=1e-6, atol=1e-6) for key in grads)


def check_unrequested(backend, names):
    """Only the gradients asked for, with the bits they have when all are; the others have no elements."""
    given = make(40, 24, DTYPES[0])
    grad = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    _, full = run(backend, given, grad)
    bits = {"x": DX, **PARAMETER_BIT}
    _, part = run(backend, given, grad, sum(bits[name] for name in names))
    assert part.keys() == {"x", *names}
    for name, value in part.items():
        assert torch.equal(value, full[name]) if name in names else not value.numel()
