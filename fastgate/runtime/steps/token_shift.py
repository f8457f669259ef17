"""The step of a token shift, which replaces a skipped attention and reads the tokens to either side."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgate.ops import fused_layers
from fastgate.ops.fused_layers import HalfLayer
from fastgate.ops.shift_norm import shift_norm
from fastgate.runtime.layer import Layer
from fastgate.runtime.steps.base import Step, SublayerRows, norm_operands, packed_operands

if TYPE_CHECKING:
    from fastgate.runtime.context import ForwardContext


def vectors(layer: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offset, scale, before and after of a layer's token shift, (hidden,) each."""
    parameters = layer.replacement._parameters  # type: ignore[union-attr]
    return tuple(parameters[name] for name in ("shift", "scale", "before", "after"))  # type: ignore[return-value]


@dataclass(frozen=True)
class TokenShiftNorm(Step):
    """LayerNorm of the rows and what a token shift makes of them and of their neighbours.

    With a halo the rows that it makes are fewer than those that it reads, by a token to either side.
    """

    name = "shift_norm"
    ends_sublayer = True

    def run(self, context: ForwardContext, state: SublayerRows) -> Tensor:
        layer, unpadded = context.layers[self.layer], context.unpadded
        if self.output_rows_only and unpadded.has_halo:
            has_left_neighbour, nearer = unpadded.shrink_steps[self.halo]
            state.residual = self._norm(layer, state.residual, has_left_neighbour).index_select(0, nearer)
        else:
            rows = self._norm(layer, state.residual, unpadded.has_left_neighbour)
            state.residual = context.output_rows(rows, self.output_rows_only)
        return state.residual

    @staticmethod
    def _norm(layer: Layer, h: Tensor, has_left_neighbour: Tensor) -> Tensor:
        end = layer.attention_end
        if not end.plain_norm:
            return end.norm(h + layer.replacement(h, has_left_neighbour))  # type: ignore[misc, no-any-return]
        norm = end.norm
        return shift_norm(h, has_left_neighbour, *vectors(layer), norm.weight, norm.bias, norm.eps)

    def lower(
        self, context: ForwardContext, sublayer: tuple[Step, ...], dtype: torch.dtype
    ) -> HalfLayer | None:
        """A fused call by itself gains nothing, only before a sublayer that is fused too."""
        layer = context.layers[self.layer]
        if self.output_rows_only and not context.unpadded.has_halo:
            return None
        if layer.gelu is None or packed_operands(layer.gelu, dtype) is None:
            return None
        if not layer.attention_end.plain_norm:
            return None
        halo = self.halo if self.output_rows_only else None
        return fused_layers.shift_half_layer(vectors(layer), norm_operands(layer.attention_end.norm), halo)


def neighbour_masks(context: ForwardContext, shrinks: bool) -> list[Tensor]:
    """What a fused call reads of the neighbours of rows. shrinks: its token shifts have halos."""
    if shrinks:
        return list(chain(*context.unpadded.shrink_steps))
    return [context.unpadded.has_left_neighbour]
