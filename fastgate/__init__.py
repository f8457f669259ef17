"""fastgate: BERT and RoBERTa that do not compute what the task does not need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastgate.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    FastgateError,
    NothingPatched,
    Unsupported,
)
from fastgate.models import auto_classes  # noqa: F401  tells the Auto classes of transformers about pruned models
from fastgate.models.checkpoint import load, save
from fastgate.models.explanation import explain
from fastgate.models.freezing import freeze, thaw
from fastgate.models.patching import patch, unpatch
from fastgate.models.pruning import prune
from fastgate.ops import backends  # noqa: F401  leaves the compiled kernels where the ops look for them

if TYPE_CHECKING:
    from fastgate.pruning import (
        Distill,
        Fixed,
        Pruner,
        PruningConfig,
        SelfPruningMixin,
        SelfPruningTrainer,
        Sparsity,
        Speedup,
    )

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "DataError",
    "Distill",
    "FastgateError",
    "Fixed",
    "NothingPatched",
    "Pruner",
    "PruningConfig",
    "SelfPruningMixin",
    "SelfPruningTrainer",
    "Sparsity",
    "Speedup",
    "Unsupported",
    "explain",
    "freeze",
    "load",
    "patch",
    "prune",
    "save",
    "thaw",
    "unpatch",
]


if not TYPE_CHECKING:  # type checkers read the names above, and refuse others

    def __getattr__(name: str) -> object:
        """Pruning, on first use. It imports the Trainer, which a model that only runs does not need."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from fastgate import pruning

        return getattr(pruning, name)


def __dir__() -> list[str]:
    """Everything public, also what is imported on first use."""
    return sorted([*__all__, "__version__", "ops"])
