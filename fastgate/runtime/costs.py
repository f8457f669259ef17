"""What a step costs: the sizes that costs depend on, and matrix products counted in FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Matmul(NamedTuple):
    """A matrix product (rows, inner) x (inner, outer): 2 * rows * inner * outer FLOPs."""

    rows: int
    inner: int
    outer: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.outer


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What costs depend on: widths of an encoder layer, and row counts of an unpadded batch.

    hidden, intermediate: widths of the layer and of its feed-forward block. heads: attention heads.
    attention_width: of all heads together. None: `hidden`. rows: of the unpadded batch. keys: attended rows.
    rows_within_halo: output rows, then those of a halo of 1, 2, ... tokens. pairs: sum over the sequences of
    queries x keys. sequences: their number.
    """

    hidden: int
    intermediate: int
    heads: int
    rows: int
    keys: int
    rows_within_halo: tuple[int, ...]
    pairs: int
    sequences: int
    attention_width: int | None = None

    @property
    def output_rows(self) -> int:
        return self.rows_within_halo[0]

    @property
    def width(self) -> int:
        """Of all heads together."""
        return self.hidden if self.attention_width is None else self.attention_width

    @property
    def dense_flops(self) -> int:
        """FLOPs of the unpruned layer's matrix products on every row."""
        projections = 2 * self.rows * self.hidden * (4 * self.width + 2 * self.intermediate)
        return projections + 4 * self.pairs * self.width
