"""The steps of a feed-forward block, and the LayerNorm of a skipped attention, which joins the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgate.ops import fused_layers
from fastgate.ops.fused_layers import HalfLayer, NormOperands
from fastgate.ops.gated_add_norm import gated_add_norm
from fastgate.ops.linear_gelu import linear_gelu
from fastgate.runtime.costs import Matmul, Sizes
from fastgate.runtime.steps.base import (
    Step,
    SublayerRows,
    add_norm,
    norm_operands,
    packed_operands,
    skipped_norm,
)

if TYPE_CHECKING:
    from fastgate.runtime.context import ForwardContext


@dataclass(frozen=True)
class Intermediate(Step):
    """The first Linear of the block and its activation."""

    name = "intermediate"

    def matmuls(self, rows: int, sizes: Sizes) -> list[Matmul]:
        return [Matmul(rows, sizes.hidden, sizes.intermediate)]

    def run(self, context: ForwardContext, state: SublayerRows) -> Tensor:
        layer = context.layers[self.layer]
        if layer.gelu is None:
            state.value = layer.intermediate(state.residual)
        else:
            state.value = linear_gelu(state.residual, layer.gelu.weight, layer.gelu.bias)  # type: ignore[arg-type]
        return state.value  # type: ignore[no-any-return]

    def lower(
        self, context: ForwardContext, sublayer: tuple[Step, ...], dtype: torch.dtype
    ) -> HalfLayer | None:
        layer, last = context.layers[self.layer], sublayer[-1]
        end = layer.output_end
        if layer.gelu is None or not end.is_fused or end.dropout_rate:
            return None
        up, down = packed_operands(layer.gelu, dtype), packed_operands(layer.down, dtype)
        if up is None or down is None:
            return None
        assert isinstance(last, OutputNorm)
        if not last.takes_next_norm:
            return fused_layers.feed_forward_half_layer(up, down, norm_operands(end.norm))
        following, norm = context.layers[self.layer + 1], end.norm
        if not following.attention_end.plain_norm:
            return None
        weight, bias, second = following.fold_next_norm(norm)
        is_computed = weight is not norm.weight or bias is not norm.bias
        compute = (lambda: following.fold_next_norm(norm)[:2]) if is_computed else None
        return fused_layers.feed_forward_half_layer(
            up, down, NormOperands(weight, bias, norm.eps, **second), compute
        )


@dataclass(frozen=True)
class ProjectDown(Step):
    """The second Linear of the block."""

    name = "project_down"

    def matmuls(self, rows: int, sizes: Sizes) -> list[Matmul]:
        return [Matmul(rows, sizes.intermediate, sizes.hidden)]

    def run(self, context: ForwardContext, state: SublayerRows) -> Tensor:
        state.value, state.bias = context.layers[self.layer].down(state.value)
        return state.value  # type: ignore[no-any-return]


@dataclass(frozen=True)
class OutputNorm(Step):
    """LayerNorm of the residual sum with the block.

    takes_next_norm: the LayerNorm that the next layer's skipped attention leaves behind runs here too.
    """

    name = "output_norm"
    ends_sublayer = True

    takes_next_norm: bool = False

    def run(self, context: ForwardContext, state: SublayerRows) -> Tensor:
        end = context.layers[self.layer].output_end
        if not self.takes_next_norm:
            state.residual = add_norm(end, state.value, state.residual, state.bias)
            return state.residual
        following = context.layers[self.layer + 1]
        if end.is_fused and end.dropout_rate < 1.0 and following.attention_end.plain_norm:
            weight, norm_bias, second = following.fold_next_norm(end.norm)
            state.residual = gated_add_norm(
                state.value, state.residual, weight, norm_bias, end.norm.eps,
                bias=state.bias, dropout_p=end.dropout_rate, **second,
            )  # fmt: skip
        else:
            rows = add_norm(end, state.value, state.residual, state.bias)
            state.residual = skipped_norm(following, rows)
        return state.residual


@dataclass(frozen=True)
class SkippedNorm(Step):
    """The LayerNorm of a skipped attention by itself, where the layer below must exist without it."""

    name = "skip_norm"
    ends_sublayer = True

    def run(self, context: ForwardContext, state: SublayerRows) -> Tensor:
        state.residual = skipped_norm(context.layers[self.layer], state.residual)
        return state.residual


STEPS = (Intermediate, ProjectDown, OutputNorm)
