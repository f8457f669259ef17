"""Interleaved timing: every contender on the same batch in turn, medians over the repeats."""

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
    """Seconds of one contender: the median of the repeats for each batch, in the order of the batches."""

    batches: tuple[float, ...]

    @property
    def total(self) -> float:
        """Seconds for all batches."""
        return sum(self.batches)

    @property
    def median(self) -> float:
        """Seconds of the batch in the middle."""
        return statistics.median(self.batches)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    runs: Mapping[str, Callable[[Batch], object]],
    batches: Sequence[Batch],
    *,
    repeats: int = 3,
    device: torch.device | str = "cpu",
    progress: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time each of `runs` on every batch: A, B, ... on batch 0, again `repeats` times, then batch 1, and so
    on.

    Each contender sees a batch once before it is timed, and who begins changes from repeat to repeat. Runs
    under `torch.inference_mode`. progress: called after each batch.
    """
    device = torch.device(device)
    order = list(runs)
    found: dict[str, list[float]] = {name: [] for name in order}
    with torch.inference_mode():
        for batch in batches:
            for name in order:
                runs[name](batch)
            seconds: dict[str, list[float]] = {name: [] for name in order}
            for repeat in range(repeats):
                turn = repeat % len(order)
                for name in order[turn:] + order[:turn]:
                    _wait(device)
                    start = time.perf_counter()
                    runs[name](batch)
                    _wait(device)
                    seconds[name].append(time.perf_counter() - start)
            for name in order:
                found[name].append(statistics.median(seconds[name]))
            if progress is not None:
                progress()
    return {name: Timing(tuple(times)) for name, times in found.items()}
