"""The largest cut whose score stays within a budget: what to remove is learned, how much is searched for."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastgate.errors import ArgumentError, DataError, format_error
from fastgate.pruning import Fixed, PruningConfig, Sparsity
from fastgate.pruning.objective import Target
from fastgate.training.phases import TEACHERS, Fit, Training

HELD_OUT = 0.1  # of the training rows: cuts are judged on rows that no model is tuned on
MOST = 2000  # rows held out, no more


@dataclass(frozen=True)
class MaxDrop:
    """Remove as much attention as costs at most `share`, in (0, 1), of the dense model's score."""

    share: float

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            remedy = "0.01 lets a hundredth of the score go"
            raise ArgumentError(
                format_error("MaxDrop", "share", self.share, "a number between 0 and 1", remedy)
            )

    def floor(self, dense: float) -> float:
        """The least score that is within the budget."""
        return dense - self.share * abs(dense)


def hold_out(rows: Any, seed: int) -> Any:
    """The splits with some of the training rows, drawn by `seed`, apart as `held_out`.

    Windows of one document stay together. Raises DataError if there are too few rows.
    """
    train = rows["train"]
    of = train["document"][:] if "document" in train.column_names else list(range(len(train)))
    documents = sorted(set(of))
    count = min(MOST, math.ceil(HELD_OUT * len(documents)))
    if len(documents) < 20:
        got = f"{len(documents)} training rows"
        raise DataError(format_error("MaxDrop", "train", got, "20 or more", "choose the sparsity yourself"))
    chosen = set(random.Random(seed).sample(documents, count))
    inside = [i for i, document in enumerate(of) if document in chosen]
    outside = [i for i, document in enumerate(of) if document not in chosen]
    return type(rows)({**rows, "train": train.select(outside), "held_out": train.select(inside)})


def largest_cut(layers: int, floor: float, attempt: Callable[[int], float]) -> int:
    """How many of `layers` attention sublayers can go: the most that `attempt` scores `floor` or above for.

    attempt: number removed -> score. By bisection, as though removing more never scored higher; 0 without an
    attempt.
    """
    good, bad = 0, layers
    while bad - good > 1:
        middle = (good + bad) // 2
        if attempt(middle) >= floor:
            good = middle
        else:
            bad = middle
    return good


def prune_within(
    training: Training,
    budget: MaxDrop,
    dense: dict[str, Any],
    layers: int,
    config_of: Callable[[Target], PruningConfig],
    fit: Fit,
    name: str = "pruned",
    teacher: str = TEACHERS[0],
) -> dict[str, Any]:
    """Training.prune with the largest cut within the budget, judged on the rows held out.

    dense: what Training.dense gave. config_of: target -> how to prune. The result has `attempts` besides:
    {number removed: score held out}. If no cut is within the budget every attention stays.
    """
    tried: dict[int, dict[str, Any]] = {}

    def attempt(removed: int) -> float:
        target = Sparsity(removed / layers) if removed else Fixed(tuple(range(layers)))
        tried[removed] = training.prune(config_of(target), fit, f"{name}-{removed}", teacher)
        return float(tried[removed]["held_out"])

    best = largest_cut(layers, budget.floor(dense["held_out"]), attempt)
    if best not in tried:
        attempt(best)
    aside = training.out / "work" / f"{name}-chosen"
    for folder in (aside, training.out / name):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(training.out / f"{name}-{best}", aside)
    aside.rename(training.out / name)
    attempts = {str(removed): found["held_out"] for removed, found in sorted(tried.items())}
    return {**tried[best], "attempts": attempts}


def clear_attempts(training: Training, name: str = "pruned") -> None:
    """Remove the models that were tried, once the result is written."""
    for folder in training.out.glob(f"{name}-*"):
        shutil.rmtree(folder, ignore_errors=True)
