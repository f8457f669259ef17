"""CUDA-graph replay of an encoder in inference: a launch a batch in place of one a kernel.

The kernels read the lengths of sequences on the device, and the host gives them only row counts. So a graph
captured for a bucket, (packed rows, sequences, key rows, demanded rows), serves every batch that fits: its
rows are padded to the bucket's. Rows after the last sequence belong to none, no step reads one of them for
another row, and what they hold, NaN even, stays there. Sequences are padded by empty ones.

A call copies what the host knows of a batch (ends, index sets) to the graph's memory in one copy, gathers
the ids there, replays on the caller's current stream, and pads the result into fresh memory, so that outputs
stay valid. Two uses of a bucket capture it (CAPTURE_AT): the first batch of its kind runs as ever.

Bounds: at most MAX_GRAPHS graphs an encoder, the least recently used is dropped; all share one memory pool,
as big as the largest needs, beside a result and an id buffer each; batches of more than MAX_ROWS rows keep
the device busy enough to run as ever. Where more kinds of batches come in turn than there is room for, the
uses that a capture takes double with every turnover.

Threads and streams: one lock an encoder is held while a call is queued, and calls are ordered by an event
where streams differ, for they share their memory. Captures see only their own thread's calls (thread_local)
and come one at a time, but they wait for the device, and torch allows one in a process: while a caller
captures a graph of its own in another thread, the kinds of batches in use should have been seen before.

Whatever does not fit runs as ever, and `Graphs.eager` counts why: training, gradients, autocast, recording,
hooks, modules and parameters that are not plain, a dispatch mode, torch.compile's tracing, a capture that is
under way. What a graph has baked in is compared before each replay (fingerprint.py).
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from fastgate.ops.ragged import SequenceOffsets, ends_of, place_bytes
from fastgate.ops.registry import selections
from fastgate.runtime.context import ForwardContext, TokenIds
from fastgate.runtime.executor import run_plan
from fastgate.runtime.fingerprint import ModuleFingerprint
from fastgate.runtime.unpadding import UnpaddedBatch, static_unpadded_batch

MAX_GRAPHS = 64
MAX_ROWS = 4096
CAPTURE_AT = 2
MAX_KEYS_COUNTED = 4096  # kinds of batches whose uses are counted


class LengthsUnknown(Exception):
    """An implementation wants lengths on the host, which differ from replay to replay."""


class _UnknownLengths:
    """As many lengths as there are sequences; of their values only whether one is 0 may be asked."""

    def __init__(self, sequences: int, empty: bool) -> None:
        self.sequences, self.empty = sequences, empty

    def __len__(self) -> int:
        return self.sequences

    def __contains__(self, value: object) -> bool:
        return self.empty if value == 0 else _refuse()

    def __iter__(self) -> Iterator[int]:
        _refuse()

    def __getitem__(self, place: Any) -> int:
        _refuse()


def _refuse(*_: object) -> NoReturn:
    raise LengthsUnknown("a backend that reads lengths on the host")


class GraphOffsets(SequenceOffsets):
    """`rows` rows, of which those of the sequences come first; lengths lie in `cu_seqlens` only."""

    equal = False
    longest = padded = sequence_of_row = property(_refuse)  # type: ignore[assignment]

    def __init__(self, cu_seqlens: Tensor, rows: int, empty: bool) -> None:
        lengths: Any = _UnknownLengths(cu_seqlens.numel() - 1, empty)
        super().__init__(lengths, cu_seqlens.device)
        self.__dict__.update(cu_seqlens=cu_seqlens, bucket_rows=rows)

    @property
    def rows(self) -> int:
        found: int = self.__dict__["bucket_rows"]
        return found


class Device(Protocol):
    """What graphs need of a kind of device."""

    def __init__(self, device: torch.device) -> None: ...

    @staticmethod
    def busy(device: torch.device) -> bool:
        """Whether the current stream is being captured."""

    def use(self) -> AbstractContextManager[None]:
        """While open, the graphs' memory is this call's: what was queued before is behind it."""

    def capture(self, body: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(replay, what body returned): after replay() it holds what body would return then."""

    def drain(self) -> None:
        """Wait until nothing that was queued here runs."""


# Torch allows one capture at a time in a process.
_capturing = threading.Lock()


class Cuda:
    """Graphs of one CUDA device, in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.side, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            self.done, self.last = torch.cuda.Event(), torch.cuda.current_stream()

    @staticmethod
    def busy(device: torch.device) -> bool:
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def use(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if stream != self.last:
                stream.wait_event(self.done)
            try:
                yield
            finally:
                self.done.record(stream)
                self.last = stream

    def capture(self, body: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        # Once before: kernels are compiled and libraries take their memory, which capture forbids.
        stream = torch.cuda.current_stream()
        self.side.wait_stream(stream)
        with torch.cuda.stream(self.side):
            body()
        stream.wait_stream(self.side)
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"
        with _capturing, torch.cuda.graph(graph, pool=self.pool, stream=self.side, capture_error_mode=mode):
            out = body()
        return graph.replay, out

    def drain(self) -> None:
        self.done.synchronize()


DEVICES: dict[str, type[Device]] = {"cuda": Cuda}


def rounded(rows: int) -> int:
    """The bucket of a number of rows: 8 sizes an octave up to 512, where weights are what a product reads,
    and 16 above; multiples of 16."""
    octave = max(rows - 1, 1).bit_length()
    step = 1 << max(octave - (4 if rows <= 512 else 5), 4)
    return -(-rows // step) * step


class GraphShape(NamedTuple):
    """The sizes of a graph. rows: of the embeddings. keys, wanted: 0 where they are all of the rows."""

    rows: int
    sequences: int
    keys: int
    wanted: int


class GraphKey(NamedTuple):
    """All that decides what a graph holds, beside the encoder. empty: a sequence may have no keys."""

    bucket: GraphShape
    gates: tuple[float, ...]
    output_rows_only: bool
    one_query_per_sequence: bool
    from_narrow: bool  # the embeddings have demanded rows only
    types: bool
    empty: bool
    precision: str
    deterministic: bool
    backends: tuple[tuple[tuple[str, str], str], ...]  # that set_backend chose


def kind_of(run: ForwardContext, ids: TokenIds) -> GraphKey:
    unpadded = run.unpadded
    rows, sequences = unpadded.queries.rows, 1 << max(unpadded.batch - 1, 0).bit_length()
    keys = 0 if unpadded.host.key_rows is None else rounded(unpadded.keys.rows)
    wanted = sequences if unpadded.one_query_per_sequence else rounded(unpadded.wanted.rows)
    from_narrow = run.plan.of_layer(-1)[0].output_rows_only
    bucket = GraphShape(rounded(rows), sequences, keys, wanted if unpadded.output_rows_only else 0)
    return GraphKey(
        GraphShape(wanted, sequences, 0, 0) if from_narrow else bucket,
        tuple(run.gates),  # type: ignore[arg-type]
        unpadded.output_rows_only,
        unpadded.one_query_per_sequence,
        from_narrow,
        ids.types is not None,
        0 in unpadded.keys.lengths,
        str(getattr(torch.backends.cuda.matmul, "fp32_precision", "")),
        torch.are_deterministic_algorithms_enabled(),
        selections(),
    )


class Graph:
    """One captured bucket: its memory, its replay, and the way in and out."""

    def __init__(self, kind: GraphKey, run: ForwardContext, device: torch.device, capturer: Device) -> None:
        bucket = kind.bucket
        ends = {"query_ends": True, "key_ends": bool(bucket.keys), "wanted_ends": bool(bucket.wanted)}
        indices = {"gather": bucket.rows, "out": bucket.wanted or bucket.rows}
        indices |= {"key_rows": bucket.keys, "wanted_rows": bucket.wanted}
        sizes = {name: (n, torch.int64) for name, n in indices.items() if n}
        if any(step.op == "shift_norm" for step in run.plan.steps):
            sizes["linked"] = (bucket.rows, torch.bool)
        sizes |= {name: (bucket.sequences + 1, torch.int32) for name, there in ends.items() if there}
        self.kind = kind
        self.places, self.size = place_bytes(sizes)
        self.pinned = device.type == "cuda"
        with torch.inference_mode(False), torch.no_grad():
            self.memory = torch.zeros(self.size, dtype=torch.uint8, device=device)
            # Each row of ids begins where 16 bytes can be read.
            width = -(-bucket.rows // 2) * 2
            self.ids = torch.zeros(2 + kind.types, width, dtype=torch.int64, device=device)[:, : bucket.rows]
            self.index = self._views(self.memory)
            unpadded = self._packing(bucket, kind.empty)
            types = self.ids[2] if kind.types else None
            ids = TokenIds(self.ids[0], self.ids[1], types)
            captured = ForwardContext(run.encoder, run.inspection, list(run.gates), unpadded, run.plan)
            self.replay, self.rows = capturer.capture(
                lambda: run_plan(captured, lambda output_rows_only: ids)
            )

    def _views(self, memory: Tensor) -> dict[str, Tensor]:
        return {name: memory[a:b].view(dtype) for name, (a, b, dtype) in self.places.items()}

    def _packing(self, bucket: GraphShape, empty: bool) -> UnpaddedBatch:
        at = self.index
        queries = GraphOffsets(at["query_ends"], bucket.rows, empty)
        keys = GraphOffsets(at["key_ends"], bucket.keys, empty) if bucket.keys else queries
        wanted = GraphOffsets(at["wanted_ends"], bucket.wanted, False) if bucket.wanted else queries
        rows = (at.get(name) for name in ("key_rows", "wanted_rows", "linked"))
        return static_unpadded_batch(queries, keys, wanted, *rows)

    def __call__(self, unpadded: UnpaddedBatch, ids: TokenIds) -> Tensor:
        """(batch, length, hidden) in memory of its own, zeros where no demanded row is."""
        gather, out = self._load(unpadded)
        shape = (unpadded.batch, unpadded.length)
        for row, padded in zip(self.ids, ids, strict=False):
            if padded is None:
                continue
            flat = padded.expand(shape).reshape(-1)
            if gather is None:
                row[: flat.numel()].copy_(flat)
            elif flat.dtype == row.dtype:
                torch.index_select(flat, 0, gather, out=row[: gather.numel()])
            else:
                row[: gather.numel()].copy_(flat.index_select(0, gather))
        self.replay()
        if out is None:
            return self.rows[: shape[0] * shape[1]].clone().view(*shape, -1)
        full = self.rows.new_zeros(shape[0] * shape[1], self.rows.shape[1])
        return full.index_copy_(0, out, self.rows[: out.numel()]).view(*shape, -1)

    def _load(self, unpadded: UnpaddedBatch) -> tuple[Tensor | None, Tensor | None]:
        """Bring a batch's ends and index sets to the graph's memory. (where rows are gathered from, where
        results go), on the device; None: every row, in order."""
        host, sequences = unpadded.host, self.kind.bucket.sequences
        out = host.wanted if self.kind.output_rows_only else host.index
        gather = host.wanted if self.kind.from_narrow else host.index
        staging = torch.zeros(self.size, dtype=torch.uint8, device="cpu", pin_memory=self.pinned)
        views = self._views(staging)  # zeros behind what is written: a row that is there
        indices = {"gather": gather, "out": out, "key_rows": host.key_rows, "wanted_rows": host.wanted_rows}
        if "linked" in views:
            indices["linked"] = unpadded.host_has_left_neighbour
        for name, values in indices.items():
            if values is not None and name in views:
                views[name][: values.numel()].copy_(values)
        ragged = {"query_ends": unpadded.queries, "key_ends": unpadded.keys, "wanted_ends": unpadded.wanted}
        for name, one in ragged.items():
            if name in views:
                views[name].copy_(ends_of((*one.lengths, *(0,) * (sequences - unpadded.batch))))
        self.memory.copy_(staging, non_blocking=True)
        return (
            None if gather is None else self.index["gather"][: gather.numel()],
            None if out is None else self.index["out"][: out.numel()],
        )


class CudaGraphs:
    """The graphs of one encoder. captures, replays, evictions: how many so far. eager: why other calls ran
    without, counted. A copy of an encoder begins with none."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.captures = self.replays = self.evictions = 0
        self.eager: Counter[str] = Counter()
        self.seen: Counter[GraphKey] = Counter()
        self.graphs: OrderedDict[GraphKey, Graph] = OrderedDict()
        self.refused: dict[GraphKey, str] = {}
        self.fingerprint: ModuleFingerprint | None = None
        self.device: Device | None = None

    def __deepcopy__(self, memo: Any) -> CudaGraphs:
        return CudaGraphs()

    def __reduce__(self) -> tuple[type[CudaGraphs], tuple[()]]:
        return CudaGraphs, ()

    def said(self) -> str:
        """In one line, how many there are, their replays, and why other calls ran without."""
        why = "".join(f"; {count} calls without: {reason}" for reason, count in self.eager.most_common())
        return f"{len(self.graphs)} captured, {self.replays} replays{why}"

    def clear(self) -> None:
        """Drop every graph and its memory; they are captured again when their kinds of batches come again."""
        with self.lock:
            self._clear()

    def _clear(self) -> None:
        if self.device is not None:
            self.device.drain()
        self.graphs.clear()
        self.seen.clear()
        self.refused.clear()
        self.fingerprint = self.device = None

    def replay(self, run: ForwardContext, ids: TokenIds | None) -> Tensor | None:
        """(batch, length, hidden) of the encoder's output, zeros where no row is demanded; None where no
        graph runs: the caller does then. ids: padded, (batch or 1, length) each."""
        reason = self._misfit(run, ids)
        if not reason:
            assert ids is not None
            with self.lock:
                found = self._replay(run, ids)
            if isinstance(found, Tensor):
                return found
            reason = found
        self.eager[reason] += 1
        return None

    def _misfit(self, run: ForwardContext, ids: TokenIds | None) -> str:
        unpadded = run.unpadded
        if ids is None:
            return "embeddings that were given or replaced"
        device = ids.words.device
        if device.type not in DEVICES:
            return f"no graphs on {device.type}"
        if torch.is_grad_enabled() or run.encoder.training:
            return "gradients, or training"
        if run.observed:
            return "recording, or attentions asked for"
        if any(isinstance(gate, Tensor) for gate in run.gates):
            return "gates that are tensors"
        if any(t is not None and (type(t) is not Tensor or t.device != device) for t in ids):
            return "ids of a class of their own, or on several devices"
        if not 0 < unpadded.wanted.rows <= unpadded.queries.rows <= MAX_ROWS or unpadded.batch > MAX_ROWS:
            return f"no rows, or more than {MAX_ROWS}"
        if torch.is_autocast_enabled(device.type):
            return "autocast"
        if torch._C._len_torch_dispatch_stack():
            return "a dispatch mode"
        return "a capture under way" if DEVICES[device.type].busy(device) else ""

    def _replay(self, run: ForwardContext, ids: TokenIds) -> Tensor | str:
        device = ids.words.device
        if self.fingerprint is None or not self.fingerprint.holds(run.inspection):
            self._clear()
            self.fingerprint = ModuleFingerprint(run.inspection)
        if self.fingerprint.refusal:
            return self.fingerprint.refusal
        if self.fingerprint.device != device:
            return "ids on another device than the weights"
        if self.fingerprint.drops():
            return "a Dropout in training"
        if self.device is None:
            self.device = DEVICES[device.type](device)
        kind = kind_of(run, ids)
        with self.device.use():
            graph = self.graphs.get(kind) or self._captured(kind, run, device)
            if isinstance(graph, str):
                return graph
            self.graphs.move_to_end(kind)
            self.replays += 1
            return graph(run.unpadded, ids)

    def _captured(self, kind: GraphKey, run: ForwardContext, device: torch.device) -> Graph | str:
        """A graph for this kind of batch, once there have been enough of it."""
        if kind in self.refused:
            return self.refused[kind]
        if len(self.seen) >= MAX_KEYS_COUNTED:
            self.seen.clear()
        self.seen[kind] += 1
        if self.seen[kind] < CAPTURE_AT << min(self.evictions // MAX_GRAPHS, 20):
            return "a kind of batch seen too seldom yet"
        assert self.device is not None
        try:
            graph = Graph(kind, run, device, self.device)
        except LengthsUnknown as unknown:
            self.refused[kind] = str(unknown)
            return str(unknown)
        except RuntimeError as error:  # of memory too
            message = f"no graph for {kind.bucket}, which runs without: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            self.refused[kind] = "a capture that failed"
            return self.refused[kind]
        self.captures += 1
        del self.seen[kind]
        self.graphs[kind] = graph
        if len(self.graphs) > MAX_GRAPHS:
            self.device.drain()
            self.graphs.popitem(last=False)
            self.evictions += 1
        return graph
