"""Times the implementations of one work in turn, on the CPU or a GPU: same inputs, one run, medians.

A timed block is a number of calls. The implementations take turns, a block each, and who begins changes from
round to round. On a GPU a block is one replay of a CUDA graph between two events, so no time of the host is
in it; an implementation that cannot be captured is queued behind a wait that is longer than the queueing. The
calls of a block walk over as many sets of inputs, and leave as many sets of outputs alive, as are three times
the size of the L2: nothing is in it that a call before has left. On the CPU there is one set, as in a model,
where the operands of one step have just been written by the step before.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
MAX_SETS = 256
ROUNDS, QUICK_ROUNDS = 15, 2
BLOCK_SECONDS = 2e-3
WAIT_CYCLES = 4e9  # a second of queueing: at 2 GHz, twice over

Call = Callable[[int], object]  # of the place of a set of inputs


@dataclass
class Work:
    """One op, direction, shape and dtype, and who does it.

    implementations: fastgate first. absent: implementations that cannot run here, and why. bytes: each
    operand read once, each result written once. flops: multiplications and additions of the products.
    ceilings: what bounds the work, by name: `copy`, or `product`; shares are taken of the slowest. tolerance:
    of the largest relative error (the norm of the difference over that of `truth`'s tensors), which every
    implementation meets before it is timed. Without a truth (dropout, whose masks differ) the same work
    without dropout has one. checked: calls to check in place of the implementations, where those give their
    results in a form of their own.
    """

    group: str
    implementations: dict[str, Call]
    bytes: int
    flops: int = 0
    sets: int = 1
    absent: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, Call] = field(default_factory=dict)
    truth: Sequence[Tensor] = ()
    tolerance: float = 0.0
    checked: dict[str, Call] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """seconds: of a call, one number a round. how: `graph`, `queue` or `loop`."""

    seconds: list[float]
    how: str

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def sets_for(size: int) -> int:
    """How many sets of `size` bytes of inputs and outputs a block walks over."""
    if not ON_GPU:
        return 1
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return max(2, min(MAX_SETS, math.ceil(3 * cache / max(size, 1))))


def relative_error(got: Tensor, truth: Tensor) -> float:
    """The norm of the difference over the norm of the truth; infinite where anything is NaN."""
    difference = (got.double() - truth.double()).norm()
    found = float(difference / truth.double().norm().clamp_min(1e-30))
    return found if math.isfinite(found) else math.inf


def verify(work: Work) -> None:
    """Every implementation against the truth, on the first set of inputs."""
    calls = work.checked or work.implementations
    for name, call in calls.items() if work.truth else ():
        found = call(0)
        results = [found] if isinstance(found, Tensor) else list(found)  # type: ignore[call-overload]
        assert len(results) == len(work.truth), f"{name} gives {len(results)} tensors"
        for place, (got, want) in enumerate(zip(results, work.truth, strict=True)):
            error = relative_error(got, want)
            assert error <= work.tolerance, f"{work.group}: {name}, result {place}: error {error:.1e}"


def time_all(work: Work, rounds: int) -> dict[str, Result]:
    """The times of all implementations and ceilings, once the implementations are found right."""
    verify(work)
    calls = {**work.implementations, **work.ceilings}
    make = _gpu_timed_block if ON_GPU else _LoopBlock
    blocks = {name: make(call, work.sets) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    order = list(blocks)
    for turn in range(rounds + 1):  # the first round warms up
        begin = turn % len(order)
        for name in order[begin:] + order[:begin]:
            blocks[name].run()
        for name, block in blocks.items():
            if turn:
                seconds[name].append(block.seconds())
    return {name: Result(seconds[name], blocks[name].how) for name in order}


class _LoopBlock:
    """Calls in a row, timed on the host: for the CPU."""

    how = "loop"

    def __init__(self, call: Call, sets: int) -> None:
        self.call, self.sets = call, sets
        start = time.perf_counter()
        call(0)
        self.calls = max(1, round(BLOCK_SECONDS / (time.perf_counter() - start)))

    def run(self) -> None:
        start = time.perf_counter()
        for turn in range(self.calls):
            self.call(turn % self.sets)
        self.taken = time.perf_counter() - start

    def seconds(self) -> float:
        return self.taken / self.calls


class _GraphBlock:
    """The replay of a captured row of calls."""

    how = "graph"

    def __init__(self, call: Call, sets: int, calls: int) -> None:
        self.calls = calls
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph = torch.cuda.CUDAGraph()
        self.kept: list[object] = [None] * sets
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            for turn in range(calls):
                self.kept[turn % sets] = call(turn % sets)

    def run(self) -> None:
        self.start.record()
        self.graph.replay()
        self.end.record()

    def seconds(self) -> float:
        self.end.synchronize()
        return 1e-3 * self.start.elapsed_time(self.end) / self.calls


class _QueueBlock(_GraphBlock):
    """Calls queued behind a wait: for what cannot be captured."""

    how = "queue"

    def __init__(self, call: Call, sets: int, calls: int, cycles: int) -> None:
        self.call, self.calls, self.cycles = call, calls, cycles
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.kept = [None] * sets

    def run(self) -> None:
        torch.cuda._sleep(self.cycles)
        self.start.record()
        for turn in range(self.calls):
            self.kept[turn % len(self.kept)] = self.call(turn % len(self.kept))
        self.end.record()


def _gpu_timed_block(call: Call, sets: int) -> _GraphBlock:
    for _ in range(2):  # compiles, allocates; the second time tells how long a walk over the sets takes
        torch.cuda.synchronize()
        start = time.perf_counter()
        kept = [call(place) for place in range(sets)]
        torch.cuda.synchronize()
        taken = time.perf_counter() - start
    del kept
    calls = sets * max(1, round(BLOCK_SECONDS / taken))
    try:
        return _GraphBlock(call, sets, calls)
    except RuntimeError:
        torch.cuda.synchronize()
        cycles = round(min(WAIT_CYCLES, WAIT_CYCLES * taken * calls / sets))
        return _QueueBlock(call, sets, calls, cycles)


def inference(function: Callable[..., Any], given: Sequence[Sequence[Any]]) -> Call:
    """function of a set's operands, without autograd."""

    @torch.no_grad()
    def call(place: int) -> Any:
        return function(*given[place])

    return call


def differentiation(
    function: Callable[..., Any], given: Sequence[Sequence[Any]], grads: Sequence[Tensor]
) -> Call:
    """The gradients of function's result in a set's differentiable operands; forward has run before."""
    outputs = [function(*operands) for operands in given]
    leaves = [[t for t in operands if isinstance(t, Tensor) and t.requires_grad] for operands in given]

    def call(place: int) -> Any:
        return torch.autograd.grad(outputs[place], leaves[place], grads[place], retain_graph=True)

    return call


def copying(size: int, sets: int) -> Call:
    """Reads and writes `size` bytes in all, as a plain copy."""
    count = max(1, size // 2)
    pairs = [torch.empty(2, count, dtype=torch.uint8, device=DEVICE) for _ in range(sets)]

    def call(place: int) -> Tensor:
        return pairs[place][0].copy_(pairs[place][1])

    return call


def multiplying(flops: int, dtype: torch.dtype) -> Call:
    """A product of about `flops` multiplications and additions, of a shape that suits libraries."""
    side = 2048 if ON_GPU else 512
    x = torch.randn(max(1, round(flops / (2 * side * side))), side, device=DEVICE).to(dtype)
    weight = torch.randn(side, side, device=DEVICE).to(dtype)

    def call(place: int) -> Tensor:
        return torch.mm(x, weight)

    return call


def host_seconds(call: Callable[[], object], calls: int = 300) -> float:
    """Host time of one call, the device being behind: what it takes to queue it."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / calls
