"""One captured CUDA graph: its memory, its replay, and the way in and out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastgate.ops.ragged import SequenceOffsets, ends_of, place_bytes
from fastgate.runtime.context import ForwardContext
from fastgate.runtime.eager import run_plan
from fastgate.runtime.embedding_inputs import TokenIds, UnpaddedIds
from fastgate.runtime.graph_device import Device
from fastgate.runtime.graph_key import GraphKey, GraphShape
from fastgate.runtime.unpadding import UnpaddedBatch, static_unpadded_batch


class LengthsUnknown(Exception):
    """An implementation wants lengths on the host, which differ from replay to replay."""


class _UnknownLengths:
    """As many lengths as there are sequences. Of their values only whether one is 0 may be asked."""

    def __init__(self, sequences: int, has_empty: bool) -> None:
        self.sequences, self.has_empty = sequences, has_empty

    def __len__(self) -> int:
        return self.sequences

    def __contains__(self, value: object) -> bool:
        return self.has_empty if value == 0 else _refuse()

    def __iter__(self) -> Iterator[int]:
        _refuse()

    def __getitem__(self, index: Any) -> int:
        _refuse()


def _refuse(*_: object) -> NoReturn:
    raise LengthsUnknown("a backend that reads lengths on the host")


class GraphOffsets(SequenceOffsets):
    """`rows` rows, of which those of the sequences come first. Lengths lie in `cu_seqlens` only."""

    equal = False
    longest = padded = sequence_of_row = property(_refuse)

    def __init__(self, cu_seqlens: Tensor, rows: int, has_empty: bool) -> None:
        lengths: Any = _UnknownLengths(cu_seqlens.numel() - 1, has_empty)
        super().__init__(lengths, cu_seqlens.device)
        self.__dict__.update(cu_seqlens=cu_seqlens, graph_rows=rows)

    @property
    def rows(self) -> int:
        rows: int = self.__dict__["graph_rows"]
        return rows


class CapturedGraph:
    """A graph, captured when it is made. device: of the weights. capturer: captures on that device."""

    def __init__(
        self, key: GraphKey, context: ForwardContext, device: torch.device, capturer: Device
    ) -> None:
        shape = key.shape
        self.key = key
        self.places, self.size = place_bytes(_tensor_sizes(shape, context.plan.reads_neighbours))
        self.pinned = device.type == "cuda"
        with torch.inference_mode(False), torch.no_grad():
            self.memory = torch.zeros(self.size, dtype=torch.uint8, device=device)
            # Each row of ids begins where 16 bytes can be read.
            width = -(-shape.rows // 2) * 2
            self.ids = torch.zeros(2 + key.has_types, width, dtype=torch.int64, device=device)
            self.ids = self.ids[:, : shape.rows]
            self.index = self._views(self.memory)
            types = self.ids[2] if key.has_types else None
            inputs = UnpaddedIds(TokenIds(self.ids[0], self.ids[1], types))
            unpadded = self._static_batch(shape, key.has_empty)
            static = replace(context, gates=list(context.gates), unpadded=unpadded, inputs=inputs)
            self.replay, self.rows = capturer.capture(lambda: run_plan(static))

    def _views(self, memory: Tensor) -> dict[str, Tensor]:
        return {name: memory[a:b].view(dtype) for name, (a, b, dtype) in self.places.items()}

    def _static_batch(self, shape: GraphShape, has_empty: bool) -> UnpaddedBatch:
        index = self.index
        queries = GraphOffsets(index["query_ends"], shape.rows, has_empty)
        keys = GraphOffsets(index["key_ends"], shape.keys, has_empty) if shape.keys else queries
        outputs = GraphOffsets(index["output_ends"], shape.outputs, False) if shape.outputs else queries
        tensors = (index.get(name) for name in ("key_rows", "output_rows", "has_left_neighbour"))
        return static_unpadded_batch(queries, keys, outputs, *tensors)

    def __call__(self, unpadded: UnpaddedBatch, ids: TokenIds) -> Tensor:
        """(batch, length, hidden) in memory of its own, zeros in every row that is no output row."""
        source, target = self._load(unpadded)
        shape = (unpadded.batch, unpadded.length)
        for row, padded in zip(self.ids, ids, strict=False):
            if padded is None:
                continue
            flat = padded.expand(shape).reshape(-1)
            if source is None:
                row[: flat.numel()].copy_(flat)
            elif flat.dtype == row.dtype:
                torch.index_select(flat, 0, source, out=row[: source.numel()])
            else:
                row[: source.numel()].copy_(flat.index_select(0, source))
        self.replay()
        if target is None:
            return self.rows[: shape[0] * shape[1]].clone().view(*shape, -1)
        full = self.rows.new_zeros(shape[0] * shape[1], self.rows.shape[1])
        return full.index_copy_(0, target, self.rows[: target.numel()]).view(*shape, -1)

    def _load(self, unpadded: UnpaddedBatch) -> tuple[Tensor | None, Tensor | None]:
        """Bring a batch's ends and index sets to the graph's memory.

        Returns where rows are gathered from and where results go, on the device. None: every row, in order.
        """
        host, sequences = unpadded.host, self.key.shape.sequences
        target = host.output_index if self.key.has_other_rows else host.index
        source = host.output_index if self.key.embeds_outputs_only else host.index
        staging = torch.zeros(self.size, dtype=torch.uint8, device="cpu", pin_memory=self.pinned)
        views = self._views(staging)  # zeros behind what is written: a row that is there
        indices = {"source": source, "target": target}
        indices |= {"key_rows": host.key_rows, "output_rows": host.output_rows}
        if "has_left_neighbour" in views:
            indices["has_left_neighbour"] = unpadded.host_has_left_neighbour
        for name, values in indices.items():
            if values is not None and name in views:
                views[name][: values.numel()].copy_(values)
        ends = {"query_ends": unpadded.queries, "key_ends": unpadded.keys, "output_ends": unpadded.outputs}
        for name, offsets in ends.items():
            if name in views:
                views[name].copy_(ends_of((*offsets.lengths, *(0,) * (sequences - unpadded.batch))))
        self.memory.copy_(staging, non_blocking=True)
        return (
            None if source is None else self.index["source"][: source.numel()],
            None if target is None else self.index["target"][: target.numel()],
        )


def _tensor_sizes(shape: GraphShape, reads_neighbours: bool) -> dict[str, tuple[int, torch.dtype]]:
    """Of each tensor in a graph's memory: how many numbers of which dtype."""
    indices = {"source": shape.rows, "target": shape.outputs or shape.rows}
    indices |= {"key_rows": shape.keys, "output_rows": shape.outputs}
    sizes = {name: (count, torch.int64) for name, count in indices.items() if count}
    if reads_neighbours:
        sizes["has_left_neighbour"] = (shape.rows, torch.bool)
    ends = {"query_ends": True, "key_ends": bool(shape.keys), "output_ends": bool(shape.outputs)}
    return sizes | {name: (shape.sequences + 1, torch.int32) for name, needed in ends.items() if needed}
