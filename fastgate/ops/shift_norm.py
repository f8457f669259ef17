"""shift_norm: LayerNorm(x + r(x)), where r is a token shift: it reads a row and the two beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.ops import autograd, reference, registry

_SCHEMA = (
    "Tensor x, Tensor has_left_neighbour, Tensor offset, Tensor scale, Tensor before, Tensor after, "
    "Tensor weight, Tensor norm_bias, float eps"
)
OPERANDS = tuple(operand.split()[1] for operand in _SCHEMA.split(", "))
# Bits of the backward's `requested`, and the order in which it stacks the gradients of the parameters.
DX = 1
PARAMETERS = ("offset", "scale", "before", "after", "weight", "norm_bias")
PARAMETER_BIT = {name: 2 << place for place, name in enumerate(PARAMETERS)}

_FORWARD_SCHEMA = f"shift_norm({_SCHEMA}) -> Tensor"
_BACKWARD_SCHEMA = f"shift_norm_backward(Tensor grad, {_SCHEMA}, int requested) -> (Tensor, Tensor)"


def _requested_parameters(requested: int) -> list[str]:
    """The parameters whose gradients are requested, in the order in which backward stacks them."""
    return [name for name in PARAMETERS if requested & PARAMETER_BIT[name]]


def _empty_gradients(x: Tensor, requested: int) -> tuple[Tensor, Tensor]:
    """(dx, parameters): those not requested have no elements; parameters is (number requested, H)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dx = x.new_empty(x.shape if requested & DX else (0,))
    return dx, x.new_empty((len(_requested_parameters(requested)), x.shape[1]), dtype=dtype)


def _reference_backward(grad: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    requested = operands[-1]
    gradients = reference.shift_norm_backward(grad, *operands[:-1])
    dx, parameters = _empty_gradients(operands[0], requested)
    if requested & DX:
        dx.copy_(gradients.x)
    for row, name in zip(parameters, _requested_parameters(requested), strict=True):
        row.copy_(getattr(gradients, name))
    return dx, parameters


registry.REFERENCE["shift_norm"] = registry.Implementation(
    "reference", reference.shift_norm, _reference_backward, frozenset(registry.DTYPES)
)


def _forward(x: Tensor, *operands: Any) -> Tensor:
    chosen = registry.implementation("shift_norm", x.device.type, x.dtype)
    return chosen.forward(x, *operands)  # type: ignore[no-any-return]


def _backward(grad: Tensor, x: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    chosen = registry.implementation("shift_norm", x.device.type, x.dtype)
    return chosen.backward(grad, x, *operands)  # type: ignore[no-any-return]


def _fake(x: Tensor, *operands: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_gradients(x, rest[-1])


registry.define_op(_FORWARD_SCHEMA, _forward, _fake)
registry.define_op(_BACKWARD_SCHEMA, _backward, _fake_backward)


def _differentiate(ctx: autograd.Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    operands = autograd.saved_inputs(ctx)
    named = dict(zip(OPERANDS, operands, strict=True))
    needs = dict(zip(OPERANDS, ctx.needs_input_grad, strict=True))
    requested = sum(bit for name, bit in PARAMETER_BIT.items() if needs[name]) | (DX if needs["x"] else 0)
    call = _backward if registry.bypasses_dispatcher(grad) else torch.ops.fastgate.shift_norm_backward
    dx, stacked = call(grad, *operands, requested)
    gradients = {"x": dx} if needs["x"] else {}
    for name, row in zip(_requested_parameters(requested), stacked.unbind(0), strict=True):
        gradients[name] = row.to(named[name].dtype)
    return tuple(gradients.get(name) for name in OPERANDS)


_trained = autograd.register_autograd_formula("shift_norm", _forward, _differentiate, reference.shift_norm)


def shift_norm(
    x: Tensor,
    has_left_neighbour: Tensor,
    offset: Tensor,
    scale: Tensor,
    before: Tensor,
    after: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """A token shift and its LayerNorm: LayerNorm(x + offset + scale * x + before * left + after * right).

    left and right are the rows before and after a row where those are its neighbours, zeros where they are
    not.

    Args:
        x: (rows, H), floating: the rows of an unpadded batch.
        has_left_neighbour: (rows,) bool: whether the row before a row is its neighbour, such as the token
            before it in the same sequence. has_left_neighbour[0] is False.
        offset: (H,), of the token shift.
        scale: (H,), of the token shift.
        before: (H,), of the token shift.
        after: (H,), of the token shift.
        weight: (H,), of the LayerNorm.
        norm_bias: (H,), of the LayerNorm.
        eps: added to the variance of the LayerNorm.

    Returns:
        (rows, H) in the dtype of x. Statistics are float32, float64 for float64. Differentiable.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit.

    Example:
        >>> x, zeros, ones = torch.tensor([[1.0, 2.0], [2.0, 6.0]]), torch.zeros(2), torch.ones(2)
        >>> has_left_neighbour = torch.tensor([False, True])
        >>> fastgate.ops.shift_norm(
        ...     x, has_left_neighbour, zeros, zeros, ones, zeros, ones, zeros, 1e-5
        ... ).round(decimals=3)
        tensor([[-1.,  1.],
                [-1.,  1.]])
    """
    vectors = (offset, scale, before, after, weight, norm_bias)
    if x.dim() != 2 or has_left_neighbour.shape != x.shape[:1]:
        got = f"shapes {tuple(x.shape)}, {tuple(has_left_neighbour.shape)}"
        _refuse("x, has_left_neighbour", got, "(rows, H), (rows,)", "unpad the batch")
    for name, vector in zip(PARAMETERS, vectors, strict=True):
        if vector.shape != x.shape[1:]:
            _refuse(name, f"shape {tuple(vector.shape)}", f"({x.shape[1]},)", "match x's last dimension")
    if x.dtype not in registry.DTYPES or has_left_neighbour.dtype != torch.bool:
        _refuse(
            "x, has_left_neighbour",
            f"{x.dtype}, {has_left_neighbour.dtype}",
            "a floating dtype, bool",
            "convert them",
        )
    if x.device != has_left_neighbour.device or x.device != weight.device:
        got = f"{x.device}, {has_left_neighbour.device}, {weight.device}"
        _refuse("x, has_left_neighbour, weight", got, "one device", "move them to x's device")
    call: Callable[..., Tensor] = torch.ops.fastgate.shift_norm
    if registry.bypasses_dispatcher(x):
        call = _trained if autograd.any_requires_grad(x, *vectors) else _forward
    return call(x, has_left_neighbour, *vectors, eps)


def _refuse(argument: str, got: object, wanted: str, remedy: str) -> NoReturn:
    raise ArgumentError(format_error("shift_norm", argument, got, wanted, remedy))
