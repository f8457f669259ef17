"""What ops must meet whatever they compute: bits that repeat, no autograd in inference, whole traces."""

from __future__ import annotations

import pytest
import torch


def backends_and_dtypes(backends, dtypes):
    """(name, dtypes) of every backend by name and the pairs of element types it takes, as parameters."""
    return [
        pytest.param(name, pair, id=f"{name}-{pair[0]}-{pair[1]}")
        for name, backend in backends.items()
        for pair in dtypes
        if pair[0] in backend.dtypes
    ]


def assert_same_bits(first, again):
    """Two results of a call and its backward: (y, gradients by name)."""
    (y, grads), (y_again, grads_again) = first, again
    assert torch.equal(y, y_again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


def check_inference(function, *operands):
    """An operand asks for a gradient: without no_grad the result has one, with it the same and none."""
    assert function(*operands).grad_fn is not None
    with torch.no_grad():
        y = function(*operands)
    with torch.inference_mode():
        assert torch.equal(function(*operands), y)
    assert y.grad_fn is None


def check_compiles(function, operands, leaves):
    """torch.compile without a graph break, forward and backward, to the eager values."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    got = torch.autograd.grad(compiled(*operands).sum(), leaves)
    torch.manual_seed(3)
    want = torch.autograd.grad(function(*operands).sum(), leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
