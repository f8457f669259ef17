"""Second derivatives of the ops, and what torch's other kinds of derivatives need of them.

An op's compiled backward has no derivative of its own. Where a backward is differentiated in its turn
(create_graph=True, and gradients that come in batches), it is made by torch's autograd from the op in plain
torch instead: more work, and every order of derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether one of torch.func's transforms, or forward-mode differentiation, is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def needs_torch(grads: Iterable[Tensor | None]) -> bool:
    """Asked in a backward of these gradients: whether it must consist of torch's own operations."""
    batched = torch._C._functorch.is_legacy_batchedtensor  # of autograd.grad(is_grads_batched=True)
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
    asked = [view for view, need in zip(views, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            asked,
            [grad for _, grad in pairs],
            create_graph=torch.is_grad_enabled(),
            materialize_grads=True,
        )
    )
    return tuple(next(found) if need else None for need in needs)
