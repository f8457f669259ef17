"""Padded batches as packed rows: which rows exist, which are keys, which are demanded.

All of it is worked out on the host, where it costs microseconds, and the index tensors go to the device in
one copy that waits for nothing. What the host does not know is read once a batch (`on_host`): a mask that
lies on the device. After that no step between embedding and head waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar

import torch
from torch import Tensor

HOST = torch.device("cpu")
# Where each tensor of a joint copy begins, in bytes: kernels read 16 at a time.
ALIGNMENT = 16


def on_host(*masks: Tensor | None) -> list[Tensor | None]:
    """Bool masks of one shape, brought to the host: one wait for all that lie on a device, none without."""
    away = [mask for mask in masks if mask is not None and mask.device.type != "cpu"]
    if not away:
        return list(masks)
    here = iter((away[0][None] if len(away) == 1 else torch.stack(away)).to(HOST))
    return [mask if mask is None or mask.device.type == "cpu" else next(here) for mask in masks]


def on_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Host tensors on the device: one copy, which the host does not wait for."""
    if device.type == "cpu":
        return list(tensors)
    places, size = place_bytes({i: (t.numel(), t.dtype) for i, t in enumerate(tensors)})
    on_gpu = device.type == "cuda"
    # Torch's allocator does not hand pinned memory out again before its copies are done.
    staging = torch.empty(size, dtype=torch.uint8, device=HOST, pin_memory=on_gpu)
    for t, (begin, end, dtype) in zip(tensors, places.values(), strict=True):
        staging[begin:end].view(dtype).copy_(t.reshape(-1))
    there = staging.to(device, non_blocking=True)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        _captured.append(staging)
    return [
        there[begin:end].view(dtype).view(t.shape)
        for t, (begin, end, dtype) in zip(tensors, places.values(), strict=True)
    ]


# What copies in graphs of the callers' own read at every replay.
_captured: list[Tensor] = []
Name = TypeVar("Name")


def place_bytes(
    sizes: Mapping[Name, tuple[int, torch.dtype]],
) -> tuple[dict[Name, tuple[int, int, torch.dtype]], int]:
    """((begin, end, dtype) of as many numbers each where they lie one after another, bytes in all)."""
    places, size = {}, 0
    for name, (count, dtype) in sizes.items():
        end = size + count * dtype.itemsize
        places[name] = (size, end, dtype)
        size = -(-end // ALIGNMENT) * ALIGNMENT
    return places, size


def ends_of(lengths: Sequence[int]) -> Tensor:
    """(sequences + 1,) int32 on the host."""
    ends = torch.tensor((0, *lengths), dtype=torch.int32, device=HOST)
    return torch.cumsum(ends, 0, dtype=torch.int32)


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
        return on_device([ends_of(self.lengths)], self.device)[0]

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
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device=HOST)
        mask = torch.arange(self.longest, device=HOST) < lengths[:, None]
        flat, mask = on_device([_true(mask), mask], self.device)
        return flat, mask

    @cached_property
    def sequence_of_row(self) -> Tensor:
        """(rows,) int64."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device=HOST)
        found = torch.repeat_interleave(torch.arange(len(self.lengths), device=HOST), lengths)
        return on_device([found], self.device)[0]

    def grid(self, rows: Tensor) -> Tensor:
        """(rows, hidden) -> (sequences, longest, hidden), zeros where no row is."""
        shape = (len(self.lengths), self.longest, rows.shape[-1])
        if self.equal:
            return rows.view(shape)
        flat, _ = self.padded
        return rows.new_zeros(shape[0] * shape[1], shape[2]).index_copy(0, flat, rows).view(shape)


def linked_tokens(attended: Tensor) -> Tensor:
    """(batch, length) bool: whether a token and the one before it are both attended."""
    linked = attended.clone()
    linked[:, :1] = False
    linked[:, 1:] &= attended[:, :-1]
    return linked


@dataclass(frozen=True, eq=False)
class HostIndices:
    """What a packing is made of, on the host; None as in Packing. wanted: rows of the padded batch. attended:
    (batch, length) bool; None: every token. read_rows: (read,) int64 into the demanded rows, where
    `pack_rows` was told to widen them; None: all of them are read."""

    index: Tensor | None
    key_rows: Tensor | None
    wanted_rows: Tensor | None
    attended: Tensor | None = None
    read_rows: Tensor | None = None

    @cached_property
    def wanted(self) -> Tensor | None:
        """(demanded,) int64: row b * length + t of each demanded row; None: every row, in order."""
        if self.wanted_rows is None or self.index is None:
            return self.index if self.wanted_rows is None else self.wanted_rows
        return self.index[self.wanted_rows]


@dataclass(frozen=True, eq=False)
class Packing:
    """The rows of one padded batch (batch, length).

    queries: the packed rows as sequences. keys: the attended ones. wanted: the demanded ones. host: where
    they stand. On the device, copied there together when one of them is first asked for:
    index: (packed,) int64, row b * length + t of each packed row; None: every row, in order. key_rows:
    (keys,) int64 into the packed rows, None when they are all of them. wanted_rows: the demanded likewise.
    """

    batch: int
    length: int
    queries: Ragged
    keys: Ragged
    wanted: Ragged
    host: HostIndices

    @cached_property
    def _there(self) -> dict[str, Tensor]:
        """The index tensors on the device, and the ends of the sequences, which their Ragged is given."""
        host = self.host
        found = {"index": host.index, "key_rows": host.key_rows, "wanted_rows": host.wanted_rows}
        if host.index is not None and host.wanted_rows is not None:
            found["wanted_index"] = host.wanted
        if host.read_rows is not None and host.wanted is not None:
            found |= {"read_rows": host.read_rows, "read_index": host.wanted[host.read_rows]}
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
    def host_linked(self) -> Tensor:
        """`linked` on the host."""
        attended, index = self.host.attended, self.host.index
        if attended is None:
            attended = torch.ones(self.batch, self.length, dtype=torch.bool, device=HOST)
        linked = linked_tokens(attended).flatten()
        return linked if index is None else linked[index]

    @cached_property
    def linked(self) -> Tensor:
        """(packed,) bool: whether a row and the one above it are tokens side by side, both attended."""
        return on_device([self.host_linked], self.queries.device)[0]

    @cached_property
    def wanted_linked(self) -> Tensor:
        """`linked` of the demanded rows among themselves, (demanded,) bool."""
        rows = self.host.wanted_rows
        if rows is None:
            return self.linked
        beside = torch.zeros(rows.numel(), dtype=torch.bool, device=HOST)
        beside[1:] = rows[1:] == rows[:-1] + 1
        return on_device([self.host_linked[rows] & beside], self.queries.device)[0]

    @property
    def narrow(self) -> bool:
        return self.host.wanted_rows is not None

    @property
    def widened(self) -> bool:
        """Whether the demanded rows are more than those read: all that those are computed from."""
        return self.host.read_rows is not None

    @property
    def single(self) -> bool:
        return self.narrow and self.wanted.longest == 1 and self.wanted.equal

    def wanted_index(self) -> Tensor:
        """(demanded,) int64: row b * length + t of each demanded row."""
        if not self.narrow:
            return self.packed_index()
        return self._there["wanted_rows" if self.host.index is None else "wanted_index"]

    def packed_index(self) -> Tensor:
        """(packed,) int64: row b * length + t of each packed row."""
        if self.host.index is None:
            return torch.arange(self.batch * self.length, device=self.queries.device)
        return self._there["index"]

    def pack(self, padded: Tensor, narrow: bool = False) -> Tensor:
        """(batch, length, ...) -> (packed or demanded, ...)."""
        flat = padded.reshape(self.batch * self.length, *padded.shape[2:])
        if narrow:
            return flat.index_select(0, self.wanted_index())
        return flat if self.host.index is None else flat.index_select(0, self._there["index"])

    def pad(self, rows: Tensor, narrow: bool) -> Tensor:
        """(packed or demanded, hidden) -> (batch, length, hidden), zeros where no row is that is read."""
        if self.host.index is None and not (narrow and self.narrow):
            return rows.view(self.batch, self.length, rows.shape[-1])
        index = self.wanted_index() if narrow else self.packed_index()
        if narrow and self.widened:
            rows, index = rows.index_select(0, self._there["read_rows"]), self._there["read_index"]
        full = rows.new_zeros(self.batch * self.length, rows.shape[-1]).index_copy(0, index, rows)
        return full.view(self.batch, self.length, rows.shape[-1])


def static_packing(
    queries: Ragged,
    keys: Ragged,
    wanted: Ragged,
    key_rows: Tensor | None,
    wanted_rows: Tensor | None,
    linked: Tensor | None,
) -> Packing:
    """Of index tensors that lie on the device, of no padded batch: what the steps of a plan read. linked:
    None where no step does."""
    made = Packing(0, 0, queries, keys, wanted, HostIndices(None, key_rows, wanted_rows))
    found = {"key_rows": key_rows, "wanted_rows": wanted_rows}
    made.__dict__["_there"] = {name: t for name, t in found.items() if t is not None}
    made.__dict__["linked"] = linked
    return made


def widen(demanded: Tensor, attended: Tensor | None, reach: int) -> Tensor:
    """(batch, length) bool: the demanded tokens and those up to `reach` links away (linked_tokens)."""
    linked = linked_tokens(torch.ones_like(demanded) if attended is None else attended)[:, 1:]
    for _ in range(reach):
        wider = demanded.clone()
        wider[:, :-1] |= demanded[:, 1:] & linked
        wider[:, 1:] |= demanded[:, :-1] & linked
        demanded = wider
    return demanded


def pack_rows(
    batch: int,
    length: int,
    attended: Tensor | None,
    demanded: Tensor | None,
    device: torch.device,
    reach: int = 0,
) -> Packing:
    """Packed rows are the attended and the demanded ones; `device` is where they lie.

    attended: (batch, length) bool, None: all. demanded: (batch, length) bool, None: the attended ones. Masks
    on the host cost no wait for the device, others one. reach: how many links away the rows lie that the
    demanded ones are computed from; they are demanded with them, and not read.
    """
    attended, demanded = on_host(attended, demanded)
    if attended is not None and bool(attended.all()):
        attended = None
    read = demanded
    if demanded is not None and reach:
        demanded = widen(demanded, attended, reach)
    if demanded is not None and attended is None and bool(demanded.all()):
        demanded = None
    if attended is None:
        full = Ragged((length,) * batch, device)
        wanted = full if demanded is None else _ragged(demanded, device)
        wanted_rows = None if demanded is None else _true(demanded)
        host = HostIndices(None, None, wanted_rows, None, _read_rows(read, demanded))
        return Packing(batch, length, full, full, wanted, host)
    if demanded is None:
        rows = _ragged(attended, device)
        return Packing(batch, length, rows, rows, rows, HostIndices(_true(attended), None, None, attended))
    packed = attended | demanded
    queries, keys, wanted = (_ragged(mask, device) for mask in (packed, attended, demanded))
    index = _true(packed)
    key_rows = wanted_rows = None
    if keys.rows == queries.rows:
        keys = queries
    else:
        key_rows = _true(attended.flatten()[index])
    if wanted.rows == queries.rows:
        wanted = queries
    else:
        wanted_rows = _true(demanded.flatten()[index])
    whole = queries.rows == batch * length
    read_rows = None if wanted_rows is None else _read_rows(read, demanded)
    host = HostIndices(None if whole else index, key_rows, wanted_rows, attended, read_rows)
    return Packing(batch, length, queries, keys, wanted, host)


def _read_rows(read: Tensor | None, demanded: Tensor | None) -> Tensor | None:
    """Where the rows that are read stand among the demanded ones; None if they are the same."""
    if read is demanded or read is None or demanded is None:
        return None
    return _true(read.flatten()[_true(demanded)])


@lru_cache(maxsize=256)
def unpadded(batch: int, length: int, first: bool, inference: bool, reach: int = 0) -> Packing:
    """The packing of a batch on the host without padding, of which token 0 alone or every token is demanded.

    inference: whether torch.inference_mode is on, whose tensors are of no use outside. reach: as in
    pack_rows.
    """
    demanded = None
    if first:
        demanded = torch.zeros(batch, length, dtype=torch.bool)
        demanded[:, 0] = True
    return pack_rows(batch, length, None, demanded, HOST, reach)


def _ragged(mask: Tensor, device: torch.device) -> Ragged:
    return Ragged(tuple(mask.sum(1).tolist()), device)


def _true(flags: Tensor) -> Tensor:
    return flags.flatten().nonzero().squeeze(1)
