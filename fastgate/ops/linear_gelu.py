"""linear_gelu: gelu(x W^T + b) with the exact (erf) GELU, the first half of a feed-forward block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.ops import autograd, registry
from fastgate.ops.linear import (
    ONEDNN_DTYPES,
    Packed,
    input_gradient,
    onednn_product,
    onednn_supports,
    weight_gradient,
)

# Bits of the backward's `requested`.
DX, DWEIGHT, DBIAS = 1, 2, 4

_OPERANDS = "Tensor x, Tensor weight, Tensor? bias"
_FORWARD_SCHEMA = f"linear_gelu({_OPERANDS}) -> Tensor"
# v: x W^T + b, which backward then need not make again.
_SAVING_SCHEMA = f"linear_gelu_saving({_OPERANDS}) -> (Tensor y, Tensor v)"
# v: None to make it again. requested: the bits above; what is not requested has no elements. db is float32,
# or 64.
_BACKWARD_SCHEMA = (
    f"linear_gelu_backward(Tensor grad, Tensor? v, {_OPERANDS}, int requested) -> (Tensor, Tensor, Tensor)"
)


def linear_gelu(x: Tensor, weight: Tensor | Packed, bias: Tensor | None = None) -> Tensor:
    """The first half of a feed-forward block: gelu(x W^T + b), with gelu(v) = v (1 + erf(v / sqrt 2)) / 2.

    Args:
        x: (..., K), floating. Under autocast x and weight are cast as torch's F.linear casts them.
        weight: (N, K) of x's dtype, or a packed one (`from fastgate.ops.linear import pack`).
        bias: (N,) of x's dtype.

    Returns:
        (..., N) in x's dtype, or autocast's. Differentiable in every tensor.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit.
        Unsupported: for a packed weight in training, under autocast, where torch traces, or with another
            dtype.

    Example:
        >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        >>> fastgate.ops.linear_gelu(x, weight).round(decimals=3)
        tensor([[ 0.8410, -0.0460]])
    """
    if isinstance(weight, Packed):
        return weight.product(x, bias, gelu=True)
    autocast = torch.is_autocast_enabled(x.device.type)
    _check(x, weight, bias, autocast)
    dtype = _autocast_dtype(x) if autocast else x.dtype
    chosen = registry.implementation("linear_gelu", x.device.type, dtype, x=x, weight=weight)
    if chosen is registry.REFERENCE["linear_gelu"]:
        return F.gelu(F.linear(x, weight, bias))
    if autocast:
        x, weight = x.to(dtype), weight.to(dtype)
    direct = registry.bypasses_dispatcher(x)
    if not autograd.any_requires_grad(x, weight, bias):
        forward = chosen.forward if direct else torch.ops.fastgate.linear_gelu
        return forward(x, weight, bias)  # type: ignore[no-any-return]
    saving = _trained if direct else torch.ops.fastgate.linear_gelu_saving
    return saving(x, weight, bias)[0]  # type: ignore[no-any-return]


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of x: float64 stays."""
    return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, autocast: bool) -> None:
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        got = f"shapes {tuple(x.shape)}, {tuple(weight.shape)}"
        _refuse("x, weight", got, "(..., K), (N, K)", "reshape them")
    vector = weight if bias is None else bias
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        _refuse("bias", f"shape {tuple(bias.shape)}", f"shape ({weight.shape[0]},)", "match weight's rows")
    dtypes = (x.dtype, weight.dtype, vector.dtype)
    same = dtypes[0] == dtypes[1] == dtypes[2] and dtypes[0] in registry.DTYPES
    if not same and not (autocast and set(dtypes) <= set(registry.DTYPES)):
        wanted = "floating dtypes" if autocast else "one floating dtype"
        _refuse("x, weight, bias", ", ".join(map(str, dtypes)), wanted, "convert them, or use torch.autocast")
    if not x.device == weight.device == vector.device:
        got = f"{x.device}, {weight.device}, {vector.device}"
        _refuse("x, weight, bias", got, "one device", "move them to x's device")


def _refuse(argument: str, got: object, wanted: str, remedy: str) -> NoReturn:
    raise ArgumentError(format_error("linear_gelu", argument, got, wanted, remedy))


def _reference_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.gelu(_reference_product(x, weight, bias))


def _reference_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _reference_saving(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    v = _reference_product(x, weight, bias)
    return F.gelu(v), v


def _reference_backward(
    grad: Tensor, v: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, requested: int
) -> tuple[Tensor, Tensor, Tensor]:
    if v is None:
        v = _reference_product(x, weight, bias)
    return _from_product(grad, v, x, weight, requested, torch.matmul)


def _from_product(
    grad: Tensor,
    v: Tensor,
    x: Tensor,
    weight: Tensor,
    requested: int,
    times: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients from v = x W^T + b; times: makes dx of dv and the weight."""
    dv = torch.ops.aten.gelu_backward(grad, v)
    dx, dweight, dbias = _empty_gradients(x, weight, requested)
    rows = dv.reshape(-1, weight.shape[0])
    if requested & DX:
        dx = times(dv, weight)
    if requested & DWEIGHT:
        dweight = weight_gradient(dv, x)
    if requested & DBIAS:
        torch.sum(rows, 0, dtype=dbias.dtype, out=dbias)
    return dx, dweight, dbias


def _onednn_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return onednn_product(x, weight, None if bias is None else bias.to(x.dtype), gelu=True)


def _onednn_saving(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    v = onednn_product(x, weight, None if bias is None else bias.to(x.dtype))
    return F.gelu(v), v


def _onednn_backward(
    grad: Tensor, v: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, requested: int
) -> tuple[Tensor, Tensor, Tensor]:
    if v is None:
        _, v = _onednn_saving(x, weight, bias)
    return _from_product(grad, v, x, weight, requested, input_gradient)


def onednn() -> registry.Implementation:
    """The CPU's, where `linear.missing_for_onednn` finds nothing: bias and GELU within the product."""
    saving = registry.Saving(_onednn_saving, _onednn_backward)
    return registry.Implementation(
        "onednn", _onednn_forward, _onednn_backward, ONEDNN_DTYPES, saving, onednn_supports
    )


def _empty_gradients(x: Tensor, weight: Tensor, requested: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape if requested & DX else (0,)),
        weight.new_empty(weight.shape if requested & DWEIGHT else (0,)),
        weight.new_empty(weight.shape[0] if requested & DBIAS else 0, dtype=dtype),
    )


registry.REFERENCE["linear_gelu"] = registry.Implementation(
    "reference",
    _reference_forward,
    _reference_backward,
    frozenset(registry.DTYPES),
    registry.Saving(_reference_saving, _reference_backward),
)


def _chosen(x: Tensor) -> registry.Implementation:
    return registry.implementation("linear_gelu", x.device.type, x.dtype)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _chosen(x).forward(x, weight, bias)  # type: ignore[no-any-return]


def _saving(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    saving = _chosen(x).saving
    assert saving is not None  # every backend of this op has one
    return saving.forward(x, weight, bias)  # type: ignore[no-any-return]


def _backward(grad: Tensor, v: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _chosen(x).backward(grad, v, x, *rest)  # type: ignore[no-any-return]


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_saving(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    y = _fake(x, weight, bias)
    return y, torch.empty_like(y)


def _fake_backward(
    grad: Tensor, v: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, requested: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(x, weight, requested)


registry.define_op(_FORWARD_SCHEMA, _forward, _fake)
registry.define_op(_SAVING_SCHEMA, _saving, _fake_saving)
registry.define_op(_BACKWARD_SCHEMA, _backward, _fake_backward)


def _cast_by_autocast(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` as autocast calls it: as `linear_gelu` does for its callers, for who calls the registered op."""

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        dtype = _autocast_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            return op(x.to(dtype), weight.to(dtype), bias)

    return call


for _key in ("AutocastCPU", "AutocastCUDA"):
    for _name in ("linear_gelu", "linear_gelu_saving"):
        _op = getattr(torch.ops.fastgate, _name)
        registry.LIBRARY.impl(_name, _cast_by_autocast(_op), _key)  # type: ignore[no-untyped-call]


def _keep_operands(ctx: autograd.Context, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(None, *inputs)  # type: ignore[arg-type]


def _keep_product(ctx: autograd.Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: autograd.Context, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    v, x, weight, bias = ctx.saved_tensors
    needs = ctx.needs_input_grad
    requested = sum(bit for bit, need in zip((DX, DWEIGHT, DBIAS), needs, strict=True) if need)
    call = _backward if registry.bypasses_dispatcher(grad) else torch.ops.fastgate.linear_gelu_backward
    dx, dweight, dbias = call(grad, v, x, weight, bias, requested)
    return (
        dx if needs[0] else None,
        dweight if needs[1] else None,
        dbias.to(bias.dtype) if needs[2] else None,
    )


def _operands(ctx: autograd.Context) -> tuple[Any, ...]:
    return ctx.saved_tensors[1:]


autograd.register_autograd_formula(
    "linear_gelu", _forward, _differentiate, _reference_forward, _keep_operands, _operands
)
_trained = autograd.register_autograd_formula(
    "linear_gelu_saving", _saving, _differentiate, _reference_forward, _keep_product, _operands
)
