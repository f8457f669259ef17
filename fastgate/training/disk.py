"""Files that are written completely or not at all, and one error for a full disk in any library."""

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

_FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)
_FULL_DISK_BYTES = 1 << 20  # a disk with less free is taken to be full if a writer does not say why it failed


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file completely, or leave the one before as it was."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def check_makeable(where: str, option: str, folder: Path) -> None:
    """Raises ArgumentError unless `folder` can be written to, or could be made. Nothing is made.

    where, option: what the error names, the command and the option that the user gave the folder by.
    """
    try:
        existing = _nearest_existing(folder)
        reason = None if existing.is_dir() else "is a file"
        if reason is None and not os.access(existing, os.W_OK):
            reason = "cannot be written to"
        place = reason if existing == folder else f"where {existing} {reason}"
        got = None if reason is None else f"{folder}, {place}"
    except (OSError, ValueError) as error:  # too long, a null byte, a file system that is gone
        got = f"{str(folder)[:200]!r} ({getattr(error, 'strerror', None) or error})"
    if got is not None:
        wanted = "a folder that can be written to"
        raise ArgumentError(format_error(where, option, got, wanted, "choose another path"))


def _nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))


@contextmanager
def full_disk_as_oserror(path: Path) -> Iterator[None]:
    """Turn any error inside that a full disk caused into an OSError with ENOSPC.

    path: a file or folder on that disk. safetensors and torch.save raise errors of their own, and torch's
    does not give the reason.
    """
    try:
        yield
    except Exception as error:
        names_file = isinstance(error, OSError) and error.filename is not None
        if _is_full(error, path) and not names_file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _is_full(error: BaseException, path: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL_DISK_ERRORS
    text = str(error)
    if f"os error {errno.ENOSPC}" in text or f"os error {errno.EDQUOT}" in text:
        return True
    if isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        return shutil.disk_usage(existing).free < _FULL_DISK_BYTES
    return error.__cause__ is not None and _is_full(error.__cause__, path)
