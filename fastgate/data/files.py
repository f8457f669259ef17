"""Data files and hub data sets, read into tables whose errors name the file, the line and the remedy."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgate.data.formats import Rows, comma_separated, json_file, json_lines, refuse, tab_separated
from fastgate.errors import DataError

_READERS: dict[str, Callable[[str, str], Rows]] = {
    ".jsonl": json_lines,
    ".jsonl.gz": json_lines,
    ".json": json_file,
    ".csv": comma_separated,
    ".tsv": tab_separated,
}
SUFFIXES = tuple(_READERS)
_FORMATS = "JSON lines (.jsonl, .jsonl.gz), .json (lines, or one list), .csv or .tsv"


@dataclass(frozen=True)
class Table:
    """The rows of one split. where: how the user named them, such as `--train rows.csv`.

    classes: the names that the data set itself fixes for the whole numbers of a column, by column.
    """

    where: str
    rows: Rows
    classes: dict[str, tuple[str, ...]]

    @property
    def column_names(self) -> tuple[str, ...]:
        return self.rows.column_names

    def column(self, name: str) -> list[Any]:
        return self.rows.column(name)

    def __len__(self) -> int:
        return self.rows.count

    def place(self, column: str, number: int) -> str:
        """A row of a column in words: its line in the file, if it has one, and its number, counted from 0."""
        line = f"line {self.rows.lines[number]}, " if self.rows.lines else ""
        return f"column {column}: {line}row {number}"


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """No progress bars from `datasets` inside."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def _suffix(path: Path) -> str | None:
    """The ending that says the format; the longest where two fit."""
    fitting = [suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)]
    return max(fitting, key=len, default=None)


def _bytes(path: Path, where: str) -> bytes:
    """The file's content, without the compression of a .gz; DataError where it cannot be had."""
    try:
        if path.is_dir():
            refuse(where, "file", "a folder", _FORMATS, "name one of the files in it")
        if not path.exists():
            refuse(where, "file", "no such file", _FORMATS, "check the path")
        if not path.is_file():
            refuse(where, "file", "no regular file", _FORMATS, "write the rows to a file first")
        data = path.read_bytes()
        return gzip.decompress(data) if path.name.lower().endswith(".gz") else data
    except DataError:  # a ValueError too
        raise
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        remedy = "copy or compress it again; the file may be incomplete"
        refuse(where, "file", f"a damaged gzip file ({error})", "a whole one", remedy)
    except (OSError, ValueError) as error:
        got = getattr(error, "strerror", None) or error
        refuse(
            where, "file", f"no access ({got})", "a file that can be read", "check the path and the rights"
        )


def _text(data: bytes, where: str) -> str:
    """UTF-8, with or without a byte order mark; DataError that names the first line that is not."""
    remedy = "convert the file to UTF-8, for example with iconv -f LATIN1 -t UTF-8 (or -f UTF-16)"

    def line(position: int) -> str:
        before = data.count(b"\n", 0, position)
        return f"line {before + 1}"

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"bytes that are not UTF-8 (0x{data[error.start]:02x} at byte {error.start})"
        refuse(where, line(error.start), got, "UTF-8", remedy)
    if "\0" in text:
        refuse(where, line(data.index(b"\0")), "a NUL byte, as UTF-16 or a damaged file has", "UTF-8", remedy)
    text = text.removeprefix("\ufeff")
    return text if "\n" in text else text.replace("\r", "\n")


def read_file(path: str | Path, option: str = "file") -> Table:
    """All rows of one file, in memory; formats.py says how each format is read, the ending says which it is.

    option: what the user calls the file, such as `--train`. Raises DataError for a file that is missing,
    empty or damaged.
    """
    try:
        path = Path(os.path.expanduser(path))
    except TypeError:
        refuse(option, "file", repr(path), "a path", "pass the name of the file")
    where = f"{option} {path}"
    suffix = _suffix(path)
    data = _bytes(path, where)
    if suffix is None:
        refuse(
            where,
            "file",
            f"the ending {path.suffix!r}",
            _FORMATS,
            "convert the file or give it the right ending",
        )
    if not data.strip():
        refuse(where, "rows", "none (empty)", "at least one row", "write the rows again")
    rows = _READERS[suffix](_text(data, where), where)
    if rows.count == 0:
        refuse(where, "rows", "no rows", "at least one row", "write the rows again")
    return Table(where, rows, {})


def read_folder(data_dir: str | Path, name: str, splits: Collection[str]) -> dict[str, Table]:
    """Those of `splits` files as `<data_dir>/<name>/<split>` with a known ending; `train` must be there."""
    folder = Path(os.path.expanduser(data_dir)) / name
    where = f"--data-dir {data_dir}"
    wanted = f"{folder}/train.jsonl.gz and an evaluation split beside it"
    if not folder.is_dir():
        remedy = "check --data-dir, or leave it out to use the hub's data set"
        refuse("fastgate", "--data-dir", f"{data_dir} without a folder {name}", wanted, remedy)
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        suffix = _suffix(path)
        if suffix is not None:
            files.setdefault(path.name[: -len(suffix)], []).append(path)
    if "train" not in files:
        listing = ", ".join(sorted(files)) or "nothing"
        refuse(where, "splits", f"{listing} in {folder}", wanted, "add the missing split")
    for split in files.keys() & set(splits):
        if len(files[split]) > 1:
            got = " and ".join(path.name for path in files[split])
            refuse(where, f"split {split}", f"{got} in {folder}", "one file each", "remove one of them")
    return {split: read_file(paths[0], "--data-dir") for split, paths in files.items() if split in splits}


def read_hub(name: str, path: str, config: str | None, revision: str | None) -> dict[str, Table]:
    """The hub's data set, through `datasets.load_dataset` and its cache; DataError where it cannot be had."""
    import datasets

    try:
        loaded = dict(datasets.load_dataset(path, config, revision=revision))
    except Exception as error:
        got = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        remedy = "check the connection to the hub, or put the files in a folder and pass --data-dir"
        refuse(f"--task {name}", f"hub data set {path}", got, "a data set that loads", remedy)
    return {split: _hub_table(f"--task {name}, split {split}", dataset) for split, dataset in loaded.items()}


def _hub_table(where: str, dataset: Any) -> Table:
    features = {column: getattr(f, "feature", f) for column, f in dataset.features.items()}
    classes = {column: tuple(f.names) for column, f in features.items() if getattr(f, "names", None)}
    rows = Rows(tuple(dataset.column_names), lambda column: list(dataset[column][:]), len(dataset))
    return Table(where, rows, classes)
