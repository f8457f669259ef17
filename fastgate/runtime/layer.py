"""A layer of a patched encoder: its modules, what may stand for them, and the gate of its attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from fastgate.nn.hooks import is_itself
from fastgate.nn.packed_linear import PackedLinear
from fastgate.nn.plain_modules import dropout_rate, is_exact_gelu, is_plain, is_plain_dropout, is_plain_norm
from fastgate.nn.protocols import BertLikeLayer
from fastgate.nn.replacement import Replacement
from fastgate.ops.linear import Packed, multiply

# 1.0: the attention runs. 0.0: it is skipped. A 0-d tensor: its output is multiplied by the gate.
Gate = float | Tensor


def is_skipped(gate: Gate) -> bool:
    """Whether the attention of a layer with this gate does not run."""
    return not isinstance(gate, Tensor) and gate == 0.0


def is_linear_gelu(intermediate: Any) -> bool:
    """Whether `linear_gelu` computes the first half of a feed-forward block. If not, the module is called."""
    return (
        weight_of(intermediate._modules["dense"]) is not None
        and is_exact_gelu(intermediate.intermediate_act_fn)
        and is_itself(intermediate)
    )


def weight_of(module: nn.Module) -> Tensor | Packed | None:
    """The weight, plain or packed, to multiply with in place of calling the module. None: call it."""
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
        """The weight, plain or packed, as it is now. None: call the module."""
        if not self.plain:
            return None
        module = self.module
        return module.packed if type(module) is PackedLinear else module._parameters["weight"]

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.module._parameters["bias"]
        return bias

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The product and the bias still to add. A module that is not plain is called and adds its own."""
        if not self.plain:
            return self.module(x), None
        return multiply(x, self.weight), self.module._parameters["bias"]  # type: ignore[arg-type]


class AddNorm(NamedTuple):
    """The end of a sublayer: dropout, the residual sum and a LayerNorm.

    plain_norm, plain_dropout: one op may stand for the module. If not, it is called.
    """

    norm: Any
    dropout: Any
    plain_norm: bool
    plain_dropout: bool

    @staticmethod
    def of(output: Any) -> AddNorm:
        norm, dropout = output._modules["LayerNorm"], output._modules["dropout"]
        return AddNorm(norm, dropout, is_plain_norm(norm), is_plain_dropout(dropout))

    @property
    def dropout_rate(self) -> float:
        """The rate of a plain dropout now."""
        return dropout_rate(self.dropout)

    @property
    def is_fused(self) -> bool:
        """Whether one op may stand for dropout, sum and LayerNorm."""
        return self.plain_norm and self.plain_dropout


@dataclass(frozen=True, slots=True)
class Layer:
    """The modules of an encoder layer as they were found to be.

    module: the layer itself. attention: its self-attention module. query, key, value, dense: None where the
    attention was pruned. gelu: the first Linear of the feed-forward block, where `linear_gelu` may stand for
    all of `intermediate`. None: `intermediate` is called. absorbable: the weights of key and value can be
    read.
    """

    module: Any
    attention: Any
    query: Dense | None
    key: Dense | None
    value: Dense | None
    dense: Dense | None
    attention_end: AddNorm
    intermediate: Any
    gelu: Dense | None
    down: Dense
    output_end: AddNorm
    replacement: Replacement | None
    absorbable: bool

    @staticmethod
    def of(layer: Any) -> Layer:
        attention = layer._modules["attention"]._modules
        self_attention, attention_output = attention["self"], attention["output"]
        intermediate, output = layer._modules["intermediate"], layer._modules["output"]
        removed = hasattr(self_attention, "fastgate_removed")
        names = ("query", "key", "value")
        query, key, value = (None if removed else Dense.of(self_attention._modules[name]) for name in names)
        return Layer(
            module=layer,
            attention=self_attention,
            query=query,
            key=key,
            value=value,
            dense=None if removed else Dense.of(attention_output._modules["dense"]),
            attention_end=AddNorm.of(attention_output),
            intermediate=intermediate,
            gelu=Dense.of(intermediate._modules["dense"]) if is_linear_gelu(intermediate) else None,
            down=Dense.of(output._modules["dense"]),
            output_end=AddNorm.of(output),
            replacement=attention.get("replacement"),
            absorbable=not removed and all(is_plain(self_attention._modules[name]) for name in names[1:]),
        )

    @property
    def attention_dropout(self) -> float:
        """The rate of the attention's dropout now. transformers reads the module's number and never calls it,
        and asks the attention whether it trains."""
        return self.attention._modules["dropout"].p if self.attention.training else 0.0

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.attention.scaling  # type: ignore[no-any-return]

    @property
    def qkv_biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of query, key and value, which are plain."""
        return self.query.bias, self.key.bias, self.value.bias  # type: ignore[union-attr]

    @property
    def fused_qkv(self) -> Packed | None:
        """Query, key and value as one weight, where `freeze` packed them together and none was replaced."""
        fused = []
        for dense in (self.query, self.key, self.value):
            weight = dense.weight  # type: ignore[union-attr]
            fused.append(weight.fused_qkv if isinstance(weight, Packed) else None)
        return fused[0] if fused[0] is fused[1] is fused[2] else None

    def heads_in(self, width: int) -> int:
        """How many heads rows of this width hold. As in transformers the size of a head decides, and not the
        config's number of heads, which need not be that of this layer."""
        return width // self.attention.attention_head_size  # type: ignore[no-any-return]

    @property
    def reads_neighbours(self) -> bool:
        """Whether the replacement reads the rows beside a row."""
        return self.replacement is not None and self.replacement.reads_neighbours

    @property
    def adds_offset(self) -> bool:
        """Whether the replacement adds a vector."""
        return self.replacement is not None and self.replacement.offset is not None

    def residual_affine(self, share: Gate) -> tuple[Tensor | None, Tensor | None]:
        """(a, b) of a * h + b, what the residual becomes when `share` of the attention is replaced.

        (None, None) for a replacement that reads neighbours, whose rows are added before.
        """
        if self.replacement is None or self.replacement.reads_neighbours:
            return None, None
        return self.replacement.scale_and_offset(share)

    def fold_next_norm(self, norm: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The operands of `norm`, the LayerNorm before this layer, and of the LayerNorm that this layer's
        skipped attention leaves behind, so that one op computes both. Both LayerNorms are plain.

        Returns weight and bias of `norm` with the replacement folded in, and the operands of the second norm.
        """
        second = self.attention_end.norm
        scale, offset = self.residual_affine(1.0)
        weight: Tensor = norm.weight
        norm_bias: Tensor = norm.bias
        if scale is not None:
            weight, norm_bias = weight * scale, norm_bias * scale
        if offset is not None:
            norm_bias = norm_bias + offset
        return weight, norm_bias, {"weight2": second.weight, "norm_bias2": second.bias, "eps2": second.eps}


def replacement_of(layer: BertLikeLayer) -> Replacement | None:
    """The replacement of a layer of transformers, if it has one."""
    modules: dict[str, Any] = cast(nn.Module, layer)._modules
    replacement: Replacement | None = modules["attention"]._modules.get("replacement")
    return replacement


Mixing = tuple[tuple[int, type[Any]], ...]  # (layer, the step that mixes tokens there in place of attention)


def layers_that_mix(layers: Iterable[BertLikeLayer], gates: Iterable[Gate]) -> Mixing:
    """The layers whose skipped attention is replaced by what reads neighbouring rows, and its step."""
    mixing = []
    for i, (layer, gate) in enumerate(zip(layers, gates, strict=True)):
        replacement = replacement_of(layer)
        if is_skipped(gate) and replacement is not None and replacement.step is not None:
            mixing.append((i, replacement.step))
    return tuple(mixing)
