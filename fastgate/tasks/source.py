"""A model that the user names, by a folder or by its name on the hub: every fault of it told in one line.

where, option: what an error names, the command and what the user gave the model by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError, FastgateError, say

_WANTED = "a folder with a fastgate checkpoint or a model of transformers"


def check_model(where: str, option: str, model: str | Path, part: str = "pruned") -> None:
    """Raises CheckpointError for a path that is plainly no model's. part: which model of a run is meant."""
    path = Path(model)
    try:
        found = _fault(path, str(model), part)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        found = f"{str(model)[:200]!r} ({reason})", "check the path"
    if found is not None:
        raise CheckpointError(say(where, option, found[0], _WANTED, found[1]))


def _fault(path: Path, name: str, part: str) -> tuple[str, str] | None:
    """(what is there in place of a model, what to do)."""
    if path.is_dir():
        if (path / "config.json").exists():
            return None
        for inside in (part, "pruned", "dense"):
            if (path / inside / "config.json").is_file():
                return f"{path}, which holds a run of `fastgate finetune`", f"pass {path / inside}"
        return (
            f"{path}, {'without config.json' if any(path.iterdir()) else 'an empty folder'}",
            "check the path",
        )
    if path.exists():
        return f"{path}, a file", "pass the folder it is in"
    if not name or path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2:
        return f"{name or 'nothing'} (no such folder)", "check the path"
    return None  # a name of the hub


@contextmanager
def reading(where: str, option: str, model: str | Path) -> Iterator[None]:
    """Whatever is raised inside, where the model's files are read, becomes a CheckpointError: files can be
    damaged in any way, and each library has its own error for it."""
    check_model(where, option, model)
    try:
        yield
    except (FastgateError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        got, wanted = f"{model} ({type(error).__name__}: {reason})", "a model whose files are whole"
        raise CheckpointError(say(where, option, got, wanted, "copy or download it again")) from error
