"""Replace several files of a folder at once, so that a reader finds all of the old ones or all of the new.

The folder cannot be renamed as a whole, because it may hold files of others. So the new files are first
written to a folder inside it. One rename of that folder is the commit. Then the files move to their places:
first a notice takes the place of `config.json`, which every loader of transformers refuses, then the other
files move, and the new `config.json` comes last. A process that is killed before the commit leaves the old
files. One that is killed after it leaves the new ones: `find` reads them where they are, and `finish` moves
them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

STAGING = ".fastgate-saving-"  # prefix of a folder whose files do not count yet
COMMITTED = ".fastgate-committed"  # files here count, and those beside it of the same names do not
LAST = "config.json"  # no loader reads a folder without it
NOTICE = "interrupted.json"  # takes the place of LAST while files move


@contextmanager
def replace_files(folder: Path, notice: str) -> Iterator[Path]:
    """Yield an empty folder; when the block ends, what was written there replaces the files of `folder`.

    `folder` is made if it is missing. Its other files stay. An error in the block changes nothing and leaves
    nothing behind. notice: the text of `config.json` while files move.
    """
    new_folders = _make(folder)
    try:
        with _locked(folder):
            finish(folder)
            for leftover in folder.glob(f"{STAGING}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
            try:
                staging.chmod(folder.stat().st_mode & 0o777)  # whoever reads the folder may read a commit
                yield staging
                (staging / NOTICE).write_text(notice)
                for path in sorted(staging.rglob("*")):
                    flush(path)
                flush(staging)
                os.replace(staging, folder / COMMITTED)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            finish(folder)
    except BaseException:
        for path in new_folders:
            with suppress(OSError):  # it is not empty: something else was written there
                path.rmdir()
        raise


def find(folder: Path, name: str) -> Path:
    """Where the file `name` of `folder` is now, whether or not a commit has been moved to its place."""
    committed = folder / COMMITTED / name
    return committed if committed.is_file() else folder / name


def is_interrupted(folder: Path) -> bool:
    """Whether files of a commit still have to be moved."""
    committed = folder / COMMITTED
    return committed.is_dir() and any(committed.iterdir())


def finish(folder: Path) -> None:
    """Move the files of a commit to their places, if there is one. Several processes may do so at once."""
    committed = folder / COMMITTED
    if not committed.is_dir():
        return
    if (folder / LAST).exists() and (committed / LAST).is_file():
        _move(committed, folder, NOTICE)
    with suppress(FileNotFoundError):
        (committed / NOTICE).unlink()
    flush(folder)
    for path in sorted(p for p in committed.rglob("*") if p.is_file()):
        if path != committed / LAST:
            _move(committed, folder, str(path.relative_to(committed)))
    flush(folder)
    _move(committed, folder, LAST)
    shutil.rmtree(committed, ignore_errors=True)
    flush(folder)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or a folder."""
    # Some systems refuse it for folders; a rename is atomic all the same.
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(source: Path, target: Path, name: str) -> None:
    place = target / (LAST if name == NOTICE else name)
    place.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):  # another process has moved it
        os.replace(source / name, place)


def _make(folder: Path) -> list[Path]:
    """Make the folder and those above it; returns the ones that were missing, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks. The lock is on the folder: no file is left."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
