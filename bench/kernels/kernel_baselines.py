"""What the kernels are timed against that may not be here, and why it is not."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import harness
import torch

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


def liger(name: str) -> tuple[Callable[..., Any] | None, str]:
    """A function of Liger-Kernel's functional interface."""
    if not harness.ON_GPU:
        return None, "no CUDA device"
    if importlib.util.find_spec("liger_kernel") is None:
        return None, "liger_kernel is not installed"
    functional = importlib.import_module("liger_kernel.transformers.functional")
    return getattr(functional, name), ""
