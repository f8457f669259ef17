"""A padded batch without its padding: which rows there are, which are keys, and which are output rows.

All of it is worked out on the host, where it costs microseconds, and the index tensors go to the device in
one copy that waits for nothing. What the host does not know is read once a batch (`on_host`): a mask that
lies on the device. After that no step between embeddings and head waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fastgate.ops.ragged import HOST, SequenceOffsets, ends_of, on_device, true_places


def on_host(*masks: Tensor | None) -> list[Tensor | None]:
    """Bool masks of one shape, brought to the host: one wait for all that lie on a device, none without."""
    remote = [mask for mask in masks if mask is not None and mask.device.type != "cpu"]
    if not remote:
        return list(masks)
    copies = iter((remote[0][None] if len(remote) == 1 else torch.stack(remote)).to(HOST))
    return [mask if mask is None or mask.device.type == "cpu" else next(copies) for mask in masks]


def left_neighbour_mask(attended: Tensor) -> Tensor:
    """(batch, length) bool: whether a token and the one before it are both attended."""
    has_left_neighbour = attended.clone()
    has_left_neighbour[:, :1] = False
    has_left_neighbour[:, 1:] &= attended[:, :-1]
    return has_left_neighbour


@dataclass(frozen=True, eq=False)
class HostIndices:
    """Index tensors of an unpadded batch on the host, None as there.

    attended: (batch, length) bool. None: every token. hops: (outputs,) int64, how many tokens lie between an
    output row and the nearest row that the head reads. None: the head reads all of them. halo: how far the
    halo reaches.
    """

    index: Tensor | None
    key_rows: Tensor | None
    output_rows: Tensor | None
    attended: Tensor | None = None
    hops: Tensor | None = None
    halo: int = 0

    @cached_property
    def output_index(self) -> Tensor | None:
        """(outputs,) int64: row b * length + t of each output row. None: every row, in order."""
        if self.output_rows is None or self.index is None:
            return self.index if self.output_rows is None else self.output_rows
        return self.index[self.output_rows]


@dataclass(frozen=True, eq=False)
class UnpaddedBatch:
    """The rows of a padded batch (batch, length) that are attended or read.

    queries: all rows, as sequences. keys: the attended ones. outputs: the output rows, which are those that
    the head reads and the halo around them that token shifts need. host: where they stand.
    On the device, copied there together when one of them is first asked for: index: (rows,) int64, row
    b * length + t of each row. None: every row, in order. key_rows: (keys,) int64 into the rows. None: all
    of them. output_rows: (outputs,) int64 likewise.
    """

    batch: int
    length: int
    queries: SequenceOffsets
    keys: SequenceOffsets
    outputs: SequenceOffsets
    host: HostIndices

    @cached_property
    def _device_tensors(self) -> dict[str, Tensor]:
        """The index tensors on the device. The ends of the sequences come along."""
        host = self.host
        tensors = {"index": host.index, "key_rows": host.key_rows, "output_rows": host.output_rows}
        if host.index is not None and host.output_rows is not None:
            tensors["output_index"] = host.output_index
        if host.hops is not None and host.output_index is not None:
            tensors["read_index"] = host.output_index[host.hops == 0]
        named = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        offsets = list({id(each): each for each in (self.queries, self.keys, self.outputs)}.values())
        ends = [ends_of(each.lengths) for each in offsets]
        copies = on_device([*named.values(), *ends], self.queries.device)
        for each, end in zip(offsets, copies[len(named) :], strict=True):
            each.__dict__.setdefault("cu_seqlens", end)  # where a cached_property keeps it
        return dict(zip(named, copies, strict=False))

    @property
    def index(self) -> Tensor | None:
        return None if self.host.index is None else self._device_tensors["index"]

    @property
    def key_rows(self) -> Tensor | None:
        return None if self.host.key_rows is None else self._device_tensors["key_rows"]

    @property
    def output_rows(self) -> Tensor | None:
        return None if self.host.output_rows is None else self._device_tensors["output_rows"]

    @cached_property
    def host_has_left_neighbour(self) -> Tensor:
        """`has_left_neighbour` on the host."""
        attended, index = self.host.attended, self.host.index
        if attended is None:
            attended = torch.ones(self.batch, self.length, dtype=torch.bool, device=HOST)
        has_left_neighbour = left_neighbour_mask(attended).flatten()
        return has_left_neighbour if index is None else has_left_neighbour[index]

    @cached_property
    def has_left_neighbour(self) -> Tensor:
        """(rows,) bool: whether a row and the one above it are tokens side by side, both attended."""
        return on_device([self.host_has_left_neighbour], self.queries.device)[0]

    @cached_property
    def shrink_steps(self) -> list[tuple[Tensor, Tensor]]:
        """What takes output rows with a halo to those that the head reads, a hop at a time.

        Step k holds `has_left_neighbour` of the rows within k + 1 hops among themselves, (rows,) bool, and
        which of these are within k hops, int64.
        """
        hops, rows = self.host.hops, self.host.output_rows
        assert hops is not None and rows is not None
        tensors = []
        for k in range(self.host.halo):
            rows_within, hops_within = rows[hops <= k + 1], hops[hops <= k + 1]
            has_left_neighbour = self.host_has_left_neighbour[rows_within]
            has_left_neighbour[1:] &= rows_within[1:] == rows_within[:-1] + 1
            has_left_neighbour[:1] = False
            tensors += [has_left_neighbour, true_places(hops_within <= k)]
        copies = on_device(tensors, self.queries.device)
        return list(zip(copies[::2], copies[1::2], strict=True))

    @property
    def has_other_rows(self) -> bool:
        """Whether there are rows that are no output rows."""
        return self.host.output_rows is not None

    @property
    def has_halo(self) -> bool:
        """Whether there are output rows that the head does not read."""
        return self.host.hops is not None

    @property
    def rows_within_halo(self) -> tuple[int, ...]:
        """The number of rows that the head reads, then of those within 1, 2, ... hops of them."""
        hops = self.host.hops
        if hops is None:
            return (self.outputs.rows,)
        return tuple(int((hops <= k).sum()) for k in range(self.host.halo + 1))

    @property
    def pairs(self) -> int:
        """The sum over the sequences of queries x keys."""
        return sum(q * k for q, k in zip(self.queries.lengths, self.keys.lengths, strict=True))

    @property
    def one_query_per_sequence(self) -> bool:
        return self.has_other_rows and self.outputs.longest == 1 and self.outputs.equal

    def output_index(self) -> Tensor:
        """(outputs,) int64: row b * length + t of each output row."""
        if not self.has_other_rows:
            return self.row_index()
        return self._device_tensors["output_rows" if self.host.index is None else "output_index"]

    def row_index(self) -> Tensor:
        """(rows,) int64: row b * length + t of each row."""
        if self.host.index is None:
            return torch.arange(self.batch * self.length, device=self.queries.device)
        return self._device_tensors["index"]

    def unpad(self, padded: Tensor, output_rows_only: bool = False) -> Tensor:
        """(batch, length, ...) -> (rows or outputs, ...)."""
        flat = padded.reshape(self.batch * self.length, *padded.shape[2:])
        if output_rows_only:
            return flat.index_select(0, self.output_index())
        return flat if self.host.index is None else flat.index_select(0, self._device_tensors["index"])

    def pad(self, rows: Tensor, output_rows_only: bool) -> Tensor:
        """(rows, or those that the head reads, hidden) -> (batch, length, hidden), zeros in all others."""
        if self.host.index is None and not (output_rows_only and self.has_other_rows):
            return rows.view(self.batch, self.length, rows.shape[-1])
        index = self.output_index() if output_rows_only else self.row_index()
        if output_rows_only and self.has_halo:
            index = self._device_tensors["read_index"]
        full = rows.new_zeros(self.batch * self.length, rows.shape[-1]).index_copy(0, index, rows)
        return full.view(self.batch, self.length, rows.shape[-1])


def static_unpadded_batch(
    queries: SequenceOffsets,
    keys: SequenceOffsets,
    outputs: SequenceOffsets,
    key_rows: Tensor | None,
    output_rows: Tensor | None,
    has_left_neighbour: Tensor | None,
) -> UnpaddedBatch:
    """The batch of a CUDA graph: index tensors that lie on the device, which the steps of a plan read.

    has_left_neighbour: None where no step reads it.
    """
    unpadded = UnpaddedBatch(0, 0, queries, keys, outputs, HostIndices(None, key_rows, output_rows))
    tensors = {"key_rows": key_rows, "output_rows": output_rows}
    unpadded.__dict__["_device_tensors"] = {name: t for name, t in tensors.items() if t is not None}
    unpadded.__dict__["has_left_neighbour"] = has_left_neighbour
    return unpadded


def hops_to_output_rows(read: Tensor, attended: Tensor | None, halo: int) -> Tensor:
    """(batch, length) int64: how many hops a token is away from one that the head reads, from neighbour to
    neighbour (left_neighbour_mask). halo + 1 where they are more than `halo`."""
    has_left_neighbour = left_neighbour_mask(torch.ones_like(read) if attended is None else attended)[:, 1:]
    hops, reached = torch.full(read.shape, halo + 1, device=read.device), read
    hops[read] = 0
    for k in range(1, halo + 1):
        wider = reached.clone()
        wider[:, :-1] |= reached[:, 1:] & has_left_neighbour
        wider[:, 1:] |= reached[:, :-1] & has_left_neighbour
        hops[wider & ~reached] = k
        reached = wider
    return hops


def unpad(
    batch: int,
    length: int,
    attended: Tensor | None,
    outputs: Tensor | None,
    device: torch.device,
    halo: int = 0,
) -> UnpaddedBatch:
    """The rows of a padded batch that are attended or output rows. `device` is where they lie.

    attended: (batch, length) bool. None: all. outputs: (batch, length) bool, the rows that the head reads.
    None: the attended ones. Masks on the host cost no wait for the device, others one. halo: how many hops
    away from the rows that the head reads the rows lie that these are computed from. They are output rows
    too, and the head does not read them.
    """
    attended, outputs = on_host(attended, outputs)
    if attended is not None and bool(attended.all()):
        attended = None
    all_hops = None
    if outputs is not None and halo:
        all_hops = hops_to_output_rows(outputs, attended, halo)
        outputs = all_hops <= halo
    if attended is None:
        return _unpad_unmasked(batch, length, outputs, all_hops, device, halo)
    if outputs is None:
        offsets = _offsets(attended, device)
        host = HostIndices(true_places(attended), None, None, attended)
        return UnpaddedBatch(batch, length, offsets, offsets, offsets, host)
    rows = attended | outputs
    query_offsets, key_offsets, output_offsets = (
        _offsets(mask, device) for mask in (rows, attended, outputs)
    )
    index = true_places(rows)
    key_rows = output_rows = None
    if key_offsets.rows == query_offsets.rows:
        key_offsets = query_offsets
    else:
        key_rows = true_places(attended.flatten()[index])
    if output_offsets.rows == query_offsets.rows:
        output_offsets = query_offsets
    else:
        output_rows = true_places(outputs.flatten()[index])
    is_full = query_offsets.rows == batch * length
    hops = None if output_rows is None or all_hops is None else all_hops[outputs]
    host = HostIndices(None if is_full else index, key_rows, output_rows, attended, hops, halo)
    return UnpaddedBatch(batch, length, query_offsets, key_offsets, output_offsets, host)


def _unpad_unmasked(
    batch: int,
    length: int,
    outputs: Tensor | None,
    all_hops: Tensor | None,
    device: torch.device,
    halo: int,
) -> UnpaddedBatch:
    """As `unpad`, of a batch whose tokens are all attended. all_hops: of hops_to_output_rows."""
    full = SequenceOffsets((length,) * batch, device)
    if outputs is None or bool(outputs.all()):
        host = HostIndices(None, None, None, None, None, halo)
        return UnpaddedBatch(batch, length, full, full, full, host)
    hops = None if all_hops is None else all_hops[outputs]
    host = HostIndices(None, None, true_places(outputs), None, hops, halo)
    return UnpaddedBatch(batch, length, full, full, _offsets(outputs, device), host)


@lru_cache(maxsize=256)
def unpad_full(batch: int, length: int, first: bool, inference: bool, halo: int = 0) -> UnpaddedBatch:
    """The rows of a batch on the host without padding. The head reads token 0 alone (first) or every token.

    inference: whether torch.inference_mode is on, whose tensors are of no use outside. halo: as in unpad.
    """
    outputs = None
    if first:
        outputs = torch.zeros(batch, length, dtype=torch.bool)
        outputs[:, 0] = True
    return unpad(batch, length, None, outputs, HOST, halo)


def _offsets(mask: Tensor, device: torch.device) -> SequenceOffsets:
    return SequenceOffsets(tuple(mask.sum(1).tolist()), device)
