"""Trainer checkpoints that are whole or not there: written aside, listed, renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from fastgate.errors import CheckpointError, format_error
from fastgate.models.atomic_files import flush

MANIFEST = "fastgate_files.json"  # written last: every other file of the checkpoint and its size in bytes
ASIDE = ".writing"  # checkpoints under way are in this folder of the output folder
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path) -> None:
    """Flush every file of a finished checkpoint to the disk and list it, by its size, in the manifest."""
    sizes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        sizes[str(path.relative_to(folder))] = path.stat().st_size
        flush(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(sizes, indent=1))
    flush(manifest)


def publish(folder: Path, target: Path) -> None:
    """Move a sealed checkpoint to its place, over one of the same step."""
    if target.exists():
        shutil.rmtree(target)
    os.replace(folder, target)
    flush(target.parent)


def is_complete(folder: Path) -> bool:
    """Whether every file of the manifest is there at its size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def check_complete(folder: Path) -> None:
    """Raises CheckpointError if `folder` is not a whole checkpoint of the self-pruning Trainer."""
    if not is_complete(folder):
        remedy = "pass True for the newest complete checkpoint, or start anew"
        got = f"{folder}, {'incomplete or of another trainer' if folder.is_dir() else 'no folder'}"
        raise CheckpointError(
            format_error("train", "resume_from_checkpoint", got, "a complete checkpoint", remedy)
        )


def last_complete(output_dir: Path) -> Path:
    """The newest complete checkpoint under `output_dir`. Raises CheckpointError if there is none."""
    folders = checkpoints(output_dir)
    for folder in reversed(folders):
        if is_complete(folder):
            return folder
    got = f"{len(folders)} incomplete" if folders else "none"
    remedy = "start anew without resume_from_checkpoint, and save oftener (save_steps)"
    wanted = "a complete checkpoint-N folder"
    raise CheckpointError(
        format_error("train", "resume_from_checkpoint", f"{got} in {output_dir}", wanted, remedy)
    )


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-N under `output_dir`, by step."""
    if not output_dir.is_dir():
        return []
    named = [
        (int(m[1]), path)
        for path in output_dir.iterdir()
        if (m := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(named)]


def rotate(output_dir: Path, limit: int | None, best: str | None, saved: Path) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest, the best, nor the one just `saved`: one
    of an earlier run may have a higher number."""
    if not limit or limit < 1:
        return
    folders = checkpoints(output_dir)
    safe = {path.resolve() for path in (*folders[-1:], saved)} | ({Path(best).resolve()} if best else set())
    excess = len(folders) - max(limit, len(safe))
    for path in [p for p in folders if p.resolve() not in safe][: max(excess, 0)]:
        shutil.rmtree(path, ignore_errors=True)
