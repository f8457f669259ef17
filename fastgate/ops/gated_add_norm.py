"""gated_add_norm: LayerNorm(scale * residual + gate * dropout(x + bias) + offset), and a second LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.ops import reference, registry

_SCHEMA = (
    "Tensor x, Tensor residual, Tensor weight, Tensor norm_bias, float eps, Tensor? bias, Tensor? gate, "
    "Tensor? scale, Tensor? offset, float dropout_p, Tensor? seed, Tensor? weight2, Tensor? norm_bias2, "
    "float eps2"
)
OPERANDS = tuple(operand.split()[1] for operand in _SCHEMA.split(", "))
# Bits of the backward's `requested`, and the order in which it stacks the gradients of the parameters.
DX, DRESIDUAL = 1, 2
PARAMETERS = ("bias", "gate", "scale", "offset", "weight", "norm_bias", "weight2", "norm_bias2")
PARAMETER_BIT = {name: 4 << place for place, name in enumerate(PARAMETERS)}

registry.LIBRARY.define(f"gated_add_norm({_SCHEMA}) -> Tensor")
registry.LIBRARY.define(
    f"gated_add_norm_backward(Tensor grad, {_SCHEMA}, int requested) -> (Tensor, Tensor, Tensor)"
)


def _for_reference(operands: tuple[Any, ...]) -> dict[str, Any]:
    """The schema's operands as the reference names them: the seed's mask in place of the seed."""
    named = dict(zip(OPERANDS, operands, strict=True))
    seed, x, dropout_p = named.pop("seed"), named["x"], named["dropout_p"]
    if dropout_p > 0.0:
        hidden = x.shape[-1]
        rows = x.numel() // hidden if hidden else 0
        named["mask"] = reference.keep_mask(seed, rows, hidden, dropout_p).reshape(x.shape)
    return named


def _reference_forward(*operands: Any) -> Tensor:
    return reference.gated_add_norm(**_for_reference(operands)).contiguous()


def _reference_backward(grad: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    requested = operands[-1]
    named = _for_reference(operands[:-1])
    found = reference.gated_add_norm_backward(grad, **named)
    dx, dresidual, parameters = _empty_gradients(named["x"], named["residual"], requested)
    if requested & DX:
        dx.copy_(found.x.reshape(dx.shape))
    if requested & DRESIDUAL:
        dresidual.copy_(found.residual.reshape(dresidual.shape))
    for row, name in zip(parameters, _asked(requested), strict=True):
        if name == "gate":  # its row sums to the gradient
            row.zero_()[:1] = found.gate
        else:
            row.copy_(getattr(found, name))
    return dx, dresidual, parameters


def _asked(requested: int) -> list[str]:
    return [name for name in PARAMETERS if requested & PARAMETER_BIT[name]]


def _empty_gradients(x: Tensor, residual: Tensor, requested: int) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dresidual, parameters): those not requested have no elements; parameters is (number requested, H)."""
    dtype = torch.float64 if torch.float64 in (x.dtype, residual.dtype) else torch.float32
    return (
        x.new_empty(x.shape if requested & DX else (0,)),
        residual.new_empty(residual.shape if requested & DRESIDUAL else (0,)),
        x.new_empty((len(_asked(requested)), x.shape[-1]), dtype=dtype),
    )


registry.REFERENCE["gated_add_norm"] = registry.Implementation(
    "reference", _reference_forward, _reference_backward, frozenset(registry.DTYPES)
)


def _forward(x: Tensor, residual: Tensor, *operands: Any) -> Tensor:
    chosen = registry.implementation("gated_add_norm", x.device.type, x.dtype, residual.dtype)
    return chosen.forward(x, residual, *operands)


def _backward(grad: Tensor, x: Tensor, residual: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    chosen = registry.implementation("gated_add_norm", x.device.type, x.dtype, residual.dtype)
    return chosen.backward(grad, x, residual, *operands)  # type: ignore[return-value]


registry.LIBRARY.impl("gated_add_norm", _forward, "CompositeExplicitAutograd")
registry.LIBRARY.impl("gated_add_norm_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastgate::gated_add_norm", lib=registry.LIBRARY)
def _fake(x: Tensor, residual: Tensor, *operands: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


@torch.library.register_fake("fastgate::gated_add_norm_backward", lib=registry.LIBRARY)
def _fake_backward(grad: Tensor, x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(x, residual, rest[-1])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    operands = registry.saved_inputs(ctx)
    given = dict(zip(OPERANDS, operands, strict=True))
    needs = dict(zip(OPERANDS, ctx.needs_input_grad, strict=True))
    # Where u adds x and residual alike, one gradient serves both and is written once.
    alike = given["gate"] is None and given["scale"] is None and given["dropout_p"] == 0.0
    shared = alike and given["x"].dtype == given["residual"].dtype and needs["x"] and needs["residual"]
    requested = sum(PARAMETER_BIT[name] for name in PARAMETERS if needs[name])
    requested |= DX if needs["x"] and not shared else 0
    requested |= DRESIDUAL if needs["residual"] else 0
    call = _backward if registry.bypasses_dispatcher(grad) else torch.ops.fastgate.gated_add_norm_backward
    dx, dresidual, stacked = call(grad, *operands, requested)
    found: dict[str, Tensor] = {}
    if needs["x"]:
        found["x"] = dresidual if shared else dx
    if needs["residual"]:
        found["residual"] = dresidual
    for name, row in zip(_asked(requested), stacked.unbind(0), strict=True):
        found[name] = (row.sum() if name == "gate" else row).to(given[name].dtype)
    return tuple(found.get(name) for name in OPERANDS)


_trained = registry.register_autograd_formula("gated_add_norm", _forward, _differentiate, _reference_forward)


def gated_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    gate: Tensor | float | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    dropout_p: float = 0.0,
    weight2: Tensor | None = None,
    norm_bias2: Tensor | None = None,
    eps2: float = 0.0,
) -> Tensor:
    """LayerNorm(scale * residual + gate * dropout(x + bias) + offset), and a second LayerNorm given weight2.

    x, residual: (..., H), floating. weight, norm_bias, weight2, norm_bias2, bias, scale, offset: (H,).
    gate: 0-d tensor or float; a gate and a second norm never meet in one call. dropout_p: in [0, 1); the
    mask is a function of a seed drawn from torch's default generator of x's device. Returns (..., H) in the
    promoted dtype of x and residual; statistics are float32 (float64 for float64). Differentiable in every
    tensor.

    Raises ArgumentError for shapes, dtypes or values that do not fit.
    """
    shape = weight.shape
    if x.shape != residual.shape or x.shape[-1:] != shape or norm_bias.shape != shape:
        got = ", ".join(str(tuple(tensor.shape)) for tensor in (x, residual, weight, norm_bias))
        _refuse(
            "x, residual, weight, norm_bias",
            f"shapes {got}",
            "(..., H), (..., H), (H,), (H,)",
            "reshape them",
        )
    if x.dtype not in registry.DTYPES or residual.dtype not in registry.DTYPES:
        _refuse(
            "x, residual", f"{x.dtype}, {residual.dtype}", "floating dtypes", "convert them before the call"
        )
    if x.device != residual.device or x.device != weight.device:
        got = f"{x.device}, {residual.device}, {weight.device}"
        _refuse("x, residual, weight", got, "one device", "move them to x's device")
    if bias is not None and bias.shape != shape:
        _refuse_vector("bias", bias, shape)
    if scale is not None and scale.shape != shape:
        _refuse_vector("scale", scale, shape)
    if offset is not None and offset.shape != shape:
        _refuse_vector("offset", offset, shape)
    if weight2 is not None or norm_bias2 is not None:
        if weight2 is None or norm_bias2 is None:
            _refuse("weight2, norm_bias2", "one of them", "both or neither", "pass the other one too")
        if gate is not None:
            _refuse(
                "gate",
                "a gate with a second norm",
                "one of the two",
                "apply the second norm in a call of its own",
            )
        if weight2.shape != shape or norm_bias2.shape != shape:
            _refuse_vector("weight2, norm_bias2", weight2 if weight2.shape != shape else norm_bias2, shape)
    if gate is not None:
        gate = _gate_tensor(gate, x)
    seed = registry.draw_seed("gated_add_norm", dropout_p, x.device)
    call: Callable[..., Tensor] = torch.ops.fastgate.gated_add_norm
    if registry.bypasses_dispatcher(x):
        tensors = (x, residual, weight, norm_bias, bias, gate, scale, offset, weight2, norm_bias2)
        call = _trained if registry.any_requires_grad(*tensors) else _forward
    return call(
        x, residual, weight, norm_bias, eps,
        bias, gate, scale, offset, dropout_p, seed, weight2, norm_bias2, eps2,
    )  # fmt: skip


def _gate_tensor(gate: Tensor | float, x: Tensor) -> Tensor | None:
    if not isinstance(gate, Tensor):
        return None if gate == 1.0 else torch.full((), gate, dtype=torch.float32, device=x.device)
    if gate.dim() != 0:
        _refuse("gate", f"shape {tuple(gate.shape)}", "a 0-d tensor", "pass one gate a call")
    return gate


def _refuse_vector(name: str, vector: Tensor, shape: torch.Size) -> NoReturn:
    _refuse(name, f"shape {tuple(vector.shape)}", f"shape {tuple(shape)}", "match weight's shape")


def _refuse(argument: str, got: object, wanted: str, remedy: str) -> NoReturn:
    raise ArgumentError(format_error("gated_add_norm", argument, got, wanted, remedy))
