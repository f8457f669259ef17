"""The steps of an attention with one query a sequence, which forms neither keys nor values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgate.ops import fused_layers
from fastgate.ops.absorbed_attention import absorbed_attention
from fastgate.ops.fused_layers import HalfLayer
from fastgate.runtime.costs import Matmul, Sizes
from fastgate.runtime.steps.attention import AttentionNorm, ProjectOutput, output_operands
from fastgate.runtime.steps.base import Step, SublayerRows, add_bias, norm_operands, packed_operands

if TYPE_CHECKING:
    from fastgate.runtime.context import ForwardContext


@dataclass(frozen=True)
class ProjectQuery(Step):
    """The query of each sequence."""

    name = "project_query"

    def matmuls(self, rows: int, sizes: Sizes) -> list[Matmul]:
        return [Matmul(rows, sizes.hidden, sizes.width)]

    def run(self, context: ForwardContext, state: SublayerRows) -> Tensor:
        unpadded, h = context.unpadded, state.residual
        source = h if unpadded.key_rows is None else h.index_select(0, unpadded.key_rows)
        state.residual = h.index_select(0, unpadded.output_rows)  # type: ignore[arg-type]
        query = add_bias(*context.layers[self.layer].query(state.residual))  # type: ignore[misc]
        state.value = (query, source)
        return query

    def lower(
        self, context: ForwardContext, sublayer: tuple[Step, ...], dtype: torch.dtype
    ) -> HalfLayer | None:
        layer = context.layers[self.layer]
        output = output_operands(context, layer, sublayer, dtype)
        query = packed_operands(layer.query, dtype)  # type: ignore[arg-type]
        if output is None or query is None:
            return None
        key, value = layer.key.module.weight, layer.value.module.weight  # type: ignore[union-attr]
        if {key.dtype, value.dtype} != {dtype}:
            return None
        heads = layer.heads_in(query.weight.shape[0])
        norm = norm_operands(layer.attention_end.norm)
        return fused_layers.absorbed_half_layer(
            query, key, value, layer.value.bias, heads, layer.scale, output, norm  # type: ignore[union-attr]
        )  # fmt: skip


@dataclass(frozen=True)
class AbsorbedAttention(Step):
    """Attention of one query a sequence, from the query and the rows of the sequence."""

    name = "absorbed_attention"

    def matmuls(self, rows: int, sizes: Sizes) -> list[Matmul]:
        return [
            Matmul(rows, sizes.width, sizes.hidden),
            Matmul(sizes.keys, sizes.hidden, sizes.heads),
            Matmul(sizes.keys, sizes.heads, sizes.hidden),
            Matmul(rows, sizes.hidden, sizes.width),
        ]

    def run(self, context: ForwardContext, state: SublayerRows) -> Tensor:
        layer, (q, source) = context.layers[self.layer], state.value
        key, value = layer.key.module, layer.value.module  # type: ignore[union-attr]
        if torch.is_grad_enabled() and key.bias is not None:
            # It cancels in the softmax. Its gradient is zero and not missing, as DDP and Adam expect.
            q = q + 0.0 * key.bias
        state.value = absorbed_attention(
            q,
            source,
            key.weight,
            value.weight,
            value.bias,
            context.unpadded.keys,
            layer.heads_in(q.shape[1]),
            layer.scale,
            layer.attention_dropout,
        )
        return state.value  # type: ignore[no-any-return]


STEPS = (ProjectQuery, AbsorbedAttention, ProjectOutput, AttentionNorm)
