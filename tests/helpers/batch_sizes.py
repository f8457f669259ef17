"""Sizes of a batch, as costs depend on them."""

from __future__ import annotations

from collections.abc import Sequence

from fastgate.runtime.costs import Sizes


def sizes_of(
    hidden: int, intermediate: int, heads: int, lengths: Sequence[int], outputs: Sequence[int] | None = None
) -> Sizes:
    """lengths: tokens a sequence. outputs: output rows of each sequence. None: all."""
    return Sizes(
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        rows=sum(lengths),
        keys=sum(lengths),
        rows_within_halo=(sum(lengths if outputs is None else outputs),),
        pairs=sum(n * n for n in lengths),
        sequences=len(lengths),
    )
