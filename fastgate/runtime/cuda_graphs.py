"""CUDA-graph replay of an encoder in inference: a launch a batch in place of one a kernel.

The kernels read the lengths of sequences on the device, and the host gives them only row counts. So a graph
captured for a shape, (rows, sequences, key rows, output rows), serves every batch that fits: the batch's rows
are padded to those of the shape. Rows after the last sequence belong to none, no step reads one of them for
another row, and what they hold, NaN even, stays there. Sequences are padded by empty ones.

A call copies what the host knows of a batch (ends, index sets) to the graph's memory in one copy, gathers
the ids there, replays on the caller's current stream, and pads the result into fresh memory, so that outputs
stay valid. Two uses of a key capture its graph (CAPTURE_AT): the first batch runs eagerly.

Bounds: at most MAX_GRAPHS graphs an encoder, the least recently used is dropped; all share one memory pool,
as big as the largest needs, beside a result and an id buffer each. Batches of more than MAX_ROWS rows keep
the device busy enough to run eagerly. Where more keys come in turn than there is room for, the uses that a
capture takes double with every turnover.

Threads and streams: one lock an encoder is held while a call is queued, and calls are ordered by an event
where streams differ, for they share their memory. Captures see only their own thread's calls (thread_local)
and come one at a time, but they wait for the device, and torch allows one in a process: while a caller
captures a graph of its own in another thread, the batches in use should have been seen before.

Whatever does not fit runs eagerly, and `eager_reasons` counts why: training, gradients, autocast, recording,
hooks, modules and parameters that are not plain, a dispatch mode, torch.compile's tracing, a capture that is
under way. What a graph has baked in is compared before each replay (fingerprint.py).
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor

from fastgate.ops.torch_compat import dispatch_modes
from fastgate.runtime.captured_graph import CapturedGraph, LengthsUnknown
from fastgate.runtime.context import ForwardContext
from fastgate.runtime.embedding_inputs import TokenIds
from fastgate.runtime.fingerprint import ModuleFingerprint
from fastgate.runtime.graph_device import DEVICES, Device
from fastgate.runtime.graph_key import GraphKey, key_of

MAX_GRAPHS = 64
MAX_ROWS = 4096
CAPTURE_AT = 2
MAX_KEYS_COUNTED = 4096


class CudaGraphs:
    """The graphs of one encoder.

    captures, replays, evictions: how many so far. eager_reasons: why other calls ran eagerly, counted. A copy
    of an encoder begins with none.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.captures = self.replays = self.evictions = 0
        self.eager_reasons: Counter[str] = Counter()
        self.seen: Counter[GraphKey] = Counter()
        self.graphs: OrderedDict[GraphKey, CapturedGraph] = OrderedDict()
        self.refused: dict[GraphKey, str] = {}
        self.fingerprint: ModuleFingerprint | None = None
        self.device: Device | None = None

    def __deepcopy__(self, memo: Any) -> CudaGraphs:
        return CudaGraphs()

    def __reduce__(self) -> tuple[type[CudaGraphs], tuple[()]]:
        return CudaGraphs, ()

    def summary(self) -> str:
        """In one line, how many there are, their replays, and why other calls ran eagerly."""
        why = "".join(
            f"; {count} calls run eagerly: {reason}" for reason, count in self.eager_reasons.most_common()
        )
        return f"{len(self.graphs)} captured, {self.replays} replays{why}"

    def clear(self) -> None:
        """Drop every graph and its memory. They are captured again when their keys come again."""
        with self.lock:
            self._clear()

    def _clear(self) -> None:
        if self.device is not None:
            self.device.drain()
        self.graphs.clear()
        self.seen.clear()
        self.refused.clear()
        self.fingerprint = self.device = None

    def replay(self, context: ForwardContext) -> Tensor | None:
        """(batch, length, hidden) of the encoder's output, zeros in every row that is no output row.

        None where no graph can run.
        """
        ids = context.inputs.padded_ids
        reason = self._misfit(context, ids)
        if not reason:
            assert ids is not None
            with self.lock:
                result = self._replay(context, ids)
            if isinstance(result, Tensor):
                return result
            reason = result
        self.eager_reasons[reason] += 1
        return None

    def _misfit(self, context: ForwardContext, ids: TokenIds | None) -> str:
        unpadded = context.unpadded
        if ids is None:
            return "embeddings that were given or replaced"
        device = ids.words.device
        if device.type not in DEVICES:
            return f"no graphs on {device.type}"
        if torch.is_grad_enabled() or context.training:
            return "gradients, or training"
        if context.is_observed:
            return "recording, or attentions asked for"
        if any(isinstance(gate, Tensor) for gate in context.gates):
            return "gates that are tensors"
        if any(t is not None and (type(t) is not Tensor or t.device != device) for t in ids):
            return "ids of a class of their own, or on several devices"
        if not 0 < unpadded.outputs.rows <= unpadded.queries.rows <= MAX_ROWS or unpadded.batch > MAX_ROWS:
            return f"no rows, or more than {MAX_ROWS}"
        if torch.is_autocast_enabled(device.type):
            return "autocast"
        if dispatch_modes():
            return "a dispatch mode"
        return "a capture under way" if DEVICES[device.type].busy(device) else ""

    def _replay(self, context: ForwardContext, ids: TokenIds) -> Tensor | str:
        device = ids.words.device
        if self.fingerprint is None or not self.fingerprint.matches(context.snapshot):
            self._clear()
            self.fingerprint = ModuleFingerprint(context.snapshot)
        if self.fingerprint.refusal:
            return self.fingerprint.refusal
        if self.fingerprint.device != device:
            return "ids on another device than the weights"
        if self.fingerprint.drops():
            return "a Dropout in training"
        if self.device is None:
            self.device = DEVICES[device.type](device)
        key = key_of(context, ids)
        with self.device.use():
            graph = self.graphs.get(key) or self._captured(key, context, device)
            if isinstance(graph, str):
                return graph
            self.graphs.move_to_end(key)
            self.replays += 1
            return graph(context.unpadded, ids)

    def _captured(self, key: GraphKey, context: ForwardContext, device: torch.device) -> CapturedGraph | str:
        """A graph for this key, once it has been used often enough."""
        if key in self.refused:
            return self.refused[key]
        if len(self.seen) >= MAX_KEYS_COUNTED:
            self.seen.clear()
        self.seen[key] += 1
        if self.seen[key] < CAPTURE_AT << min(self.evictions // MAX_GRAPHS, 20):
            return "a batch shape seen too seldom yet"
        assert self.device is not None
        try:
            graph = CapturedGraph(key, context, device, self.device)
        except LengthsUnknown as unknown:
            self.refused[key] = str(unknown)
            return str(unknown)
        except RuntimeError as error:  # of memory too
            message = f"no graph for {key.shape}, which runs eagerly: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            self.refused[key] = "a capture that failed"
            return self.refused[key]
        self.captures += 1
        del self.seen[key]
        self.graphs[key] = graph
        if len(self.graphs) > MAX_GRAPHS:
            self.device.drain()
            self.graphs.popitem(last=False)
            self.evictions += 1
        return graph
