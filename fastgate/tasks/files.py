"""Data files and hub data sets, read into `datasets.Dataset`, with an error that names the bad line."""

from __future__ import annotations

import csv
import gzip
import json
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError, say

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv")
_FORMATS = "JSON lines (.jsonl, .jsonl.gz), .json (lines, or one list), .csv or .tsv"


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars from `datasets` inside."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not was:
            enable_progress_bars()


def _suffix(path: Path) -> str:
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return suffix
    raise DataError(say("load_task", "file", path, _FORMATS, "convert the file or give it the right ending"))


def _first_bad_line(path: Path, suffix: str) -> str:
    """Where a file that did not load is wrong, as far as it can be told."""
    opener = gzip.open if suffix == ".jsonl.gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:  # type: ignore[operator]
            if suffix in (".csv", ".tsv"):
                rows = csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",")
                width = len(next(rows))
                lines = 0
                for row in rows:
                    lines += 1
                    if len(row) not in (0, width):
                        return f"line {rows.line_num} with {len(row)} fields under a header of {width}"
                return "fields that do not fit together" if lines else "no rows"
            if suffix == ".json" and file.read().lstrip().startswith("["):
                file.seek(0)
                listed = json.load(file)
                for place, row in enumerate(listed):
                    if not isinstance(row, dict):
                        return f"row {place}: a {type(row).__name__}, not an object"
                return "rows that do not fit together" if listed else "no rows"
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    return f"line {number}: a {type(row).__name__}, not an object"
    except json.JSONDecodeError as error:
        return f"line {number or error.lineno}: {error.msg}"
    except UnicodeDecodeError as error:
        return f"bytes that are not UTF-8 ({error.reason} at {error.start})"
    except (EOFError, gzip.BadGzipFile) as error:
        return f"a damaged gzip file ({error})"
    except csv.Error as error:
        return f"a damaged table ({error})"
    return "rows that do not fit together"


def read_file(path: str | Path) -> Dataset:
    """All rows of one file, in memory; raises DataError for a file that is missing, empty or damaged."""
    import datasets

    path = Path(path)
    if not path.is_file():
        raise DataError(say("load_task", "file", f"{path} (no such file)", _FORMATS, "check the path"))
    suffix = _suffix(path)
    if path.stat().st_size == 0:
        raise DataError(
            say("load_task", "file", f"{path} (empty)", "at least one row", "write the rows again")
        )
    options: dict[str, object] = {}
    if suffix in (".csv", ".tsv"):
        # An empty cell is missing; the words None, NA and null are text like any other.
        options = {"sep": "\t" if suffix == ".tsv" else ",", "keep_default_na": False}
    builder = "csv" if suffix in (".csv", ".tsv") else "json"
    with tempfile.TemporaryDirectory() as cache, quiet():
        try:
            rows = datasets.load_dataset(
                builder, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True, **options
            )
        except Exception as error:
            bad = _first_bad_line(path, suffix)
            remedy = "mend that line"
            raise DataError(say("load_task", "file", f"{path}: {bad}", "one row a line", remedy)) from error
    if len(rows) == 0:
        raise DataError(
            say("load_task", "file", f"{path} (no rows)", "at least one row", "write the rows again")
        )
    return rows


def read_folder(data_dir: str | Path, name: str, splits: Collection[str]) -> dict[str, Dataset]:
    """Those of `splits` found as `<data_dir>/<name>/<split>` with a known ending; `train` must be there."""
    folder = Path(data_dir) / name
    wanted = f"{folder}/train.jsonl.gz and an evaluation split beside it"
    if not folder.is_dir():
        remedy = "check --data-dir, or leave it out to use the hub's data set"
        raise DataError(say("load_task", "data_dir", f"{data_dir} without a folder {name}", wanted, remedy))
    found: dict[str, Path] = {}
    for suffix in SUFFIXES:
        for path in sorted(folder.glob(f"*{suffix}")):
            found.setdefault(path.name[: -len(suffix)], path)
    if "train" not in found:
        listing = ", ".join(sorted(found)) or "nothing"
        raise DataError(
            say("load_task", "data_dir", f"{listing} in {folder}", wanted, "add the missing split")
        )
    return {split: read_file(path) for split, path in found.items() if split in splits}


def read_hub(path: str, config: str | None, revision: str | None) -> dict[str, Dataset]:
    """The hub's data set, through `datasets.load_dataset` and its cache; DataError where it cannot be had."""
    import datasets

    try:
        return dict(datasets.load_dataset(path, config, revision=revision))
    except Exception as error:
        got = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        remedy = "check the connection to the hub, or put the files in a folder and pass --data-dir"
        raise DataError(
            say("load_task", f"hub data set {path}", got, "a data set that loads", remedy)
        ) from error
