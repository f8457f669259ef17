"""A layer of a patched encoder: its modules, what may stand for them, and the gate of its attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .ops.linear import Packed
from .ops.linear import linear as product
from .packed import PackedLinear
from .replacement import Replacement

Gate = float | Tensor


def is_skipped(gate: Gate) -> bool:
    return not isinstance(gate, Tensor) and gate == 0.0


class Parts(NamedTuple):
    """The modules of an encoder layer, in the order of families.LAYER_MODULES.

    They are read at each forward, so what is put in their place is seen, and where nn.Module keeps them: as
    attributes they take several times as long to find, which a small batch feels.
    """

    layer: Any
    attention: Any
    at: Any  # attention.self
    out: Any  # attention.output
    intermediate: Any
    output: Any

    @staticmethod
    def of(layer: Any) -> Parts:
        modules = layer._modules
        attention = modules["attention"]
        at, out = attention._modules["self"], attention._modules["output"]
        return Parts(layer, attention, at, out, modules["intermediate"], modules["output"])


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """A `kind` and nothing more: no subclass, no hooks, no replaced forward."""
    return type(module) is kind and _is_itself(module)


def _is_itself(module: nn.Module) -> bool:
    """No hooks, no replaced forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _is_exact_gelu(activation: Any) -> bool:
    """x Phi(x) by torch, or by the module that transformers puts around it, and nothing more."""
    if not isinstance(activation, nn.Module):
        return activation is F.gelu
    kind = type(activation)
    if kind is nn.GELU:
        exact = activation.approximate == "none"
    else:
        named = (kind.__module__, kind.__qualname__) == ("transformers.activations", "GELUActivation")
        exact = named and activation.act is F.gelu
    return exact and _is_itself(activation)


def is_linear_gelu(intermediate: Any) -> bool:
    """The first half of a feed-forward block is what `linear_gelu` computes; if not, it runs as a module."""
    return (
        weight_of(intermediate._modules["dense"]) is not None
        and _is_exact_gelu(intermediate.intermediate_act_fn)
        and _is_itself(intermediate)
    )


def weight_of(module: nn.Module) -> Tensor | Packed | None:
    """The weight, plain or packed, to multiply with in place of calling the module; None: call it."""
    if is_plain(module):
        return module._parameters["weight"]
    return module.packed if is_plain(module, PackedLinear) else None  # type: ignore[return-value]


def linear(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A Linear's product and the bias still to add; a module that is not plain is called, bias within."""
    weight = weight_of(module)
    if weight is None:
        return module(x), None
    return product(x, weight), module._parameters["bias"]


def drop(module: Any) -> float:
    """The rate a Dropout module uses now."""
    return module.p if module.training else 0.0


def norm_and_drop(output: Any) -> tuple[Any, float]:
    """The LayerNorm of a block's end and the rate of its dropout now."""
    return output._modules["LayerNorm"], drop(output._modules["dropout"])


def biases(at: dict[str, Any]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of query, key and value."""
    return tuple(at[name]._parameters["bias"] for name in ("query", "key", "value"))  # type: ignore[return-value]


def joint(at: dict[str, Any]) -> Packed | None:
    """Query, key and value as one weight, where `freeze` packed them together and none was replaced since."""
    joints = []
    for name in ("query", "key", "value"):
        weight = weight_of(at[name])
        joints.append(weight.joint if isinstance(weight, Packed) else None)
    return joints[0] if joints[0] is joints[1] is joints[2] else None


def replacement_of(layer: Any) -> Replacement | None:
    found: Replacement | None = layer._modules["attention"]._modules.get("replacement")
    return found


def adds(layer: Any) -> bool:
    """Whether a layer's replacement adds a vector."""
    replacement = replacement_of(layer)
    return replacement is not None and replacement.shift is not None


def mixes(layer: Any) -> bool:
    """Whether a layer's replacement reads the rows beside a row (`shift`)."""
    replacement = replacement_of(layer)
    return replacement is not None and replacement.mixes


def shift_vectors(layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shift, scale, before and after of a layer's replacement that mixes."""
    parameters = layer._modules["attention"]._modules["replacement"]._parameters
    return tuple(parameters[name] for name in ("shift", "scale", "before", "after"))  # type: ignore[return-value]


def shifts_of(layers: Iterable[Any], gates: Iterable[Gate]) -> tuple[int, ...]:
    """The layers that mix rows without attention: skipped, and replaced by `shift`."""
    pairs = zip(layers, gates, strict=True)
    return tuple(i for i, (layer, gate) in enumerate(pairs) if is_skipped(gate) and mixes(layer))


def stand_in(layer: Any, share: Gate) -> tuple[Tensor | None, Tensor | None]:
    """(a, b) of a * h + b, what a layer's residual becomes when `share` of the attention is replaced; (None,
    None) for `shift`, whose rows are added before."""
    replacement = replacement_of(layer)
    if replacement is None or replacement.mixes:
        return None, None
    return replacement.scale_and_shift(share)


def fold(following: Any, norm: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Weight and bias of `norm`, before a layer whose attention is skipped, with its replacement folded in,
    and the LayerNorm that this attention leaves behind as the operands of a second norm."""
    then = following.attention.output.LayerNorm
    scale, shift = stand_in(following, 1.0)
    weight: Tensor = norm.weight
    norm_bias: Tensor = norm.bias
    if scale is not None:
        weight, norm_bias = weight * scale, norm_bias * scale
    if shift is not None:
        norm_bias = norm_bias + shift
    return weight, norm_bias, {"weight2": then.weight, "norm_bias2": then.bias, "eps2": then.eps}
