"""Interleaved timing: every model on the same batch in turn, medians over the repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Timing:
    """Seconds of one model: the median of the repeats for each batch, in the order of the batches."""

    batches: tuple[float, ...]

    @property
    def total(self) -> float:
        """Seconds for all batches."""
        return sum(self.batches)

    @property
    def median(self) -> float:
        """Seconds of the batch in the middle."""
        return statistics.median(self.batches)


# Worker threads of a pool go on spinning for some milliseconds after a call (libgomp's, onnxruntime's): on a
# machine with few cores they would take them from whoever is next.
PAUSE_SECONDS = 0.01


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _call(run: Callable[[Batch], object], batch: Batch, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run(batch)
    _wait(device)
    return time.perf_counter() - start


def interleave(
    runs: Mapping[str, Callable[[Batch], object]],
    batches: Sequence[Batch],
    *,
    repeats: int = 3,
    seconds: float = 0.0,
    device: torch.device | str = "cpu",
    progress: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time each of `runs` on every batch: A, B, ... on batch 0, again `repeats` times, then batch 1, and so
    on.

    Each one sees a batch once before it is timed, and who begins changes from repeat to repeat. With
    `seconds`, one whose `repeats` calls take less than that is called more often: a turn of it is
    then a pause for the threads of the one before, a call that is not timed, and as many calls as make
    `repeats` turns last `seconds` in all. Runs under `torch.inference_mode`. progress: called after each
    batch.
    """
    device = torch.device(device)
    order = list(runs)
    medians: dict[str, list[float]] = {name: [] for name in order}
    with torch.inference_mode():
        for batch in batches:
            first = {name: _call(runs[name], batch, device) for name in order}
            taken: dict[str, list[float]] = {name: [] for name in order}
            for repeat in range(repeats):
                turn = repeat % len(order)
                for name in order[turn:] + order[:turn]:
                    left = seconds / repeats
                    if first[name] < left:
                        time.sleep(PAUSE_SECONDS)
                        _call(runs[name], batch, device)
                    while True:
                        taken[name].append(_call(runs[name], batch, device))
                        left -= taken[name][-1]
                        if left <= 0:
                            break
            for name in order:
                medians[name].append(statistics.median(taken[name]))
            if progress is not None:
                progress()
    return {name: Timing(tuple(times)) for name, times in medians.items()}
