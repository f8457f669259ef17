"""Calls of embed_norm, their truth in float64, and what a backend must meet on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from helpers.cases import BF16, FP16, FP32, allowed, error
from helpers.norm_cases import differentiable, double
from torch.nn.functional import embedding, layer_norm

from fastgate.ops import reference
from fastgate.ops.embed_norm import BIT, OPERANDS, PARAMETERS, TABLES

SEED = 81985529216486895
WORDS, POSITIONS = 37, 19


class Call(NamedTuple):
    types: int = 2  # rows of the type table
    given: bool = True  # whether there are type ids
    norms: int = 1
    dropout_p: float = 0.0
    padding_idx: int = -1
    position_padding_idx: int = -1
    ids: torch.dtype = torch.int64


CALLS = {
    "plain": Call(padding_idx=0),
    "no types": Call(given=False),
    "one type": Call(types=1, padding_idx=1, position_padding_idx=1),  # RoBERTa
    "many types": Call(types=5, ids=torch.int32),
    "dropout": Call(dropout_p=0.1, padding_idx=0),
    "two norms": Call(norms=2),
    "two norms and dropout": Call(norms=2, dropout_p=0.5, padding_idx=0),
    "two norms, no types, dropout": Call(given=False, norms=2, dropout_p=0.3),
}
# (of the tables, of the vectors)
DTYPES = ((FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16))


def make(rows, hidden, dtypes, call, seed=0):
    """The operands by name, as the schema takes them."""
    call, generator = CALLS[call], torch.Generator().manual_seed(seed)
    tables, vectors = dtypes

    def draw(*shape, mean=0.0):
        return mean + torch.randn(shape, generator=generator)

    def ids(count):
        return torch.randint(count, (rows,), generator=generator).to(call.ids)

    given = dict.fromkeys(OPERANDS)
    given.update(words=ids(WORDS), positions=ids(POSITIONS), types=ids(call.types) if call.given else None)
    given.update(word_table=draw(WORDS, hidden), position_table=draw(POSITIONS, hidden, mean=0.5))
    given.update(type_table=draw(call.types, hidden))
    given.update({name: given[name].to(tables) for name in TABLES})
    given.update(weight=draw(hidden, mean=1.0).to(vectors), norm_bias=draw(hidden).to(vectors))
    if call.norms == 2:
        given.update(weight2=draw(hidden, mean=1.0).to(vectors), norm_bias2=draw(hidden).to(vectors))
    given.update(eps=1e-5, eps2=1e-6, dropout_p=call.dropout_p)
    given.update(padding_idx=call.padding_idx, position_padding_idx=call.position_padding_idx)
    given["seed"] = torch.tensor(SEED) if call.dropout_p else None
    return given


def keep_mask(given):
    if not given["dropout_p"]:
        return None
    rows, hidden = len(given["words"]), len(given["weight"])
    return reference.keep_mask(given["seed"], rows, hidden, given["dropout_p"])


def stages(given):
    """What one would write in torch, in the tables' precision: (input of the first norm, ..., y)."""

    def gather(ids, table, padding):
        return embedding(ids, table, None if padding < 0 else padding)

    def norm(value, weight, bias, eps):  # torch's own wants one dtype
        return layer_norm(value, value.shape[-1:], weight.to(value.dtype), bias.to(value.dtype), eps)

    u = gather(given["words"], given["word_table"], given["padding_idx"])
    u = u + gather(given["positions"], given["position_table"], given["position_padding_idx"])
    types = given["types"]
    u = u + (given["type_table"][0] if types is None else gather(types, given["type_table"], -1))
    y = norm(u, given["weight"], given["norm_bias"], given["eps"])
    mask = keep_mask(given)
    if mask is not None:
        y = y * mask / (1 - given["dropout_p"])
    if given["weight2"] is None:
        return u, y
    return u, y, norm(y, given["weight2"], given["norm_bias2"], given["eps2"])


def eager(given):
    return stages(given)[-1]


def gradients(function, given, grad):
    """y and its gradients by name, of a function of the operands."""
    given = differentiable(given)
    y = function(given)
    names = [name for name in BIT if given[name] is not None]
    found = torch.autograd.grad(y, [given[name] for name in names], grad.to(y.dtype))
    return y.detach(), dict(zip(names, found, strict=True))


def requested_bits(given):
    return sum(bit for name, bit in BIT.items() if given[name] is not None)


def run(backend, given, grad):
    """y and the gradients by name, from one backend's own functions."""
    operands = [given[name] for name in OPERANDS]
    y = backend.forward(*operands)
    requested = requested_bits(given)
    *tables, rows = backend.backward(grad.to(y.dtype), *operands, requested)
    found = dict(zip(TABLES, tables, strict=True))
    for name, row in zip([n for n in PARAMETERS if requested & BIT[n]], rows, strict=True):
        found[name] = row.to(given[name].dtype)
    return y, found


def condition(given):
    """A rounding of a norm's input moves its output by |input| * rstd roundings; two norms multiply."""
    grown = 1.0
    inputs = stages(double(given))[:-1]
    for value, eps in zip(inputs, (given["eps"], given["eps2"]), strict=False):
        if value.numel():
            rstd = (value.var(-1, unbiased=False) + eps).rsqrt()
            grown *= max(1.0, float((value.abs().amax(-1) * rstd).max()))
    return grown


def check(backend, given):
    generator = torch.Generator().manual_seed(7)
    dtype = given["word_table"].dtype
    grad = torch.randn((len(given["words"]), len(given["weight"])), generator=generator).to(dtype)
    truth, true_grads = gradients(eager, double(given), grad)
    torchs, torchs_grads = gradients(eager, given, grad)
    y, grads = run(backend, given, grad)
    grown = condition(given)
    assert y.shape == grad.shape and y.dtype == dtype
    assert error(y, truth) <= allowed(torchs, truth, dtype, grown)
    assert grads.keys() == true_grads.keys()
    for name, got in grads.items():
        assert got.dtype == given[name].dtype and got.shape == given[name].shape
        true = true_grads[name]
        assert error(got, true) <= allowed(torchs_grads[name], true, got.dtype, grown), name


def check_masks(backend, seed, hidden):
    """Read back from the values: a dropped element of y is 0, and no gradient gets through it."""
    rows = 9
    given = make(rows, hidden, DTYPES[0], "dropout")
    given.update(dropout_p=0.4, seed=torch.tensor(seed), norm_bias=torch.full((hidden,), 100.0))
    mask = reference.keep_mask(given["seed"], rows, hidden, 0.4)
    y, grads = run(backend, given, torch.ones(rows, hidden))
    assert torch.equal(y != 0, mask)
    torch.testing.assert_close(grads["norm_bias"], mask.sum(0) / 0.6)


def check_strides(backend):
    """Operands with any strides give what dense ones give."""
    given = make(6, 20, DTYPES[0], "two norms")
    wide = {
        **given,
        "words": torch.randint(WORDS, (12,))[::2],
        "word_table": torch.randn(20, WORDS).t(),
        "type_table": torch.randn(4, 20)[::2],
        "weight": torch.randn(40)[::2],
    }
    dense = {key: t.contiguous() if isinstance(t, torch.Tensor) else t for key, t in wide.items()}
    grad = torch.randn(20, 6).t()
    y, grads = run(backend, wide, grad)
    y_dense, grads_dense = run(backend, dense, grad.contiguous())
    assert torch.equal(y, y_dense) and y.is_contiguous()
    assert all(torch.allclose(grads[key], grads_dense[key], rtol=1e-6, atol=1e-6) for key in grads)


def check_unrequested(backend, names):
    """Only the gradients asked for, with the bits they have when all are; the others have no elements."""
    given = make(40, 24, DTYPES[0], "two norms and dropout")
    operands = [given[name] for name in OPERANDS]
    grad = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    _, full = run(backend, given, grad)
    *tables, rows = backend.backward(grad, *operands, sum(BIT[name] for name in names))
    part = dict(zip(TABLES, tables, strict=True))
    part.update(zip([name for name in PARAMETERS if name in names], rows, strict=True))
    for name, value in part.items():
        assert torch.equal(value, full[name]) if name in names else not value.numel()
