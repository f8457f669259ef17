"""What CUDA graphs need of a kind of device: capture, replay, and the order of calls on its streams."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Device(Protocol):
    """A kind of device that graphs can be captured on."""

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
            self.side, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
            self.done, self.last = torch.cuda.Event(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]

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
