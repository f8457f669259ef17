"""Prune to a target. For MaxDrop, search for the largest number of layers whose loss of score is allowed."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable
from typing import Any

from fastgate.errors import DataError, format_error
from fastgate.pruning import Fixed, Sparsity
from fastgate.training.config import FinetuneConfig
from fastgate.training.phases import TaskTrainer
from fastgate.training.targets import MaxDrop, RunTarget

HELD_OUT_SHARE = 0.1  # of the training rows: prunings are compared on rows that no model is trained on
MAX_HELD_OUT = 2000  # rows


def hold_out(rows: Any, seed: int) -> Any:
    """The splits with some of the training rows, drawn by `seed`, moved to a split `held_out`.

    Windows of one document stay together. Raises DataError if there are too few rows.
    """
    train = rows["train"]
    document_of = train["document"][:] if "document" in train.column_names else list(range(len(train)))
    documents = sorted(set(document_of))
    count = min(MAX_HELD_OUT, math.ceil(HELD_OUT_SHARE * len(documents)))
    if len(documents) < 20:
        got = f"{len(documents)} training rows"
        raise DataError(format_error("MaxDrop", "train", got, "20 or more", "choose the sparsity yourself"))
    chosen = set(random.Random(seed).sample(documents, count))
    inside = [i for i, document in enumerate(document_of) if document in chosen]
    outside = [i for i, document in enumerate(document_of) if document not in chosen]
    return type(rows)({**rows, "train": train.select(outside), "held_out": train.select(inside)})


def most_removable(layers: int, lowest_score: float, attempt: Callable[[int], float]) -> int:
    """How many of `layers` attention sublayers can go: the most that scores `lowest_score` or above.

    attempt: number removed -> score. The search bisects, as though removing more never scored higher. It
    never tries to remove 0.
    """
    good, bad = 0, layers
    while bad - good > 1:
        middle = (good + bad) // 2
        if attempt(middle) >= lowest_score:
            good = middle
        else:
            bad = middle
    return good


def prune_to(
    target: RunTarget,
    task_trainer: TaskTrainer,
    config: FinetuneConfig,
    dense: dict[str, Any],
    layers: int,
    name: str = "pruned",
) -> dict[str, Any]:
    """TaskTrainer.prune to any target; what `config` says of the target does not count.

    dense: the result of TaskTrainer.dense. layers: of the model.
    """
    if isinstance(target, MaxDrop):
        return _prune_within(target, task_trainer, config, dense, layers, name)
    pruning = config.pruning_config(task_trainer.task.kind, target)
    return task_trainer.prune(pruning, config.prune_fit, name, config.pruning.teacher)


def _prune_within(
    budget: MaxDrop,
    task_trainer: TaskTrainer,
    config: FinetuneConfig,
    dense: dict[str, Any],
    layers: int,
    name: str,
) -> dict[str, Any]:
    """Remove as much attention as the budget allows, judged on the rows held out.

    The result also has `attempts`: {number removed: score held out}. If no pruning is within the budget,
    every attention stays.
    """
    results: dict[int, dict[str, Any]] = {}

    def attempt(removed: int) -> float:
        target = Sparsity(removed / layers) if removed else Fixed(tuple(range(layers)))
        results[removed] = prune_to(target, task_trainer, config, dense, layers, f"{name}-{removed}")
        return float(results[removed]["held_out"])

    best = most_removable(layers, budget.lowest_score(dense["held_out"]), attempt)
    if best not in results:
        attempt(best)
    copied = task_trainer.out / "work" / f"{name}-chosen"
    for folder in (copied, task_trainer.out / name):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(task_trainer.out / f"{name}-{best}", copied)
    copied.rename(task_trainer.out / name)
    attempts = {str(removed): result["held_out"] for removed, result in sorted(results.items())}
    return {**results[best], "attempts": attempts}


def clear_attempts(task_trainer: TaskTrainer, name: str = "pruned") -> None:
    """Remove the models that a search tried, once the result is written."""
    for folder in task_trainer.out.glob(f"{name}-*"):
        shutil.rmtree(folder, ignore_errors=True)
