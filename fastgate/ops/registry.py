"""Which implementation runs an op: one slot an op and kind of device, the reference where it is empty.

An op's public function calls the implementation directly on plain tensors, through an autograd function only
if a gradient is wanted; where torch traces, it calls the registered op. A registered autograd formula costs 8
microseconds a call where no gradient is wanted, and for gated_add_norm's many arguments 200 where one is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.ops import derivatives

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LIBRARY = torch.library.Library("fastgate", "DEF")


@dataclass(frozen=True)
class Implementation:
    """One backend's functions for one op, which take the schema's arguments by position, and their dtypes.

    saving: a forward that returns something to keep for backward too, and a backward that takes it, where
    that spares work; the op's module says what it is. head_dims, for attention: the ones it takes, None for
    all. fits, for absorbed_attention: whether its kernels take a probe's shape on its device, None for all.
    """

    backend: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    dtypes: frozenset[torch.dtype]
    saving: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    head_dims: tuple[int, ...] | None = None  # a tuple: traced sizes have no hash
    fits: Callable[[Tensor], bool] | None = None


# Each op's module leaves its own here.
REFERENCE: dict[str, Implementation] = {}
# (op, device type) -> implementation; fastgate.ops.backends fills it once. What is not in it runs the reference.
IMPLEMENTATIONS: dict[tuple[str, str], Implementation] = {}
_fill: Callable[[], None] | None = None
_filling = threading.RLock()


def register_loader(fill: Callable[[], None]) -> None:
    """Leave a function that fills IMPLEMENTATIONS, to be called before the first op runs. An op raises what it raises,
    and the next op calls it again."""
    global _fill
    _fill = fill


def _fill_slots() -> None:
    """Call the function that was left, once, whichever thread comes first; the others wait for it."""
    global _fill
    with _filling:
        if _fill is not None:
            _fill()
            _fill = None


def implementation(op: str, device_type: str, *dtypes: torch.dtype) -> Implementation:
    """The implementation that runs `op` on tensors of these dtypes on this kind of device."""
    if _fill is not None:
        _fill_slots()
    found = IMPLEMENTATIONS.get((op, device_type))
    if found is None or not found.dtypes.issuperset(dtypes):
        return REFERENCE[op]
    return found


def bypasses_dispatcher(tensor: Tensor) -> bool:
    """Whether implementations may be called without the dispatcher: nothing traces, no tensor subclass."""
    return type(tensor) is Tensor and not torch.compiler.is_compiling()


def any_requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def draw_seed(op: str, dropout_p: float, device: torch.device) -> Tensor | None:
    """The () int64 seed of a dropout mask, from torch's default generator; None if nothing is dropped."""
    if dropout_p == 0.0:
        return None
    if not 0.0 <= dropout_p < 1.0:
        raise ArgumentError(
            format_error(
                op, "dropout_p", dropout_p, "0 <= dropout_p < 1", "pass a gate of 0 to drop everything"
            )
        )
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """An autograd formula's setup that keeps the inputs only: backward computes again what it needs besides,
    from rows it has to read anyway."""
    ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.numbers = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*(inputs[place] for place in ctx.places))


def saved_inputs(ctx: Any) -> list[Any]:
    """The inputs as save_inputs had them."""
    operands = list(ctx.numbers)
    for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
        operands[place] = tensor
    return operands


def register_autograd_formula(
    op: str,
    forward: Callable[..., Any],
    differentiate: Callable[..., Any],
    plain: Callable[..., Any],
    keep: Callable[[Any, tuple[Any, ...], Any], None] = save_inputs,
    operands_of: Callable[[Any], Sequence[Any]] = saved_inputs,
) -> Callable[..., Any]:
    """Register an op's autograd formula; returns `forward` with the same formula for eager training, without
    the registration's cost. plain: the op in plain torch, for second derivatives."""
    torch.library.register_autograd(f"fastgate::{op}", differentiate, setup_context=keep, lib=LIBRARY)

    def run(ctx: Any, *operands: Any) -> Any:
        output = forward(*operands)
        keep(ctx, operands, output)
        return output

    def backward(ctx: Any, *grads: Any) -> Any:
        if derivatives.needs_torch(grads):
            return derivatives.differentiate_by_torch(plain, operands_of(ctx), ctx.needs_input_grad, grads)
        return differentiate(ctx, *grads)

    functions = {"forward": staticmethod(run), "backward": staticmethod(backward)}
    trained: Callable[..., Any] = type(op, (torch.autograd.Function,), functions).apply  # type: ignore[attr-defined]
    return trained
