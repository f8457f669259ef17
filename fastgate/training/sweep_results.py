"""The results of a sweep: a file with one JSON line for each run, which a kill never spoils."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from filelock import FileLock

from fastgate.errors import DataError, format_error
from fastgate.training.disk import full_disk_as_oserror

Line = dict[str, Any]  # a run's result


def read_lines(path: Path, command: str = "sweep") -> list[Line]:
    """The results in a file, without a line that a kill left incomplete.

    Raises DataError for a file that holds anything else. command: which one the error names.
    """
    try:
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8", errors="strict")
    except (OSError, UnicodeDecodeError) as error:
        _refuse_file(command, path, str(error)[:120], error)
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            result = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            if not line.startswith("{"):
                _refuse_file(command, path, f"line {number} is no JSON", error)
            continue  # incomplete
        if result is None:
            continue
        if not (isinstance(result, dict) and isinstance(result.get("settings"), dict)):
            _refuse_file(command, path, f"line {number} is no result of a run", None)
        lines.append(result)
    return lines


# What each command calls the file, and what to do about a wrong one.
_ARGUMENTS = {
    "sweep": ("--out", "choose another file"),
    "report": ("LINES", "pass the file that `fastgate sweep` wrote"),
}


def _refuse_file(command: str, path: Path, why: str, error: Exception | None) -> NoReturn:
    argument, remedy = _ARGUMENTS[command]
    raise DataError(
        format_error(command, argument, f"{path}: {why}", "results of `fastgate sweep`", remedy)
    ) from error


def append_line(out: Path, line: Mapping[str, Any]) -> None:
    """Append a line, unless its run has one already. An incomplete last line is removed first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_as_oserror(out), FileLock(out.with_name(f".{out.name}.lock")):
        if any(written["settings"] == line["settings"] for written in read_lines(out)):
            return  # a process with another work folder was faster
        with out.open("ab+") as file:
            _remove_incomplete_line(file)
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _remove_incomplete_line(file: BinaryIO) -> None:
    """End the file with a complete line."""
    file.seek(0)
    content = file.read()
    last = content[content.rfind(b"\n") + 1 :]
    try:
        complete = not last or json.loads(last) is not None
    except ValueError:
        complete = False
    if last and complete:
        file.write(b"\n")
    elif last:
        file.truncate(len(content) - len(last))


_RESULT_KEYS: dict[str, type | tuple[type, ...]] = {
    "task": str, "model": str, "method": str, "metric": str, "kept": list, "layers": int, "gates": list,
    "score": (int, float), "dense_score": (int, float), "seed": int,
}  # fmt: skip


def check_results(path: Path) -> None:
    """Raises DataError unless `fastgate report` can make tables of the file."""
    if not path.is_file():
        _refuse_file("report", path, "a folder" if path.is_dir() else "no such file", None)
    for line in read_lines(path, "report"):
        wrong = [key for key, kind in _RESULT_KEYS.items() if not isinstance(line.get(key), kind)]
        if wrong or line["layers"] < 1 or "max_length" not in line["settings"]:
            _refuse_file("report", path, f"a line without {', '.join(wrong) or 'its settings'}", None)
