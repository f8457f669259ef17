"""The steps of a kept attention: project query, key and value, attend, project the output, add and norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgate.ops import fused_layers
from fastgate.ops.attention import attention, attention_probabilities
from fastgate.ops.fused_layers import HalfLayer
from fastgate.ops.linear import multiply
from fastgate.runtime.costs import Matmul, Sizes
from fastgate.runtime.layer import Layer
from fastgate.runtime.steps.base import (
    Step,
    SublayerRows,
    add_bias,
    add_norm,
    is_packed,
    norm_operands,
    packed_operands,
)

if TYPE_CHECKING:
    from fastgate.runtime.context import ForwardContext


class Projected(NamedTuple):
    """Query, key and value of an attention, and their biases, still to be added where there are any."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None


@dataclass(frozen=True)
class ProjectQKV(Step):
    """Query, key and value of the rows that attention reads.

    The biases are left to attention, which leaves the keys' out. On a CPU that costs what adding them in the
    products does: q, k, v and attention of BERT-base, 778 rows, two threads, both ways in turn, medians:
    16.7 ms and 16.7 ms, in training 51.7 ms and 51.6 ms.
    """

    name = "project_qkv"

    def matmuls(self, rows: int, sizes: Sizes) -> list[Matmul]:
        keys = Matmul(sizes.keys, sizes.hidden, sizes.width)
        return [Matmul(rows, sizes.hidden, sizes.width), keys, keys]

    def run(self, context: ForwardContext, state: SublayerRows) -> Tensor:
        layer, unpadded, h = context.layers[self.layer], context.unpadded, state.residual
        if unpadded.key_rows is None and not self.output_rows_only:
            fused_qkv = layer.fused_qkv
            if fused_qkv is not None:
                q, k, v = multiply(h, fused_qkv).chunk(3, 1)
                projected = Projected(q, k, v, *layer.qkv_biases)
                state.value = projected
                return projected.q
        source = h if unpadded.key_rows is None else h.index_select(0, unpadded.key_rows)
        (k, k_bias), (v, v_bias) = layer.key(source), layer.value(source)  # type: ignore[misc]
        if self.output_rows_only:
            h = h.index_select(0, unpadded.output_rows)  # type: ignore[arg-type]
        q, q_bias = layer.query(h)  # type: ignore[misc]
        state.residual, state.value = h, Projected(q, k, v, q_bias, k_bias, v_bias)
        return q

    def lower(
        self, context: ForwardContext, sublayer: tuple[Step, ...], dtype: torch.dtype
    ) -> HalfLayer | None:
        layer = context.layers[self.layer]
        output = output_operands(context, layer, sublayer, dtype)
        if output is None:
            return None
        qkv = None if self.output_rows_only else layer.fused_qkv
        if not is_packed(qkv, dtype):
            return None
        heads = layer.heads_in(qkv.shape[0] // 3)
        norm = norm_operands(layer.attention_end.norm)
        return fused_layers.attention_half_layer(qkv, layer.qkv_biases, heads, layer.scale, output, norm)


def output_operands(
    context: ForwardContext, layer: Layer, sublayer: tuple[Step, ...], dtype: torch.dtype
) -> fused_layers.LinearOperands | None:
    """The output projection of an attention that a fused call can run. None where it cannot."""
    end = layer.attention_end
    assert layer.dense is not None
    if context.unpadded.key_rows is not None or context.is_gated(sublayer[0].layer) or not end.is_fused:
        return None
    if end.dropout_rate or layer.attention_dropout:
        return None
    return packed_operands(layer.dense, dtype)


@dataclass(frozen=True)
class Attention(Step):
    """softmax(q k^T * scale) v in each sequence."""

    name = "attention"

    def matmuls(self, rows: int, sizes: Sizes) -> list[Matmul]:
        pairs = sizes.pairs if not self.output_rows_only else sizes.pairs * rows // max(sizes.rows, 1)
        return [Matmul(pairs, sizes.width, 1)] * 2

    def run(self, context: ForwardContext, state: SublayerRows) -> Tensor:
        layer, unpadded = context.layers[self.layer], context.unpadded
        queries = unpadded.outputs if self.output_rows_only else unpadded.queries
        q, k, v, q_bias, k_bias, v_bias = state.value
        heads = layer.heads_in(q.shape[1])
        if context.probabilities is not None:
            q, k, v = add_bias(q, q_bias), add_bias(k, k_bias), add_bias(v, v_bias)
            state.value = self._run_openly(context, layer, heads, q, k, v)
            return state.value  # type: ignore[no-any-return]
        state.value = attention(
            q, k, v, queries, unpadded.keys, heads, layer.scale, layer.attention_dropout,
            q_bias=q_bias, k_bias=k_bias, v_bias=v_bias,
        )  # fmt: skip
        return state.value  # type: ignore[no-any-return]

    def _run_openly(
        self, context: ForwardContext, layer: Layer, heads: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Attention by its probabilities, kept for `output_attentions`. Every row is a query then."""
        unpadded = context.unpadded
        index = unpadded.row_index()
        key_index = index if unpadded.key_rows is None else index[unpadded.key_rows]
        probabilities = attention_probabilities(
            q,
            k,
            unpadded.queries,
            unpadded.keys,
            key_index % unpadded.length,
            unpadded.length,
            heads,
            layer.scale,
        )
        probabilities = F.dropout(probabilities, layer.attention_dropout)
        assert context.probabilities is not None
        context.probabilities[self.layer] = probabilities
        padded = v.new_zeros(unpadded.batch * unpadded.length, v.shape[-1]).index_copy(0, key_index, v)
        padded = padded.view(unpadded.batch, unpadded.length, heads, -1).transpose(1, 2)
        return torch.matmul(probabilities, padded).transpose(1, 2).reshape(q.shape)


@dataclass(frozen=True)
class ProjectOutput(Step):
    """The output projection of an attention."""

    name = "project_output"

    def matmuls(self, rows: int, sizes: Sizes) -> list[Matmul]:
        return [Matmul(rows, sizes.width, sizes.hidden)]

    def run(self, context: ForwardContext, state: SublayerRows) -> Tensor:
        state.value, state.bias = context.layers[self.layer].dense(state.value)  # type: ignore[misc]
        if context.trace is not None:
            context.trace.add_attention(self.layer, state.value, state.bias)
        return state.value  # type: ignore[no-any-return]


@dataclass(frozen=True)
class AttentionNorm(Step):
    """LayerNorm of the residual sum with the attention, which a gate and a replacement may share."""

    name = "attention_norm"
    ends_sublayer = True

    def run(self, context: ForwardContext, state: SublayerRows) -> Tensor:
        layer, gate = context.layers[self.layer], context.gates[self.layer]
        if not isinstance(gate, Tensor):
            state.residual = add_norm(layer.attention_end, state.value, state.residual, state.bias)
            return state.residual
        if layer.reads_neighbours:
            replaced = layer.replacement(state.below, context.unpadded.has_left_neighbour)  # type: ignore[misc]
            state.residual = context.output_rows(state.below + (1.0 - gate) * replaced, self.output_rows_only)
        scale, offset = layer.residual_affine(1.0 - gate)
        state.residual = add_norm(
            layer.attention_end, state.value, state.residual, state.bias, gate, scale, offset
        )
        return state.residual


STEPS = (ProjectQKV, Attention, ProjectOutput, AttentionNorm)
