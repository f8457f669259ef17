"""Derivatives of the ops: one formula for eager training and the dispatcher, and derivatives of higher order.

An op's compiled backward has no derivative of its own. Where a backward is itself differentiated
(create_graph=True, and gradients that come in batches), torch's autograd makes it from the op in plain torch
instead: more work, and every order of derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fastgate.ops.registry import LIBRARY
from fastgate.ops.torch_compat import func_transform, in_forward_mode, is_batched_gradient


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether a call with these operands takes part in autograd."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_transformed() -> bool:
    """Whether one of torch.func's transforms, or forward-mode differentiation, is at work."""
    return func_transform() is not None or in_forward_mode()


def needs_torch(grads: Iterable[Tensor | None]) -> bool:
    """Asked in a backward of these gradients: whether it must consist of torch's own operations."""
    batched = is_batched_gradient  # of autograd.grad(is_grads_batched=True)
    return (
        torch.is_grad_enabled()
        or is_transformed()
        or any(grad is not None and batched(grad) for grad in grads)
    )


def differentiate_by_torch(
    plain: Callable[..., Tensor | tuple[Tensor, ...]],
    operands: Sequence[Any],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of plain(*operands), one an operand, None where `needs` does not ask for one.

    grads: those of the outputs, None for zeros. The gradients can be differentiated with respect to operands
    and grads where gradients are enabled.
    """
    with torch.enable_grad():
        # Views of their own: an operand that was computed from another one counts by itself.
        views = [t.view_as(t) if need else t for t, need in zip(operands, needs, strict=True)]
        outputs = plain(*views)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=False) if grad is not None]
    requested = [view for view, need in zip(views, needs, strict=True) if need]
    gradients = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            requested,
            [grad for _, grad in pairs],
            create_graph=torch.is_grad_enabled(),
            materialize_grads=True,
        )
    )
    return tuple(next(gradients) if need else None for need in needs)


class Context(FunctionCtx):
    """What an autograd formula keeps from forward for backward: torch's context, and what ours sets on it."""

    saved_tensors: tuple[Any, ...]
    needs_input_grad: tuple[bool, ...]
    places: list[int]
    numbers: list[Any]


def save_inputs(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    """A formula's setup that keeps the inputs only: backward computes again what it needs besides, from rows
    it has to read anyway."""
    ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.numbers = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*(inputs[place] for place in ctx.places))


def saved_inputs(ctx: Context) -> list[Any]:
    """The inputs as save_inputs had them."""
    operands = list(ctx.numbers)
    for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
        operands[place] = tensor
    return operands


def register_autograd_formula(
    op: str,
    forward: Callable[..., Any],
    differentiate: Callable[..., tuple[Tensor | None, ...]],
    plain: Callable[..., Tensor | tuple[Tensor, ...]],
    keep: Callable[[Any, tuple[Any, ...], Any], None] = save_inputs,
    operands_of: Callable[[Any], Sequence[Any]] = saved_inputs,
) -> Callable[..., Any]:
    """Register an op's autograd formula; returns `forward` with the same formula for eager training, without
    the registration's cost.

    plain: the op in plain torch, for derivatives of higher order. keep, operands_of: what the context keeps,
    and the op's operands from it.
    """
    torch.library.register_autograd(f"fastgate::{op}", differentiate, setup_context=keep, lib=LIBRARY)

    def run(ctx: Any, *operands: Any) -> Any:
        output = forward(*operands)
        keep(ctx, operands, output)
        return output

    def backward(ctx: Any, *grads: Any) -> Any:
        if any(grad is not None for grad in grads) and needs_torch(grads):
            return differentiate_by_torch(plain, operands_of(ctx), ctx.needs_input_grad, grads)
        return differentiate(ctx, *grads)

    functions = {"forward": staticmethod(run), "backward": staticmethod(backward)}
    trained: Callable[..., Any] = type(op, (torch.autograd.Function,), functions).apply  # type: ignore[attr-defined]
    return trained
