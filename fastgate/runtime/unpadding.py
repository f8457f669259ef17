"""Padded batches as packed rows: which rows exist, which are keys, which are demanded.

All of it is worked out on the host, where it costs microseconds, and the index tensors go to the device in
one copy that waits for nothing. What the host does not know is read once a batch (`on_host`): a mask that
lies on the device. After that no step between embedding and head waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fastgate.ops.ragged import HOST, SequenceOffsets, ends_of, on_device, true_places


def on_host(*masks: Tensor | None) -> list[Tensor | None]:
    """Bool masks of one shape, brought to the host: one wait for all that lie on a device, none without."""
    away = [mask for mask in masks if mask is not None and mask.device.type != "cpu"]
    if not away:
        return list(masks)
    here = iter((away[0][None] if len(away) == 1 else torch.stack(away)).to(HOST))
    return [mask if mask is None or mask.device.type == "cpu" else next(here) for mask in masks]


def left_neighbour_mask(attended: Tensor) -> Tensor:
    """(batch, length) bool: whether a token and the one before it are both attended."""
    has_left_neighbour = attended.clone()
    has_left_neighbour[:, :1] = False
    has_left_neighbour[:, 1:] &= attended[:, :-1]
    return has_left_neighbour


@dataclass(frozen=True, eq=False)
class HostIndices:
    """What a packing is made of, on the host; None as in UnpaddedBatch. wanted: rows of the padded batch. attended:
    (batch, length) bool; None: every token. links: (demanded,) int64, how many links lie between a demanded
    row and one that is read, where `unpad` was told to widen them up to `reach`; None: all are read."""

    index: Tensor | None
    key_rows: Tensor | None
    wanted_rows: Tensor | None
    attended: Tensor | None = None
    hops: Tensor | None = None
    halo: int = 0

    @cached_property
    def wanted(self) -> Tensor | None:
        """(demanded,) int64: row b * length + t of each demanded row; None: every row, in order."""
        if self.wanted_rows is None or self.index is None:
            return self.index if self.wanted_rows is None else self.wanted_rows
        return self.index[self.wanted_rows]


@dataclass(frozen=True, eq=False)
class UnpaddedBatch:
    """The rows of one padded batch (batch, length).

    queries: the packed rows as sequences. keys: the attended ones. wanted: the demanded ones. host: where
    they stand. On the device, copied there together when one of them is first asked for:
    index: (packed,) int64, row b * length + t of each packed row; None: every row, in order. key_rows:
    (keys,) int64 into the packed rows, None when they are all of them. wanted_rows: the demanded likewise.
    """

    batch: int
    length: int
    queries: SequenceOffsets
    keys: SequenceOffsets
    wanted: SequenceOffsets
    host: HostIndices

    @cached_property
    def _there(self) -> dict[str, Tensor]:
        """The index tensors on the device, and the ends of the sequences, which their SequenceOffsets is given."""
        host = self.host
        found = {"index": host.index, "key_rows": host.key_rows, "wanted_rows": host.wanted_rows}
        if host.index is not None and host.wanted_rows is not None:
            found["wanted_index"] = host.wanted
        if host.hops is not None and host.wanted is not None:
            found["read_index"] = host.wanted[host.hops == 0]
        named = {name: t for name, t in found.items() if t is not None}
        ragged = list({id(r): r for r in (self.queries, self.keys, self.wanted)}.values())
        ends = [ends_of(r.lengths) for r in ragged]
        there = on_device([*named.values(), *ends], self.queries.device)
        for one, end in zip(ragged, there[len(named) :], strict=True):
            one.__dict__.setdefault("cu_seqlens", end)  # where a cached_property keeps it
        return dict(zip(named, there, strict=False))

    @property
    def index(self) -> Tensor | None:
        return None if self.host.index is None else self._there["index"]

    @property
    def key_rows(self) -> Tensor | None:
        return None if self.host.key_rows is None else self._there["key_rows"]

    @property
    def wanted_rows(self) -> Tensor | None:
        return None if self.host.wanted_rows is None else self._there["wanted_rows"]

    @cached_property
    def host_has_left_neighbour(self) -> Tensor:
        """`linked` on the host."""
        attended, index = self.host.attended, self.host.index
        if attended is None:
            attended = torch.ones(self.batch, self.length, dtype=torch.bool, device=HOST)
        has_left_neighbour = left_neighbour_mask(attended).flatten()
        return has_left_neighbour if index is None else has_left_neighbour[index]

    @cached_property
    def has_left_neighbour(self) -> Tensor:
        """(packed,) bool: whether a row and the one above it are tokens side by side, both attended."""
        return on_device([self.host_has_left_neighbour], self.queries.device)[0]

    @cached_property
    def shrink_steps(self) -> list[tuple[Tensor, Tensor]]:
        """What takes widened rows to those that are read, a link at a time: near[k] holds `linked` of the
        rows up to k + 1 links away among themselves, (rows,) bool, and which of them are up to k away, int64.
        """
        hops, rows, found = self.host.hops, self.host.wanted_rows, []
        assert hops is not None and rows is not None
        for k in range(self.host.halo):
            there, away = rows[hops <= k + 1], hops[hops <= k + 1]
            has_left_neighbour = self.host_has_left_neighbour[there]
            has_left_neighbour[1:] &= there[1:] == there[:-1] + 1
            has_left_neighbour[:1] = False
            found += [has_left_neighbour, true_places(away <= k)]
        moved = on_device(found, self.queries.device)
        return list(zip(moved[::2], moved[1::2], strict=True))

    @property
    def output_rows_only(self) -> bool:
        return self.host.wanted_rows is not None

    @property
    def has_halo(self) -> bool:
        """Whether the demanded rows are more than those read: all that those are computed from."""
        return self.host.hops is not None

    @property
    def within(self) -> tuple[int, ...]:
        """How many demanded rows there are up to so many links away from those that are read."""
        hops = self.host.hops
        if hops is None:
            return (self.wanted.rows,)
        return tuple(int((hops <= k).sum()) for k in range(self.host.halo + 1))

    @property
    def one_query_per_sequence(self) -> bool:
        return self.output_rows_only and self.wanted.longest == 1 and self.wanted.equal

    def wanted_index(self) -> Tensor:
        """(demanded,) int64: row b * length + t of each demanded row."""
        if not self.output_rows_only:
            return self.packed_index()
        return self._there["wanted_rows" if self.host.index is None else "wanted_index"]

    def packed_index(self) -> Tensor:
        """(packed,) int64: row b * length + t of each packed row."""
        if self.host.index is None:
            return torch.arange(self.batch * self.length, device=self.queries.device)
        return self._there["index"]

    def pack(self, padded: Tensor, output_rows_only: bool = False) -> Tensor:
        """(batch, length, ...) -> (packed or demanded, ...)."""
        flat = padded.reshape(self.batch * self.length, *padded.shape[2:])
        if output_rows_only:
            return flat.index_select(0, self.wanted_index())
        return flat if self.host.index is None else flat.index_select(0, self._there["index"])

    def pad(self, rows: Tensor, output_rows_only: bool) -> Tensor:
        """(packed or read, hidden) -> (batch, length, hidden), zeros where no row is that is read."""
        if self.host.index is None and not (output_rows_only and self.output_rows_only):
            return rows.view(self.batch, self.length, rows.shape[-1])
        index = self.wanted_index() if output_rows_only else self.packed_index()
        if output_rows_only and self.has_halo:
            index = self._there["read_index"]
        full = rows.new_zeros(self.batch * self.length, rows.shape[-1]).index_copy(0, index, rows)
        return full.view(self.batch, self.length, rows.shape[-1])


def static_unpadded_batch(
    queries: SequenceOffsets,
    keys: SequenceOffsets,
    wanted: SequenceOffsets,
    key_rows: Tensor | None,
    wanted_rows: Tensor | None,
    has_left_neighbour: Tensor | None,
) -> UnpaddedBatch:
    """Of index tensors that lie on the device, of no padded batch: what the steps of a plan read. linked:
    None where no step does."""
    made = UnpaddedBatch(0, 0, queries, keys, wanted, HostIndices(None, key_rows, wanted_rows))
    found = {"key_rows": key_rows, "wanted_rows": wanted_rows}
    made.__dict__["_there"] = {name: t for name, t in found.items() if t is not None}
    made.__dict__["has_left_neighbour"] = has_left_neighbour
    return made


def hops_to_output_rows(read: Tensor, attended: Tensor | None, halo: int) -> Tensor:
    """(batch, length) int64: how many links (left_neighbour_mask) a token is away from one that is read, and
    reach + 1 where they are more than `reach`."""
    has_left_neighbour = left_neighbour_mask(torch.ones_like(read) if attended is None else attended)[:, 1:]
    away, shrink_steps = torch.full(read.shape, halo + 1, device=read.device), read
    away[read] = 0
    for k in range(1, halo + 1):
        wider = shrink_steps.clone()
        wider[:, :-1] |= shrink_steps[:, 1:] & has_left_neighbour
        wider[:, 1:] |= shrink_steps[:, :-1] & has_left_neighbour
        away[wider & ~shrink_steps] = k
        shrink_steps = wider
    return away


def unpad(
    batch: int,
    length: int,
    attended: Tensor | None,
    demanded: Tensor | None,
    device: torch.device,
    halo: int = 0,
) -> UnpaddedBatch:
    """Packed rows are the attended and the demanded ones; `device` is where they lie.

    attended: (batch, length) bool, None: all. demanded: (batch, length) bool, None: the attended ones. Masks
    on the host cost no wait for the device, others one. reach: how many links away the rows lie that the
    demanded ones are computed from; they are demanded with them, and not read.
    """
    attended, demanded = on_host(attended, demanded)
    if attended is not None and bool(attended.all()):
        attended = None
    away = None
    if demanded is not None and halo:
        away = hops_to_output_rows(demanded, attended, halo)
        demanded = away <= halo
    if demanded is not None and attended is None and bool(demanded.all()):
        demanded = None
    if attended is None:
        full = SequenceOffsets((length,) * batch, device)
        wanted = full if demanded is None else _ragged(demanded, device)
        wanted_rows = None if demanded is None else true_places(demanded)
        hops = None if wanted_rows is None or away is None else away[demanded]
        return UnpaddedBatch(
            batch, length, full, full, wanted, HostIndices(None, None, wanted_rows, None, hops, halo)
        )
    if demanded is None:
        rows = _ragged(attended, device)
        return UnpaddedBatch(
            batch, length, rows, rows, rows, HostIndices(true_places(attended), None, None, attended)
        )
    packed = attended | demanded
    queries, keys, wanted = (_ragged(mask, device) for mask in (packed, attended, demanded))
    index = true_places(packed)
    key_rows = wanted_rows = None
    if keys.rows == queries.rows:
        keys = queries
    else:
        key_rows = true_places(attended.flatten()[index])
    if wanted.rows == queries.rows:
        wanted = queries
    else:
        wanted_rows = true_places(demanded.flatten()[index])
    whole = queries.rows == batch * length
    hops = None if wanted_rows is None or away is None else away[demanded]
    host = HostIndices(None if whole else index, key_rows, wanted_rows, attended, hops, halo)
    return UnpaddedBatch(batch, length, queries, keys, wanted, host)


@lru_cache(maxsize=256)
def unpad_full(batch: int, length: int, first: bool, inference: bool, halo: int = 0) -> UnpaddedBatch:
    """The packing of a batch on the host without padding, of which token 0 alone or every token is demanded.

    inference: whether torch.inference_mode is on, whose tensors are of no use outside. reach: as in
    unpad.
    """
    demanded = None
    if first:
        demanded = torch.zeros(batch, length, dtype=torch.bool)
        demanded[:, 0] = True
    return unpad(batch, length, None, demanded, HOST, halo)


def _ragged(mask: Tensor, device: torch.device) -> SequenceOffsets:
    return SequenceOffsets(tuple(mask.sum(1).tolist()), device)
