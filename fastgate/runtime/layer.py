"""A layer of a patched encoder: its modules, what may stand for them, and the gate of its attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastgate.nn.hooks import is_itself
from fastgate.nn.packed_linear import PackedLinear
from fastgate.nn.replacement import Replacement
from fastgate.ops.linear import Packed
from fastgate.ops.linear import linear as product

Gate = float | Tensor
PLAIN_TENSORS = (Tensor, nn.Parameter)
WEIGHTED = (nn.Linear, nn.LayerNorm, nn.Embedding)


def is_skipped(gate: Gate) -> bool:
    return not isinstance(gate, Tensor) and gate == 0.0


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """A `kind` and nothing more: no subclass, no hooks, no replaced methods, no tensor subclass among the
    parameters, and a weight where the class has one."""
    if type(module) is not kind or not is_itself(module):
        return False
    parameters = module._parameters
    if kind in WEIGHTED and parameters.get("weight") is None:
        return False
    return all(p is None or type(p) in PLAIN_TENSORS for p in parameters.values())


def is_plain_norm(module: Any) -> bool:
    """A plain LayerNorm over the last dimension with weight and bias."""
    return (
        is_plain(module, nn.LayerNorm)
        and module._parameters.get("bias") is not None
        and tuple(module.normalized_shape) == tuple(module.weight.shape)
        and module.weight.dim() == 1
    )


def is_plain_dropout(module: Any) -> bool:
    """A plain Dropout, or the Identity that often takes its place."""
    return is_plain(module, nn.Dropout) or is_plain(module, nn.Identity)


def is_exact_gelu(activation: Any) -> bool:
    """x Phi(x) by torch, or by the module that transformers puts around it, and nothing more."""
    if not isinstance(activation, nn.Module):
        return activation is F.gelu
    kind = type(activation)
    if kind is nn.GELU:
        exact = activation.approximate == "none"
    else:
        named = (kind.__module__, kind.__qualname__) == ("transformers.activations", "GELUActivation")
        exact = named and activation.act is F.gelu
    return exact and is_itself(activation)


def is_linear_gelu(intermediate: Any) -> bool:
    """The first half of a feed-forward block is what `linear_gelu` computes; if not, it runs as a module."""
    return (
        weight_of(intermediate._modules["dense"]) is not None
        and is_exact_gelu(intermediate.intermediate_act_fn)
        and is_itself(intermediate)
    )


def weight_of(module: nn.Module) -> Tensor | Packed | None:
    """The weight, plain or packed, to multiply with in place of calling the module; None: call it."""
    if is_plain(module):
        return module._parameters["weight"]
    return module.packed if is_plain(module, PackedLinear) else None  # type: ignore[return-value]


class Dense(NamedTuple):
    """A Linear of a layer. plain: a product with its weight may stand for a call of the module."""

    module: Any
    plain: bool

    @staticmethod
    def of(module: Any) -> Dense:
        return Dense(module, weight_of(module) is not None)

    @property
    def weight(self) -> Tensor | Packed | None:
        """The weight, plain or packed, as it is now; None: call the module."""
        if not self.plain:
            return None
        module = self.module
        return module.packed if type(module) is PackedLinear else module._parameters["weight"]  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        found: Tensor | None = self.module._parameters["bias"]
        return found

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The product and the bias still to add; a module that is not plain is called, bias within."""
        if not self.plain:
            return self.module(x), None
        return product(x, self.weight), self.module._parameters["bias"]  # type: ignore[arg-type]


class End(NamedTuple):
    """What ends a block: dropout, the residual sum and a LayerNorm. plain: of each module, whether one op may
    stand for it; if not, it is called."""

    norm: Any
    dropout: Any
    plain_norm: bool
    plain_dropout: bool

    @staticmethod
    def of(output: Any) -> End:
        norm, dropout = output._modules["LayerNorm"], output._modules["dropout"]
        return End(norm, dropout, is_plain_norm(norm), is_plain_dropout(dropout))

    @property
    def rate(self) -> float:
        """The rate of a plain dropout now."""
        return drop(self.dropout)

    @property
    def fuses(self) -> bool:
        """Whether one op may stand for dropout, sum and LayerNorm."""
        return self.plain_norm and self.plain_dropout


def drop(module: Any) -> float:
    """The rate that a plain dropout drops at now."""
    return module.p if module.training and type(module) is nn.Dropout else 0.0


@dataclass(frozen=True, slots=True)
class Layer:
    """The modules of an encoder layer as they were found to be.

    module: the layer itself. at: its self-attention. query, key, value, dense: None where the attention was
    pruned. gelu: the first product of the feed-forward block, where `linear_gelu` may stand for all of
    `intermediate`; None: it is called. absorbable: the weights of key and value can be read.
    """

    module: Any
    at: Any
    query: Dense | None
    key: Dense | None
    value: Dense | None
    dense: Dense | None
    attention_end: End
    intermediate: Any
    gelu: Dense | None
    down: Dense
    output_end: End
    replacement: Replacement | None
    absorbable: bool

    @staticmethod
    def of(layer: Any) -> Layer:
        attention = layer._modules["attention"]._modules
        at, out = attention["self"], attention["output"]
        intermediate, output = layer._modules["intermediate"], layer._modules["output"]
        removed = hasattr(at, "fastgate_removed")
        names = ("query", "key", "value")
        query, key, value = (None if removed else Dense.of(at._modules[name]) for name in names)
        return Layer(
            layer,
            at,
            query,
            key,
            value,
            None if removed else Dense.of(out._modules["dense"]),
            End.of(out),
            intermediate,
            Dense.of(intermediate._modules["dense"]) if is_linear_gelu(intermediate) else None,
            Dense.of(output._modules["dense"]),
            End.of(output),
            attention.get("replacement"),
            not removed and all(is_plain(at._modules[name]) for name in names[1:]),
        )

    @property
    def rate(self) -> float:
        """The rate of the attention's dropout now: transformers reads the module's number and never calls it,
        and asks the attention whether it trains."""
        at = self.at
        return at._modules["dropout"].p if at.training else 0.0

    @property
    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of query, key and value, which are plain."""
        return self.query.bias, self.key.bias, self.value.bias  # type: ignore[union-attr]

    @property
    def fused_qkv(self) -> Packed | None:
        """Query, key and value as one weight, where `freeze` packed them together and none was replaced."""
        joints = []
        for part in (self.query, self.key, self.value):
            weight = part.weight  # type: ignore[union-attr]
            joints.append(weight.fused_qkv if isinstance(weight, Packed) else None)
        return joints[0] if joints[0] is joints[1] is joints[2] else None

    def heads_in(self, width: int) -> int:
        """How many heads rows of this width hold. As in transformers the size of a head says so, and not the
        number of heads, which need not be that of this layer."""
        return width // self.at.attention_head_size

    @property
    def reads_neighbours(self) -> bool:
        """Whether the replacement reads the rows beside a row (`shift`)."""
        return self.replacement is not None and self.replacement.reads_neighbours

    @property
    def has_bias(self) -> bool:
        """Whether the replacement adds a vector."""
        return self.replacement is not None and self.replacement.shift is not None

    @property
    def shift_vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shift, scale, before and after of a replacement that mixes."""
        parameters = self.replacement._parameters  # type: ignore[union-attr]
        return tuple(parameters[name] for name in ("shift", "scale", "before", "after"))  # type: ignore[return-value]

    def residual_affine(self, share: Gate) -> tuple[Tensor | None, Tensor | None]:
        """(a, b) of a * h + b, what the residual becomes when `share` of the attention is replaced; (None,
        None) for `shift`, whose rows are added before."""
        if self.replacement is None or self.replacement.reads_neighbours:
            return None, None
        return self.replacement.scale_and_offset(share)

    def fold_next_norm(self, norm: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Weight and bias of `norm`, which is before this layer, whose attention is skipped, with the
        replacement folded in; and the LayerNorm that the attention leaves behind as the operands of a second
        norm. Both LayerNorms are plain."""
        then = self.attention_end.norm
        scale, shift = self.residual_affine(1.0)
        weight: Tensor = norm.weight
        norm_bias: Tensor = norm.bias
        if scale is not None:
            weight, norm_bias = weight * scale, norm_bias * scale
        if shift is not None:
            norm_bias = norm_bias + shift
        return weight, norm_bias, {"weight2": then.weight, "norm_bias2": then.bias, "eps2": then.eps}


def replacement_of(layer: Any) -> Replacement | None:
    found: Replacement | None = layer._modules["attention"]._modules.get("replacement")
    return found


def shifts_of(layers: Iterable[Any], gates: Iterable[Gate]) -> tuple[int, ...]:
    """The layers that mix rows without attention: skipped, and replaced by `shift`."""
    found = []
    for i, (layer, gate) in enumerate(zip(layers, gates, strict=True)):
        replacement = replacement_of(layer)
        if is_skipped(gate) and replacement is not None and replacement.reads_neighbours:
            found.append(i)
    return tuple(found)
