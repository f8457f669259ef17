"""Fine-tuning on a task: a dense model first, then prunings of it, in a single run or in a sweep."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgate.training.model import dense_model, load_tokenizer

__all__ = ["dense_model", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """Imported on first use: the command line imports modules of this package that need no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastgate.training import model

    return getattr(model, name)
