"""Padded batches as packed rows: which rows exist, which are keys, which are demanded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Rows of sequences one after another: `lengths` on the host, `cu_seqlens` (sequences + 1,) int32."""

    lengths: tuple[int, ...]
    device: torch.device

    @staticmethod
    def of(cu_seqlens: Tensor) -> Ragged:
        """From (sequences + 1,) ends; brings them to the host."""
        return Ragged(tuple(cu_seqlens.diff().tolist()), cu_seqlens.device)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        ends = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(self.device, non_blocking=True)

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def equal(self) -> bool:
        """Every sequence is as long as the longest."""
        return all(n == self.longest for n in self.lengths)

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """(flat, mask): where rows stand in a (sequences, longest) grid, and which places are rows."""
        lengths = torch.tensor(self.lengths).to(self.device, non_blocking=True)
        mask = torch.arange(self.longest, device=self.device) < lengths[:, None]
        return mask.flatten().nonzero().squeeze(1), mask

    def grid(self, rows: Tensor) -> Tensor:
        """(rows, hidden) -> (sequences, longest, hidden), zeros where no row is."""
        shape = (len(self.lengths), self.longest, rows.shape[-1])
        if self.equal:
            return rows.view(shape)
        flat, _ = self.padded
        return rows.new_zeros(shape[0] * shape[1], shape[2]).index_copy(0, flat, rows).view(shape)


@dataclass(frozen=True)
class Packing:
    """The rows of one padded batch (batch, length).

    index: (packed,) int64, row b * length + t of each packed row; None: every row, in order.
    queries: the packed rows as sequences. keys: the attended ones; key_rows: (keys,) int64 into the packed
    rows, None when they are all of them. wanted: the demanded ones; wanted_rows likewise.
    """

    batch: int
    length: int
    index: Tensor | None
    queries: Ragged
    keys: Ragged
    key_rows: Tensor | None
    wanted: Ragged
    wanted_rows: Tensor | None

    @property
    def narrow(self) -> bool:
        return self.wanted_rows is not None

    @property
    def single(self) -> bool:
        return self.narrow and self.wanted.longest == 1 and self.wanted.equal

    def wanted_index(self) -> Tensor:
        """(demanded,) int64: row b * length + t of each demanded row."""
        index = self.packed_index()
        return index if self.wanted_rows is None else index[self.wanted_rows]

    def packed_index(self) -> Tensor:
        """(packed,) int64: row b * length + t of each packed row."""
        if self.index is None:
            return torch.arange(self.batch * self.length, device=self.queries.device)
        return self.index

    def pack(self, padded: Tensor, narrow: bool = False) -> Tensor:
        """(batch, length, ...) -> (packed or demanded, ...)."""
        flat = padded.reshape(self.batch * self.length, *padded.shape[2:])
        if narrow:
            return flat.index_select(0, self.wanted_index())
        return flat if self.index is None else flat.index_select(0, self.index)

    def pad(self, rows: Tensor, narrow: bool) -> Tensor:
        """(packed or demanded, hidden) -> (batch, length, hidden), zeros where no row is."""
        if self.index is None and not (narrow and self.narrow):
            return rows.view(self.batch, self.length, -1)
        index = self.wanted_index() if narrow else self.packed_index()
        full = rows.new_zeros(self.batch * self.length, rows.shape[-1]).index_copy(0, index, rows)
        return full.view(self.batch, self.length, -1)


def pack_rows(
    batch: int, length: int, attended: Tensor | None, demanded: Tensor | None, device: torch.device
) -> Packing:
    """Packed rows are the attended and the demanded ones.

    attended: (batch, length) bool, None: all. demanded: (batch, length) bool, None: the attended ones.
    """
    if attended is not None and bool(attended.all()):
        attended = None
    if demanded is not None and attended is None and bool(demanded.all()):
        demanded = None
    full = Ragged((length,) * batch, device)
    if attended is None and demanded is None:
        return Packing(batch, length, None, full, full, None, full, None)
    if attended is None:
        assert demanded is not None
        wanted = _ragged(demanded)
        return Packing(batch, length, None, full, full, None, wanted, _true(demanded.flatten()))
    if demanded is None:
        rows = _ragged(attended)
        return Packing(batch, length, _true(attended.flatten()), rows, rows, None, rows, None)
    packed = attended | demanded
    queries, keys, wanted = _ragged(packed), _ragged(attended), _ragged(demanded)
    places = _true(packed.flatten())
    index = None if queries.rows == batch * length else places
    key_rows = None if keys.rows == queries.rows else _true(attended.flatten()[places])
    wanted_rows = None if wanted.rows == queries.rows else _true(demanded.flatten()[places])
    if wanted_rows is None:
        wanted = queries
    return Packing(
        batch, length, index, queries, queries if key_rows is None else keys, key_rows, wanted, wanted_rows
    )


def _ragged(mask: Tensor) -> Ragged:
    return Ragged(tuple(mask.sum(1).tolist()), mask.device)


def _true(flags: Tensor) -> Tensor:
    return flags.nonzero().squeeze(1)
