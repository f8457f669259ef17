"""What the kernels are timed against that may not be here, and why it is not."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import harness
import torch
from torch import Tensor

from fastgate import ops
from fastgate.ops import backends

GPU_LANGUAGES = ("cuda", "triton")


def implementation(op: str, language: str) -> tuple[ops.Implementation | None, str]:
    """One GPU language's implementation of an op, or None and why it does not run here."""
    if not harness.ON_GPU:
        return None, "no CUDA device"
    backend = backends.GPU_LANGUAGES[language]
    reason = backend.why_not()
    return (None, reason) if reason else (backend.load(op), "")


def triton_kernels(op: str) -> tuple[Any, str]:
    """The module of an op's Triton kernels, or None and why they do not run here."""
    reason = "no CUDA device" if not harness.ON_GPU else backends.missing_for_triton()
    return (None, reason) if reason else (importlib.import_module(f"fastgate.kernels.{op}"), "")


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any] | None, str]:
    """`function` under torch.compile, one compilation a shape."""
    if not harness.ON_GPU:
        return None, "no CUDA device; on the CPU it takes a C++ compilation a shape"
    torch.compiler.reset()
    # A backward is timed many times over one forward, so its buffers cannot be given away.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False), ""


def with_compiled(
    functions: dict[str, Callable[..., Any]], eager: Callable[..., Any]
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """(functions and `compile`, torch.compile's form of `eager`, nothing) where it runs; else (functions,
    why not)."""
    found, reason = compiled(eager)
    return (functions, {"compile": reason}) if found is None else ({**functions, "compile": found}, {})


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().double() if t.is_floating_point() else t for t in tensors]


def inference_work(
    group: str,
    fused: Callable[..., Any],
    eager: Callable[..., Any],
    given: Sequence[Sequence[Tensor]],
    size: int,
    tolerance: float,
) -> harness.Work:
    """`fused` against torch's `eager`, compiled or not, without autograd; bounded by a copy of `size` bytes.

    given: the operands of each set.
    """
    found, absent = with_compiled({"fastgate": fused, "eager": eager}, eager)
    return harness.Work(
        group,
        {name: harness.inference(function, given) for name, function in found.items()},
        size,
        sets=len(given),
        absent=absent,
        ceilings={"copy": harness.copying(size, len(given))},
        truth=[eager(*_wide(given[0]))],
        tolerance=tolerance,
    )


def differentiation_work(
    group: str,
    fused: Callable[..., Any],
    eager: Callable[..., Any],
    given: Sequence[Sequence[Tensor]],
    grads: Sequence[Tensor],
    size: int,
    tolerance: float,
) -> harness.Work:
    """As above, the gradients of every operand of floating point. grads: of the result, for each set."""
    for t in (t for tensors in given for t in tensors if t.is_floating_point()):
        t.requires_grad_()
    found, absent = with_compiled({"fastgate": fused, "eager": eager}, eager)
    exact = [t.requires_grad_() if t.is_floating_point() else t for t in _wide(given[0])]
    leaves = [t for t in exact if t.requires_grad]
    return harness.Work(
        group,
        {name: harness.differentiation(function, given, grads) for name, function in found.items()},
        size,
        sets=len(given),
        absent=absent,
        ceilings={"copy": harness.copying(size, len(given))},
        truth=torch.autograd.grad(eager(*exact), leaves, grads[0].double()),
        tolerance=tolerance,
    )


def liger(name: str) -> tuple[Callable[..., Any] | None, str]:
    """A function of Liger-Kernel's functional interface."""
    if not harness.ON_GPU:
        return None, "no CUDA device"
    if importlib.util.find_spec("liger_kernel") is None:
        return None, "liger_kernel is not installed"
    functional = importlib.import_module("liger_kernel.transformers.functional")
    return getattr(functional, name), ""
