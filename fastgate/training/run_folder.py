"""The output folder of `fastgate finetune`: claimed once a run is known to work, resumed by the same run.

A resumed run may have another target as long as its pruning has not begun, because no setting of
PRUNING_KEYS affects the dense model. Every other setting has to be as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastgate.errors import ArgumentError, format_error
from fastgate.pruning.trainer_checkpoints import checkpoints, is_complete
from fastgate.training.config import PruningOptions
from fastgate.training.disk import check_makeable, full_disk_as_oserror, read_json, write_json
from fastgate.training.phases import RESULT
from fastgate.training.progress import DENSE
from fastgate.training.setting_ranges import option_of
from fastgate.training.targets import TARGET_KEYS

WHERE = "finetune"
RUN, HISTORY = "run.json", "history.json"
PRUNING_KEYS = (*TARGET_KEYS, "keep", "prune_epochs", "prune_lr", *(f.name for f in fields(PruningOptions)))
_WORK, _PRUNED, _ROWS = "work", "pruned", "rows_sha256"
_OWN = (DENSE, _PRUNED, _WORK, RUN, RESULT, HISTORY, "report.md", "gates.png", "gates.svg")
_UNFINISHED = f".{RUN}.writing"  # what a kill leaves of a folder's first file


def check_free(out: Path, resume: bool) -> None:
    """Raises ArgumentError unless a run can be kept in `out`. Nothing is written."""
    check_makeable(WHERE, "--out", out)
    if not out.is_dir():
        return
    others = [path.name for path in out.iterdir() if path.name != _UNFINISHED]
    if RUN in others and not resume:
        remedy = "pass --resume to continue it, or choose another folder"
        _refuse(f"{out}, which holds a run", "a new folder", remedy)
    if others and RUN not in others:
        _refuse(f"{out}, not empty", "a new folder", "choose another")


def check_replaceable(out: Path) -> None:
    """Raises ArgumentError unless `out` is free for the demo, or holds an earlier one, which it replaces."""
    check_makeable("demo", "--out", out)
    holds_demo = False
    if (out / RUN).is_file():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            holds_demo = not read_json(out / RUN).get("data")  # `finetune` says where its rows came from
        if not holds_demo:
            got = f"{out}, which holds a run of `fastgate finetune`"
            raise ArgumentError(format_error("demo", "--out", got, "a new folder", "choose another"))
    else:
        check_free(out, resume=False)


def check_same(out: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Raises ArgumentError if `out` holds a run that cannot be continued with the settings `wanted`.

    Returns the settings it began with, None if there is no run yet.
    """
    if not (out / RUN).is_file():
        return None
    try:
        earlier = {"pooling": "first", "bf16": False, **read_json(out / RUN)}  # older runs had no choice
    except (OSError, ValueError, TypeError) as error:
        got = f"{out / RUN}, which is damaged ({str(error)[:80]})"
        raise ArgumentError(
            format_error(WHERE, "--out", got, "the settings of a run", "choose another folder")
        ) from error
    keys = [key for key in dict.fromkeys([*wanted, *earlier]) if key != _ROWS]
    differ = [key for key in keys if earlier.get(key) != wanted.get(key)]
    begun = pruning_has_begun(out)
    blocking = [key for key in differ if key not in PRUNING_KEYS or begun]
    max_drop_switched = (earlier.get("max_drop") is None) != (wanted["max_drop"] is None)
    if not blocking and max_drop_switched and dense_has_begun(out):
        blocking = ["max_drop"]  # it keeps some training rows from the dense model
    if blocking:
        remedy = "resume with the settings the run began with, or choose another folder"
        if begun and all(key in PRUNING_KEYS for key in blocking):
            remedy = "its pruning has begun: " + remedy
        was, now = (_describe(settings, wanted, earlier, blocking) for settings in (earlier, wanted))
        raise ArgumentError(format_error(WHERE, "--resume", now, was, remedy))
    return earlier


def _describe(
    settings: Mapping[str, Any], wanted: Mapping[str, Any], earlier: Mapping[str, Any], keys: list[str]
) -> str:
    """Options and values of those settings; of `data` the parts that differ."""
    parts = []
    for name in keys:
        if name == "data":
            was, now = earlier.get(name) or {}, wanted.get(name) or {}
            for key in dict.fromkeys([*was, *now]):
                if was.get(key) != now.get(key):
                    parts.append(f"{option_of(key)} {_value_text((settings.get(name) or {}).get(key))}")
        else:
            parts.append(f"{option_of(name)} {_value_text(settings.get(name))}")
    return ", ".join(parts)


def _value_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "not given" if value is None else str(value)


def claim(out: Path, settings: Mapping[str, Any], before: Mapping[str, Any] | None, rows: Any) -> None:
    """Make `out` the folder of the run with these settings.

    before: the settings it began with, None for no run. rows: the tokenised ones. Raises ArgumentError if
    they are not those that the run began with.
    """
    digest = _digest(rows)
    if before is not None:
        if before.get(_ROWS, digest) != digest:
            got, wanted = "other rows or another tokenizer", f"those that the run in {out} began with"
            raise ArgumentError(
                format_error(WHERE, "--resume", got, wanted, "put them back, or choose another folder")
            )
        if all(before.get(key) == value for key, value in settings.items()):
            return
    try:
        with full_disk_as_oserror(out):
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / RUN, {**settings, _ROWS: digest})
    except OSError as error:
        _refuse(f"{out} ({error.strerror})", "a folder that can be written to", "choose another path")
    for path in (out / _WORK).glob(f"{_PRUNED}*"):  # incomplete, and of an earlier target
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _digest(rows: Any) -> str:
    """Of the tokens and labels of every row that is trained or scored on."""
    digest = hashlib.sha256()
    for split in sorted(rows):
        digest.update(split.encode())
        for batch in rows[split].iter(1000):
            digest.update(json.dumps([batch["input_ids"], batch["labels"]]).encode())
    return digest.hexdigest()


def dense_has_begun(out: Path) -> bool:
    """Whether `out` holds a dense model, or a checkpoint of its training."""
    return (out / DENSE).is_dir() or any(is_complete(path) for path in checkpoints(out / _WORK / DENSE))


def pruning_has_begun(out: Path) -> bool:
    """Whether `out` holds a pruned model, or a checkpoint that pruning would continue from."""
    trainings = [path for path in (out / _WORK).glob(f"{_PRUNED}*") if path.is_dir()]
    return any(out.glob(f"{_PRUNED}*")) or any(
        is_complete(path) for training in trainings for path in checkpoints(training)
    )


def clear(out: Path) -> None:
    """Remove what an earlier run left in `out`, and nothing else."""
    if (out / RUN).is_file():
        for name in _OWN:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _refuse(got: str, wanted: str, remedy: str) -> None:
    raise ArgumentError(format_error(WHERE, "--out", got, wanted, remedy))
