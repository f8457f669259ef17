"""fastgate: BERT and RoBERTa that do not compute what the task does not need.

Everything but the errors is imported on first use, so that `import fastgate` and the command line start fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastgate import transformers_hook
from fastgate.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    FastgateError,
    MissingPackage,
    NothingPatched,
    Unsupported,
)

if TYPE_CHECKING:
    from fastgate import ops  # noqa: F401
    from fastgate.models.checkpoint import load, save
    from fastgate.models.explanation import explain
    from fastgate.models.freezing import freeze, thaw
    from fastgate.models.patching import patch, unpatch
    from fastgate.models.pruning import prune
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
    "MissingPackage",
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
    # The module of a public name; those of fastgate.pruning have none here.
    _MODULES = {
        "explain": "explanation",
        "freeze": "freezing",
        "load": "checkpoint",
        "patch": "patching",
        "prune": "pruning",
        "save": "checkpoint",
        "thaw": "freezing",
        "unpatch": "patching",
    }

    def __getattr__(name: str) -> object:
        """A public name, on first use."""
        if name == "ops":
            return importlib.import_module("fastgate.ops")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = f"models.{_MODULES[name]}" if name in _MODULES else "pruning"
        value = globals()[name] = getattr(importlib.import_module(f"fastgate.{module}"), name)
        return value


def __dir__() -> list[str]:
    """Everything public, also what is imported on first use."""
    return sorted([*__all__, "__version__", "ops"])


transformers_hook.register()
