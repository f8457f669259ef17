"""Where a process tests the Triton kernels: in the interpreter on the CPU, or on a CUDA device.

Triton reads TRITON_INTERPRET when it is imported and whenever a kernel is defined, and other packages import
it early; so one process does one of the two. The test files are the same: test_interpreter.py runs them in a
child process with the variable set, `pytest -m gpu` runs them on the device.
"""

from __future__ import annotations

import os

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
    import interpreted  # noqa: F401
gpu_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no streams and no graphs")


def moved(values, device):
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in values]


def on_device(module) -> ops.Implementation:
    """A kernel module's functions as a backend for tensors on the CPU, run on this process's device."""

    def forward(*operands):
        return module.forward(*moved(operands, DEVICE)).cpu()

    def backward(*operands):
        return tuple(moved(module.backward(*moved(operands, DEVICE)), "cpu"))

    return ops.Implementation("triton", forward, backward, frozenset())
