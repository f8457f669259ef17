"""Learning which attention a task needs: objective, schedule, distillation, the Pruner, the Trainer mixin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastgate.pruning.config import PruningConfig
from fastgate.pruning.distillation import Distill
from fastgate.pruning.objective import Fixed, Sparsity, Speedup
from fastgate.pruning.pruner import Pruner

if TYPE_CHECKING:
    from fastgate.pruning.trainer import SelfPruningMixin, SelfPruningTrainer

__all__ = [
    "Distill",
    "Fixed",
    "Pruner",
    "PruningConfig",
    "SelfPruningMixin",
    "SelfPruningTrainer",
    "Sparsity",
    "Speedup",
]


def __getattr__(name: str) -> Any:
    """The Trainer of transformers, and accelerate, are imported on first use: a plain loop needs neither."""
    if name not in ("SelfPruningMixin", "SelfPruningTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastgate.pruning import trainer

    return getattr(trainer, name)
