"""What every step of a plan has, and what passes from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

import torch
from torch import Tensor

from fastgate.ops.fused_layers import HalfLayer, LinearOperands, NormOperands
from fastgate.ops.gated_add_norm import gated_add_norm
from fastgate.ops.linear import Packed
from fastgate.runtime.costs import Matmul, Sizes
from fastgate.runtime.layer import AddNorm, Dense, Layer

if TYPE_CHECKING:
    from fastgate.runtime.context import ForwardContext


@dataclass(slots=True)
class SublayerRows:
    """What passes between the steps of a sublayer, from one LayerNorm to the next.

    below: (rows, hidden) of the LayerNorm below. residual: those of them that the next residual sum adds.
    value: what the last step made. bias: still to be added to it, or None.
    """

    below: Tensor
    residual: Tensor
    value: Any = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One thing that an encoder does.

    layer: index of the encoder layer, -1 for the embeddings. output_rows_only: the step makes the output
    rows and their halo, not every row of the unpadded batch. halo: how many tokens the halo reaches to
    either side.
    """

    name: ClassVar[str]
    ends_sublayer: ClassVar[bool] = False
    hops: ClassVar[int] = 0  # how many tokens to either side it reads, other than through attention

    layer: int
    output_rows_only: bool = False
    halo: int = 0

    def rows(self, sizes: Sizes) -> int:
        """The number of rows that the step makes."""
        return sizes.rows_within_halo[self.halo] if self.output_rows_only else sizes.rows

    def matmuls(self, rows: int, sizes: Sizes) -> list[Matmul]:
        """The matrix products of a step that makes `rows` rows."""
        return []

    def run(self, context: ForwardContext, state: SublayerRows) -> Tensor:
        """Run the step by itself. Changes `state`, and returns the rows that it made."""
        raise NotImplementedError

    def lower(
        self, context: ForwardContext, sublayer: tuple[Step, ...], dtype: torch.dtype
    ) -> HalfLayer | None:
        """The sublayer that begins with this step as a part of a fused CPU call. None: it runs eagerly."""
        return None


def add_bias(rows: Tensor, bias: Tensor | None) -> Tensor:
    """rows + bias in the dtype of the rows."""
    return rows if bias is None else (rows + bias).to(rows.dtype)


def add_norm(
    end: AddNorm,
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """LayerNorm(scale * residual + gate * dropout(x + bias) + offset), by one op or by the modules."""
    if end.is_fused and end.dropout_rate < 1.0:
        norm = end.norm
        return gated_add_norm(
            x, residual, norm.weight, norm.bias, norm.eps,
            bias=bias, gate=gate, scale=scale, offset=offset, dropout_p=end.dropout_rate,
        )  # fmt: skip
    x = end.dropout(add_bias(x, bias))
    x = x if gate is None else gate.to(x.dtype) * x
    residual = residual if scale is None else scale * residual
    return end.norm(x + residual if offset is None else x + residual + offset)  # type: ignore[no-any-return]


def skipped_norm(layer: Layer, h: Tensor) -> Tensor:
    """The LayerNorm that a skipped attention leaves behind, by itself."""
    scale, offset = layer.residual_affine(1.0)
    if scale is not None:
        h = h * scale
    if offset is not None:
        h = h + offset
    return layer.attention_end.norm(h)  # type: ignore[no-any-return]


def packed_operands(dense: Dense, dtype: torch.dtype) -> LinearOperands | None:
    """A Linear for a fused call on rows of this dtype. None where its weight is not packed for that."""
    weight = dense.weight
    return LinearOperands(weight, dense.bias) if is_packed(weight, dtype) else None


def is_packed(weight: Tensor | Packed | None, dtype: torch.dtype) -> TypeGuard[Packed]:
    """Whether fused calls multiply rows of this dtype with this weight."""
    return isinstance(weight, Packed) and weight.in_panels and weight.dtype == dtype


def norm_operands(norm: Any) -> NormOperands:
    """A plain LayerNorm for a fused call."""
    return NormOperands(norm.weight, norm.bias, norm.eps)
