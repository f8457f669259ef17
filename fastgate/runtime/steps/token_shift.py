"""The token shift, a replacement that reads the tokens to either side, and its step in a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgate.nn.replacement import Replacement
from fastgate.ops import fused_layers
from fastgate.ops.fused_layers import HalfLayer
from fastgate.ops.reference import neighbours
from fastgate.ops.shift_norm import shift_norm
from fastgate.runtime.layer import Layer
from fastgate.runtime.steps.base import Step, SublayerRows, norm_operands, packed_operands

if TYPE_CHECKING:
    from fastgate.runtime.context import ForwardContext


@dataclass(frozen=True)
class TokenShiftNorm(Step):
    """LayerNorm of the rows and what a token shift makes of them and of their neighbours.

    With a halo the rows that it makes are fewer than those that it reads, by a token to either side.
    """

    name = "shift_norm"
    ends_sublayer = True
    hops = 1

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
        replacement, end = token_shift_of(layer), layer.attention_end
        if not end.plain_norm:
            return end.norm(h + replacement(h, has_left_neighbour))  # type: ignore[no-any-return]
        norm = end.norm
        return shift_norm(h, has_left_neighbour, *replacement.operands, norm.weight, norm.bias, norm.eps)

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
        norm = norm_operands(layer.attention_end.norm)
        return fused_layers.shift_half_layer(token_shift_of(layer).operands, norm, halo)


class TokenShift(Replacement):
    """r(h)[i] = offset + scale * h[i] + before * h[i - 1] + after * h[i + 1], per channel.

    Neighbours are tokens side by side in one sequence, both attended. One that is missing counts as zero. So
    neither padding nor the choice of output rows changes a value.
    """

    kind = "shift"
    vectors = ("shift", "scale", "before", "after")
    step = TokenShiftNorm

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Offset, scale, before and after, (hidden,) each."""
        return tuple(getattr(self, name) for name in self.vectors)

    def forward(self, h: Tensor, has_left_neighbour: Tensor) -> Tensor:
        offset, scale, before, after = self.operands
        r = torch.addcmul(offset, scale, h)
        above, below = neighbours(h, has_left_neighbour)
        return torch.addcmul(torch.addcmul(r, before, above), after, below)


def token_shift_of(layer: Layer) -> TokenShift:
    """The token shift of a layer that a plan gives one."""
    assert isinstance(layer.replacement, TokenShift)
    return layer.replacement
