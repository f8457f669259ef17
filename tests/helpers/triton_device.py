"""Where a process tests the Triton kernels: in the interpreter on the CPU, or on a CUDA device.

Triton reads TRITON_INTERPRET when it is imported and whenever a kernel is defined, and other packages import
it early; so one process does one of the two. The test files are the same: test_interpreter.py runs them in a
child process with the variable set, `pytest -m gpu` runs them on the device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import pytest
import torch

from fastgate import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
MARKS = (
    []
    if INTERPRETED
    else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
if INTERPRETED:
    from helpers import interpreted  # noqa: F401
gpu_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no streams and no graphs")


def turns(place, shape, dtypes, largest):
    """Places in `dtypes` for a shape: all; one in turn in the slow interpreter above `largest` elements."""
    slow = INTERPRETED and math.prod(shape.sizes) > largest
    return [place % len(dtypes)] if slow else range(len(dtypes))


def moved(values, device):
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in values]


def shifted(t: torch.Tensor) -> torch.Tensor:
    """A copy on the device that begins between 16-byte boundaries."""
    return torch.empty(t.numel() + 1, dtype=t.dtype, device=DEVICE)[1:].view(t.shape).copy_(t)


def on_device(module) -> ops.Implementation:
    """A kernel module's functions as a backend for tensors on the CPU, run on this process's device."""

    def there(function):
        def call(*operands):
            found = function(*moved(operands, DEVICE))
            return found.cpu() if isinstance(found, torch.Tensor) else tuple(moved(found, "cpu"))

        return call

    backward = there(module.backward)
    saving = ops.Saving(there(module.forward_saving), backward) if hasattr(module, "forward_saving") else None
    return ops.Implementation("triton", there(module.forward), backward, frozenset(), saving)


def check_unaligned(module, operands: Sequence[object], grad: torch.Tensor, requested: int) -> None:
    """A kernel module's functions on the device: unaligned operands give the bits that aligned ones give."""
    others = [shifted(value) if isinstance(value, torch.Tensor) else value for value in operands]
    assert torch.equal(module.forward(*operands), module.forward(*others))
    found, again = (module.backward(grad, *values, requested) for values in (operands, others))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def check_replay(call: Callable[[], Sequence[torch.Tensor]], change: Callable[[], None]) -> None:
    """A captured call, replayed after `change` of its operands in place, gives what a call gives then."""
    call()  # compiles, which capture forbids
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(2):
        change()
        want = [t.clone() for t in call()]
        graph.replay()
        assert all(torch.equal(one, two) for one, two in zip(captured, want, strict=True))


def check_stream(call: Callable[[], Sequence[torch.Tensor]], operand: torch.Tensor) -> None:
    """A call goes to the current stream: behind the work that fills its operand there."""
    want, kept = call(), operand.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        operand.zero_()
        torch.cuda._sleep(50_000_000)
        operand.copy_(kept)
        found = call()
    stream.synchronize()
    assert all(torch.equal(one, two) for one, two in zip(found, want, strict=True))
