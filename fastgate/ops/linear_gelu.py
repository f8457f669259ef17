"""linear_gelu: gelu(x W^T + b) with the exact (erf) GELU, the first half of a feed-forward block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.ops import derivatives, linear, registry

# Bits of the backward's `requested`.
DX, DWEIGHT, DBIAS = 1, 2, 4

_OPERANDS = "Tensor x, Tensor weight, Tensor? bias"
registry.LIBRARY.define(f"linear_gelu({_OPERANDS}) -> Tensor")
# v: x W^T + b, which backward then need not make again.
registry.LIBRARY.define(f"linear_gelu_saving({_OPERANDS}) -> (Tensor y, Tensor v)")
# v: None to make it again. requested: the bits above; what is not requested has no elements. db is float32, or 64.
registry.LIBRARY.define(
    f"linear_gelu_backward(Tensor grad, Tensor? v, {_OPERANDS}, int requested) -> (Tensor, Tensor, Tensor)"
)


def linear_gelu(x: Tensor, weight: Tensor | linear.Packed, bias: Tensor | None = None) -> Tensor:
    """gelu(x W^T + b), gelu(v) = v (1 + erf(v / sqrt 2)) / 2.

    x: (..., K), floating; weight: (N, K) of x's dtype, or what `linear.pack` made of one; bias: (N,). Returns
    (..., N) in x's dtype. Under autocast x and weight are cast as torch's F.linear casts them. Differentiable
    in every tensor.

    Raises ArgumentError for shapes, dtypes or devices that do not fit, Unsupported for a packed weight as
    `linear` does.
    """
    if isinstance(weight, linear.Packed):
        return weight.product(x, bias, gelu=True)
    autocast = torch.is_autocast_enabled(x.device.type)
    _check(x, weight, bias, autocast)
    dtype = _autocast_dtype(x) if autocast else x.dtype
    chosen = registry.implementation("linear_gelu", x.device.type, dtype)
    if chosen.backend == "reference" or (chosen.backend == "onednn" and not linear.takes(x, weight)):
        return F.gelu(F.linear(x, weight, bias))
    if autocast:
        x, weight = x.to(dtype), weight.to(dtype)
    direct = registry.bypasses_dispatcher(x)
    if not registry.any_requires_grad(x, weight, bias):
        return (chosen.forward if direct else torch.ops.fastgate.linear_gelu)(x, weight, bias)
    return (_LinearGelu.apply if direct else torch.ops.fastgate.linear_gelu_saving)(x, weight, bias)[0]


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
    alike = dtypes[0] == dtypes[1] == dtypes[2] and dtypes[0] in registry.DTYPES
    if not alike and not (autocast and registry.REFERENCE["linear_gelu"].dtypes.issuperset(dtypes)):
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
        dweight = linear.weight_gradient(dv, x)
    if requested & DBIAS:
        torch.sum(rows, 0, dtype=dbias.dtype, out=dbias)
    return dx, dweight, dbias


def _onednn_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear.product(x, weight, None if bias is None else bias.to(x.dtype), gelu=True)


def _onednn_saving(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    v = linear.product(x, weight, None if bias is None else bias.to(x.dtype))
    return F.gelu(v), v


def _onednn_backward(
    grad: Tensor, v: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, requested: int
) -> tuple[Tensor, Tensor, Tensor]:
    if v is None:
        _, v = _onednn_saving(x, weight, bias)
    return _from_product(grad, v, x, weight, requested, linear.rows_gradient)


def onednn() -> registry.Implementation:
    """The CPU's, where `linear.missing_for_onednn` finds nothing: bias and GELU within the product."""
    saving = (_onednn_saving, _onednn_backward)
    return registry.Implementation(
        "onednn", _onednn_forward, _onednn_backward, frozenset(linear.ONEDNN_DTYPES), saving
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
    (_reference_saving, _reference_backward),
)


def _chosen(x: Tensor) -> registry.Implementation:
    return registry.implementation("linear_gelu", x.device.type, x.dtype)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _chosen(x).forward(x, weight, bias)


def _saving(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    saving = _chosen(x).saving
    assert saving is not None  # every backend of this op has one
    return saving[0](x, weight, bias)


def _backward(grad: Tensor, v: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _chosen(x).backward(grad, v, x, *rest)


registry.LIBRARY.impl("linear_gelu", _forward, "CompositeExplicitAutograd")
registry.LIBRARY.impl("linear_gelu_saving", _saving, "CompositeExplicitAutograd")
registry.LIBRARY.impl("linear_gelu_backward", _backward, "CompositeExplicitAutograd")


def _cast_by_autocast(op: Any) -> Any:
    """`op` as autocast calls it: as `linear_gelu` does for its callers, for who calls the registered op."""

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        dtype = _autocast_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            return op(x.to(dtype), weight.to(dtype), bias)

    return call


for _key in ("AutocastCPU", "AutocastCUDA"):
    registry.LIBRARY.impl("linear_gelu", _cast_by_autocast(torch.ops.fastgate.linear_gelu), _key)
    registry.LIBRARY.impl(
        "linear_gelu_saving", _cast_by_autocast(torch.ops.fastgate.linear_gelu_saving), _key
    )


@torch.library.register_fake("fastgate::linear_gelu", lib=registry.LIBRARY)
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("fastgate::linear_gelu_saving", lib=registry.LIBRARY)
def _fake_saving(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    y = _fake(x, weight, bias)
    return y, torch.empty_like(y)


@torch.library.register_fake("fastgate::linear_gelu_backward", lib=registry.LIBRARY)
def _fake_backward(
    grad: Tensor, v: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, requested: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(x, weight, requested)


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(None, *inputs)


def _keep_product(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
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


class _LinearGelu(torch.autograd.Function):
    """The same for eager training, without the registration's cost."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, Tensor]:
        output = _saving(*operands)
        _keep_product(ctx, operands, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is not None and derivatives.needs_torch((grad,)):
            operands = ctx.saved_tensors[1:]
            return derivatives.differentiate_by_torch(
                _reference_forward, operands, ctx.needs_input_grad, (grad,)
            )
        return _differentiate(ctx, grad)


torch.library.register_autograd(
    "fastgate::linear_gelu", _differentiate, setup_context=_keep_operands, lib=registry.LIBRARY
)
torch.library.register_autograd(
    "fastgate::linear_gelu_saving", _differentiate, setup_context=_keep_product, lib=registry.LIBRARY
)
