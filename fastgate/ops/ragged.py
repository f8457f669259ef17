"""Where the sequences of an unpadded batch lie, and how what the host knows of them reaches the device."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error

HOST = torch.device("cpu")
# Where each tensor of a joint copy begins, in bytes: kernels read 16 at a time.
ALIGNMENT = 16
END_DTYPES = (torch.int32, torch.int64)


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
    copies = staging.to(device, non_blocking=True)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        _captured.append(staging)
    return [
        copies[begin:end].view(dtype).view(t.shape)
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
class SequenceOffsets:
    """Where the sequences of an unpadded batch begin and end: their rows lie one after another.

    Attributes:
        lengths: rows of each sequence, on the host; a sequence may have none.
        device: where `cu_seqlens` and the other tensors are.

    Example:
        >>> offsets = fastgate.ops.SequenceOffsets.from_lengths([2, 3])
        >>> offsets.rows, offsets.cu_seqlens.tolist()
        (5, [0, 2, 5])
        >>> fastgate.ops.SequenceOffsets.from_cu_seqlens(offsets.cu_seqlens).lengths
        (2, 3)
    """

    lengths: tuple[int, ...]
    device: torch.device

    @staticmethod
    def from_lengths(lengths: Iterable[int], device: torch.device | str = HOST) -> SequenceOffsets:
        """From the rows of each sequence.

        Raises:
            ArgumentError: for a negative length, and for what is no whole number.
        """
        lengths = tuple(lengths)
        try:
            counts = tuple(operator.index(length) for length in lengths)
        except TypeError:
            counts = (-1,)
        if min(counts, default=0) < 0:
            got, wanted = repr(lengths)[:80], "0 or more rows each"
            raise ArgumentError(format_error("SequenceOffsets", "lengths", got, wanted, "count the rows"))
        return SequenceOffsets(counts, torch.device(device))

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor) -> SequenceOffsets:
        """From the ends of the sequences, (sequences + 1,) int32 or int64 that begin with 0, as
        flash-attention takes them. Brings them to the host, which on a GPU waits for the device.

        Raises:
            ArgumentError: for another shape or dtype, or ends that fall or do not begin with 0.
        """
        wanted, remedy = "(sequences + 1,) int32 or int64 from 0", "accumulate the lengths from 0"
        if cu_seqlens.dim() != 1 or not cu_seqlens.numel() or cu_seqlens.dtype not in END_DTYPES:
            got = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
            raise ArgumentError(format_error("SequenceOffsets", "cu_seqlens", got, wanted, remedy))
        ends = cu_seqlens.tolist()
        if ends[0]:
            got = f"ends from {ends[0]}"
            raise ArgumentError(format_error("SequenceOffsets", "cu_seqlens", got, wanted, remedy))
        return SequenceOffsets.from_lengths([b - a for a, b in pairwise(ends)], cu_seqlens.device)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(sequences + 1,) int32: 0, then the row after each sequence's last."""
        return on_device([ends_of(self.lengths)], self.device)[0]

    @cached_property
    def rows(self) -> int:
        """Of all sequences."""
        return sum(self.lengths)

    @cached_property
    def longest(self) -> int:
        """Rows of the longest sequence."""
        return max(self.lengths, default=0)

    @cached_property
    def equal(self) -> bool:
        """Whether every sequence is as long as the longest."""
        return all(n == self.longest for n in self.lengths)

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """(flat, mask): where rows stand in a (sequences, longest) grid, and which places are rows."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device=HOST)
        mask = torch.arange(self.longest, device=HOST) < lengths[:, None]
        flat, mask = on_device([true_places(mask), mask], self.device)
        return flat, mask

    @cached_property
    def sequence_of_row(self) -> Tensor:
        """(rows,) int64."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device=HOST)
        sequence = torch.repeat_interleave(torch.arange(len(self.lengths), device=HOST), lengths)
        return on_device([sequence], self.device)[0]

    def grid(self, rows: Tensor) -> Tensor:
        """(rows, hidden) -> (sequences, longest, hidden), zeros where no row is."""
        shape = (len(self.lengths), self.longest, rows.shape[-1])
        if self.equal:
            return rows.view(shape)
        flat, _ = self.padded
        return rows.new_zeros(shape[0] * shape[1], shape[2]).index_copy(0, flat, rows).view(shape)


def true_places(flags: Tensor) -> Tensor:
    """(n,) int64: where a flattened bool tensor is true."""
    return flags.flatten().nonzero().squeeze(1)
