"""The methods of a sweep: which target each may have, and which layers each chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from fastgate.models.patching import patch
from fastgate.pruning import Fixed, baselines
from fastgate.training.targets import TARGET_KEYS, RunTarget, number_of

if TYPE_CHECKING:
    from fastgate.training.sweep_config import SweepRun

# Method -> the keys that may say how much it removes. A run has exactly one of them.
METHODS: dict[str, tuple[str, ...]] = {
    "dense": (),  # the dense model as it is
    "dense_longer": (),  # prunes nothing; as many steps and the same distillation as a pruning
    "learned": tuple(TARGET_KEYS),
    "random": ("sparsity",),
    "top_drop": ("sparsity",),
    "every_other": ("sparsity",),
    "greedy": ("sparsity",),  # by the loss on training rows
    "fixed": ("keep",),
}


def target_of(run: SweepRun, layers: int, model: nn.Module, batches: Callable[[], list[Any]]) -> RunTarget:
    """What a run removes, for every method but `dense`.

    layers: of `model`, the dense one, which the choice by loss patches. batches: makes labelled ones for it.
    """
    removed_share = number_of(run.target) or 0.0
    keep = layers - int(removed_share * layers + 0.5)
    match run.method:
        case "learned" | "fixed" if run.target is not None:
            return run.target
        case "random":
            return Fixed(tuple(baselines.random_choice(layers, keep, run.seed)))
        case "top_drop":
            return Fixed(tuple(baselines.top_drop(layers, keep)))
        case "every_other":
            return Fixed(tuple(baselines.every_other(layers, keep)))
        case "greedy":
            return Fixed(tuple(baselines.greedy_by_loss(patch(model).eval(), batches(), keep)))
    return Fixed(tuple(range(layers)))  # dense_longer
