"""gated_add_norm: LayerNorm(scale * residual + gate * dropout(x + bias) + offset), and a second LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.ops import autograd, reference, registry

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

_FORWARD_SCHEMA = f"gated_add_norm({_SCHEMA}) -> Tensor"
_BACKWARD_SCHEMA = (
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
    gradients = reference.gated_add_norm_backward(grad, **named)
    dx, dresidual, parameters = _empty_gradients(named["x"], named["residual"], requested)
    if requested & DX:
        dx.copy_(gradients.x.reshape(dx.shape))
    if requested & DRESIDUAL:
        dresidual.copy_(gradients.residual.reshape(dresidual.shape))
    for row, name in zip(parameters, _requested_parameters(requested), strict=True):
        if name == "gate":  # its row sums to the gradient
            row.zero_()[:1] = gradients.gate
        else:
            row.copy_(getattr(gradients, name))
    return dx, dresidual, parameters


def _requested_parameters(requested: int) -> list[str]:
    """The parameters whose gradients are requested, in the order in which backward stacks them."""
    return [name for name in PARAMETERS if requested & PARAMETER_BIT[name]]


def _empty_gradients(x: Tensor, residual: Tensor, requested: int) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dresidual, parameters): those not requested have no elements; parameters is (requested, H)."""
    dtype = torch.float64 if torch.float64 in (x.dtype, residual.dtype) else torch.float32
    return (
        x.new_empty(x.shape if requested & DX else (0,)),
        residual.new_empty(residual.shape if requested & DRESIDUAL else (0,)),
        x.new_empty((len(_requested_parameters(requested)), x.shape[-1]), dtype=dtype),
    )


registry.REFERENCE["gated_add_norm"] = registry.Implementation(
    "reference", _reference_forward, _reference_backward, frozenset(registry.DTYPES)
)


def _forward(x: Tensor, residual: Tensor, *operands: Any) -> Tensor:
    chosen = registry.implementation("gated_add_norm", x.device.type, x.dtype, residual.dtype)
    return chosen.forward(x, residual, *operands)  # type: ignore[no-any-return]


def _backward(grad: Tensor, x: Tensor, residual: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    chosen = registry.implementation("gated_add_norm", x.device.type, x.dtype, residual.dtype)
    return chosen.backward(grad, x, residual, *operands)  # type: ignore[no-any-return]


def _fake(x: Tensor, residual: Tensor, *operands: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def _fake_backward(grad: Tensor, x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(x, residual, rest[-1])


registry.define_op(_FORWARD_SCHEMA, _forward, _fake)
registry.define_op(_BACKWARD_SCHEMA, _backward, _fake_backward)


def _differentiate(ctx: autograd.Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    operands = autograd.saved_inputs(ctx)
    named = dict(zip(OPERANDS, operands, strict=True))
    needs = dict(zip(OPERANDS, ctx.needs_input_grad, strict=True))
    # Where u adds x and residual as they are, one gradient serves both and is written once.
    plain_sum = named["gate"] is None and named["scale"] is None and named["dropout_p"] == 0.0
    shared = plain_sum and named["x"].dtype == named["residual"].dtype and needs["x"] and needs["residual"]
    requested = sum(PARAMETER_BIT[name] for name in PARAMETERS if needs[name])
    requested |= DX if needs["x"] and not shared else 0
    requested |= DRESIDUAL if needs["residual"] else 0
    call = _backward if registry.bypasses_dispatcher(grad) else torch.ops.fastgate.gated_add_norm_backward
    dx, dresidual, stacked = call(grad, *operands, requested)
    gradients: dict[str, Tensor] = {}
    if needs["x"]:
        gradients["x"] = dresidual if shared else dx
    if needs["residual"]:
        gradients["residual"] = dresidual
    for name, row in zip(_requested_parameters(requested), stacked.unbind(0), strict=True):
        gradients[name] = (row.sum() if name == "gate" else row).to(named[name].dtype)
    return tuple(gradients.get(name) for name in OPERANDS)


_trained = autograd.register_autograd_formula("gated_add_norm", _forward, _differentiate, _reference_forward)


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
    """The end of a sublayer: LayerNorm(scale * residual + gate * dropout(x + bias) + offset). Given weight2,
    a second LayerNorm follows.

    Args:
        x: (..., H), floating: the sublayer's output, without the bias of its last Linear.
        residual: (..., H), floating, of x's shape and device; its dtype may be another one.
        weight: (H,), of the LayerNorm.
        norm_bias: (H,), of the LayerNorm.
        eps: added to the variance of the LayerNorm.
        bias: (H,), added to x before dropout.
        gate: a 0-d tensor or a number. A gate and a second LayerNorm never meet in one call.
        scale: (H,), multiplies residual.
        offset: (H,), added before the LayerNorm.
        dropout_p: probability of dropping an element of x + bias, in [0, 1). The mask is a function of a seed
            drawn from torch's default generator of x's device.
        weight2: (H,), of a second LayerNorm, together with norm_bias2.
        norm_bias2: (H,), of a second LayerNorm, together with weight2.
        eps2: added to the variance of the second LayerNorm.

    Returns:
        (..., H) in the promoted dtype of x and residual. Statistics are float32, float64 for float64.
        Differentiable in every tensor.

    Raises:
        ArgumentError: for shapes, dtypes, devices or values that do not fit.

    Example:
        >>> x, residual = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 4.0]])
        >>> y = fastgate.ops.gated_add_norm(x, residual, torch.ones(2), torch.zeros(2), 1e-5, gate=0.5)
        >>> y.round(decimals=3)
        tensor([[-1.,  1.]])
    """
    _check_operands(x, residual, weight, norm_bias)
    _check_vectors(weight.shape, bias, scale, offset)
    if weight2 is not None or norm_bias2 is not None:
        _check_second_norm(weight.shape, weight2, norm_bias2, gate)
    if gate is not None:
        gate = _gate_tensor(gate, x)
    seed = registry.draw_seed("gated_add_norm", dropout_p, x.device)
    call: Callable[..., Tensor] = torch.ops.fastgate.gated_add_norm
    if registry.bypasses_dispatcher(x):
        tensors = (x, residual, weight, norm_bias, bias, gate, scale, offset, weight2, norm_bias2)
        call = _trained if autograd.any_requires_grad(*tensors) else _forward
    return call(
        x, residual, weight, norm_bias, eps,
        bias, gate, scale, offset, dropout_p, seed, weight2, norm_bias2, eps2,
    )  # fmt: skip


def _check_operands(x: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor) -> None:
    shape = weight.shape
    if x.shape != residual.shape or x.shape[-1:] != shape or norm_bias.shape != shape:
        got = ", ".join(str(tuple(tensor.shape)) for tensor in (x, residual, weight, norm_bias))
        wanted = "(..., H), (..., H), (H,), (H,)"
        _refuse("x, residual, weight, norm_bias", f"shapes {got}", wanted, "reshape them")
    if x.dtype not in registry.DTYPES or residual.dtype not in registry.DTYPES:
        got = f"{x.dtype}, {residual.dtype}"
        _refuse("x, residual", got, "floating dtypes", "convert them before the call")
    if x.device != residual.device or x.device != weight.device:
        got = f"{x.device}, {residual.device}, {weight.device}"
        _refuse("x, residual, weight", got, "one device", "move them to x's device")


def _check_vectors(
    shape: torch.Size, bias: Tensor | None, scale: Tensor | None, offset: Tensor | None
) -> None:
    if bias is not None and bias.shape != shape:
        _refuse_vector("bias", bias, shape)
    if scale is not None and scale.shape != shape:
        _refuse_vector("scale", scale, shape)
    if offset is not None and offset.shape != shape:
        _refuse_vector("offset", offset, shape)


def _check_second_norm(
    shape: torch.Size, weight2: Tensor | None, norm_bias2: Tensor | None, gate: Tensor | float | None
) -> None:
    if weight2 is None or norm_bias2 is None:
        _refuse("weight2, norm_bias2", "one of them", "both or neither", "pass the other one too")
    if gate is not None:
        remedy = "apply the second norm in a call of its own"
        _refuse("gate", "a gate with a second norm", "one of the two", remedy)
    for vector in (weight2, norm_bias2):
        if vector.shape != shape:
            _refuse_vector("weight2, norm_bias2", vector, shape)


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
