"""Files that are written whole or not at all, and a full disk told as one, whichever library met it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgate.errors import ArgumentError, format_error

_FULL = (errno.ENOSPC, errno.EDQUOT)
_LITTLE = 1 << 20  # bytes: a disk with less is taken to be full where a writer does not say why it failed


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all."""
    aside = path.with_name(f".{path.name}.writing")
    try:
        aside.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def check_makeable(where: str, option: str, folder: Path) -> None:
    """Raises ArgumentError unless `folder` is one that can be written to, or could be made. Nothing is made.

    where, option: what the error names, the command and what the user gave the folder by.
    """
    try:
        above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        reason = None if above.is_dir() else "is a file"
        if reason is None and not os.access(above, os.W_OK):
            reason = "cannot be written to"
        got = (
            None
            if reason is None
            else f"{folder}, {reason if above == folder else f'where {above} {reason}'}"
        )
    except (OSError, ValueError) as error:  # too long, a null byte, a file system that is gone
        got = f"{str(folder)[:200]!r} ({getattr(error, 'strerror', None) or error})"
    if got is not None:
        wanted = "a folder that can be written to"
        raise ArgumentError(format_error(where, option, got, wanted, "choose another path"))


@contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Whatever is raised inside because the disk that `path` is on is full becomes an OSError with ENOSPC.

    safetensors and torch.save raise errors of their own, and torch's does not give the reason.
    """
    try:
        yield
    except Exception as error:
        told = isinstance(error, OSError) and error.filename is not None
        if _is_full(error, path) and not told:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _is_full(error: BaseException, path: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    text = str(error)
    if f"os error {errno.ENOSPC}" in text or f"os error {errno.EDQUOT}" in text:
        return True
    if isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        return shutil.disk_usage(existing).free < _LITTLE
    return error.__cause__ is not None and _is_full(error.__cause__, path)
