"""Learning which attention a task needs: objective, schedule, distillation, the Pruner, the Trainer mixin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import PruningConfig
from .distill import Distill
from .objective import Fixed, Sparsity, Speedup
from .pruner import Pruner

if TYPE_CHECKING:
    from .trainer import SelfPruningMixin, SelfPruningTrainer

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
    from . import trainer

    return getattr(trainer, name)
