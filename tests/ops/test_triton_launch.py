"""How Triton kernels are launched, and that their operands are those of the ops: nothing runs on a device."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastgate.kernels.launch import Kernel, PlainLaunch
from fastgate.ops import embed_norm, gated_add_norm, shift_norm

pytestmark = pytest.mark.slow


class Function:
    """A `triton.jit` function whose warmup gives `result`."""

    def __init__(self, result):
        self.result, self.launched = result, []

    def warmup(self, *arguments, grid, **options):
        return self.result

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append((grid, arguments, options))


@pytest.mark.parametrize("result", [None, object()])
def test_a_warmup_that_returns_no_kernel_leaves_the_launch_to_triton(result, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    function = Function(result)
    kernel = Kernel(function)
    kernel.interpreted = False
    tensor = SimpleNamespace(device=SimpleNamespace(index=0))
    for _ in range(2):
        kernel.launch((2, 1, 1), "key", (tensor, 7), num_warps=4)
    (variant,) = kernel.compiled.values()
    assert isinstance(variant, PlainLaunch)
    options = {"num_warps": 4, "num_stages": 3, "maxnreg": None, "enable_fp_fusion": True}
    assert function.launched == [((2, 1, 1), (tensor, 7), options)] * 2


@pytest.mark.parametrize("op", ["gated_add_norm", "shift_norm", "embed_norm"])
def test_kernels_take_the_operands_of_the_op(op):
    operands = importlib.import_module(f"fastgate.ops.{op}").OPERANDS
    kernels = importlib.import_module(f"fastgate.kernels.{op}")
    assert tuple(inspect.signature(kernels.forward).parameters) == operands
    assert tuple(inspect.signature(kernels.backward).parameters) == ("grad", *operands, "requested")
    schema = getattr(torch.ops.fastgate, op).default._schema
    assert tuple(argument.name for argument in schema.arguments) == operands


@pytest.mark.parametrize("op", [gated_add_norm, shift_norm, embed_norm], ids=lambda op: op.__name__)
def test_every_gradient_has_a_bit_of_its_own(op):
    module = importlib.import_module(f"fastgate.ops.{op.__name__}")
    bits = dict(module.BIT) if hasattr(module, "BIT") else {"x": module.DX, **module.PARAMETER_BIT}
    if hasattr(module, "DRESIDUAL"):
        bits["residual"] = module.DRESIDUAL
    assert sorted(bits.values()) == [1 << place for place in range(len(bits))]
    assert set(bits) <= set(module.OPERANDS)
