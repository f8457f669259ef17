"""Launches Triton kernels at little host time: a compiled variant is looked up by the caller's own key."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

# Of what the interpreter, which runs kernels on CPU tensors, stands for: programs get several tiles.
INTERPRETED_MULTIPROCESSORS = 2


# Products and sums may fuse: fewer roundings. Triton is changing its default.
OPTIONS = {"enable_fp_fusion": True}


class Kernel:
    """A `triton.jit` function and its compiled variants.

    Triton's own launch inspects every argument at every call to find the variant that fits. Here the caller
    gives a key that says as much: element types, which operands are given, alignment, launch choices.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.interpreted = not isinstance(function, triton.JITFunction)
        self.compiled: dict[Hashable, CompiledKernel | PlainLaunch] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        key: Hashable,
        arguments: tuple[Any, ...],
        num_warps: int,
        num_stages: int = 3,
        maxnreg: int | None = None,
    ) -> None:
        """Run on the current device and stream. arguments: all parameters by position, constexprs too, the
        first one a tensor; key: whatever of them, other than the device, decides the compiled variant.

        maxnreg: registers a thread. Left alone, the assembler may spill a few for one more program at a time.
        """
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, **OPTIONS}
        if self.interpreted:
            self.function[grid](*arguments, **options)
            return
        device = arguments[0].device.index
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.launch(grid, key, arguments, num_warps, num_stages, maxnreg)
        variant = self.compiled.get((device, key))
        if variant is None:
            variant = self.compiled[device, key] = self._variant(grid, arguments, options)
        variant[grid](*arguments)

    def _variant(
        self, grid: tuple[int, int, int], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> CompiledKernel | PlainLaunch:
        """What `variant[grid](*arguments)` launches.

        Triton documents `warmup` for compiling ahead, but not what it returns. Where that is no kernel which
        takes a grid, every launch goes Triton's own way: slower, with the same result.
        """
        warmup = getattr(self.function, "warmup", None)
        variant = None if warmup is None else warmup(*arguments, grid=grid, **options)
        if isinstance(variant, CompiledKernel) and hasattr(variant, "__getitem__"):
            return variant
        return PlainLaunch(self.function, options)


class PlainLaunch:
    """A `triton.jit` function with its launch options, launched as Triton documents it."""

    def __init__(self, function: Any, options: dict[str, Any]) -> None:
        self.function = function
        self.options = options

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        return functools.partial(self.function[grid], **self.options)


def aligned(*tensors: Tensor | None) -> Hashable:
    """Which tensors begin at multiples of 16 bytes, as 16-byte accesses need: True if all of them do.

    For a key: each tensor by itself decides how a variant reads it.
    """
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
    if bits & 15 == 0:
        return True
    return tuple([tensor is None or tensor.data_ptr() & 15 == 0 for tensor in tensors])


def multiprocessors(device: torch.device) -> int:
    return _multiprocessors(device.index) if device.type == "cuda" else INTERPRETED_MULTIPROCESSORS


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
