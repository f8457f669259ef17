"""Load a task by name or from the user's own files, and check every row before any training starts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import DataError, say
from .catalog import CATALOG, KINDS, Spec, hub_config
from .files import read_file, read_folder, read_hub
from .metrics import is_iob2
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset

_DEFAULT_COLUMNS = {
    "text": ("text",),
    "pair": ("text", "text_pair"),
    "regression": ("text",),
    "tokens": ("tokens",),
}
_DEFAULT_TARGET = {"text": "label", "pair": "label", "regression": "label", "tokens": "tags"}
_DEFAULT_METRIC = {
    "text": "accuracy",
    "pair": "accuracy",
    "regression": "spearman",
    "tokens": "token_accuracy",
}


def _fail(argument: str, got: object, wanted: str, remedy: str) -> NoReturn:
    raise DataError(say("load_task", argument, got, wanted, remedy))


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    *,
    evaluate_on: Sequence[str] = (),
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
    seed: int = 0,
) -> Task:
    """A task of the catalogue. Raises DataError for anything in the data that would stop a training later.

    With `data_dir` its splits are `<data_dir>/<name>/<split>.jsonl.gz` (or .jsonl, .json, .csv, .tsv),
    without it the hub's data set of that name. `evaluate_on` overrides the splits that are scored (together).
    `max_train_rows` and `max_eval_rows` keep that many rows, drawn by a shuffle with `seed`.
    """
    if name not in CATALOG:
        remedy = "pick one of them, or pass your own files with a task type"
        _fail("name", repr(name), "one of " + ", ".join(CATALOG), remedy)
    spec = CATALOG[name]
    if data_dir is not None:
        raw = read_folder(data_dir, spec.folder or name, {"train", *(evaluate_on or spec.evaluate_on)})
    elif spec.hub is None:
        wanted = f"a folder with {name}/train.jsonl.gz and a split to score on: its owners give it away alone"
        _fail("data_dir", "none", wanted, f"write rows of {spec.columns[0]} and {spec.target} there")
    else:
        raw = read_hub(spec.hub, hub_config(name, spec), spec.hub_revision)
    return _build(name, spec, raw, evaluate_on, max_train_rows, max_eval_rows, seed)


def load_files(
    kind: str,
    train: str | Path | None,
    validation: str | Path,
    *,
    columns: Sequence[str] = (),
    target: str | None = None,
    labels: Sequence[str] = (),
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
    seed: int = 0,
) -> Task:
    """A task from the user's own files (.jsonl, .jsonl.gz, .json, .csv, .tsv).

    kind: `text`, `pair`, `regression` (one or two text columns and a number) or `tokens` (lists of words and
    tags, or strings of them separated by blanks). columns: the input columns, by default `text` (`text_pair`)
    or `tokens`; target: the label column, by default `label` or `tags`. labels: the class names in the order
    of the ids, by default those of the training rows, sorted; `train` may be None where they are given.
    Raises DataError as `load_task` does.
    """
    if kind not in KINDS:
        _fail("kind", repr(kind), "one of " + ", ".join(KINDS), "choose what fits the label column")
    spec = Spec(
        kind,
        tuple(columns) or _DEFAULT_COLUMNS[kind],
        target or _DEFAULT_TARGET[kind],
        _DEFAULT_METRIC[kind],
        labels=tuple(labels),
        named=train is None,
    )
    allowed = {"text": (1,), "pair": (2,), "regression": (1, 2), "tokens": (1,)}[kind]
    if len(spec.columns) not in allowed:
        wanted = " or ".join(map(str, allowed)) + f" input column(s) for {kind}"
        _fail("columns", ", ".join(spec.columns), wanted, "name the input columns again")
    raw = {} if train is None else {"train": read_file(train)}
    raw["validation"] = read_file(validation)
    name = Path(train or validation).name.split(".")[0]
    return _build(name, spec, raw, (), max_train_rows, max_eval_rows, seed)


def _build(
    name: str,
    spec: Spec,
    raw: dict[str, Dataset],
    evaluate_on: Sequence[str],
    max_train_rows: int | None,
    max_eval_rows: int | None,
    seed: int,
) -> Task:
    import datasets

    always = () if spec.named else ("train",)
    missing = [split for split in (*always, *evaluate_on) if split not in raw]
    if missing:
        _fail(
            "splits", ", ".join(sorted(raw)), f"{', '.join(missing)} among them", "name splits that are there"
        )
    wanted = [split for split in (evaluate_on or spec.evaluate_on) if split in raw]
    used = {split: raw[split] for split in (*always, *wanted)}
    for split, rows in used.items():
        _need_columns(rows, spec, f"{name} {split}")
    for split in wanted:
        if _unlabelled(used[split], spec):
            if evaluate_on:
                _fail(f"{name} {split}", "labels that are all -1", "gold labels", "evaluate on another split")
            del used[split]
    wanted = [split for split in wanted if split in used]
    if not wanted:
        needed = f"a labelled split out of {', '.join(evaluate_on or spec.evaluate_on)}"
        _fail("splits", ", ".join(sorted(raw)), needed, "add one, or name another to evaluate on")
    if spec.kind == "tokens":
        plain, labels = _tokens(name, used, spec)
    elif spec.kind == "regression":
        plain, labels = {s: _numbers(rows, spec, f"{name} {s}") for s, rows in used.items()}, ()
    else:
        plain, labels = _classes(name, used, spec)
    splits = {split: datasets.Dataset.from_dict(columns) for split, columns in plain.items()}
    if max_train_rows is not None and "train" in splits:
        splits["train"] = _draw(splits["train"], max_train_rows, seed, "max_train_rows")
    if max_eval_rows is not None:
        share = [
            math.ceil(max_eval_rows * len(splits[s]) / sum(len(splits[t]) for t in wanted)) for s in wanted
        ]
        for split, rows in zip(wanted, share, strict=True):
            splits[split] = _draw(splits[split], rows, seed, "max_eval_rows")
    metric = spec.metric
    if spec.kind == "tokens":
        metric = "entity_f1" if is_iob2(labels) else "token_accuracy"
    return Task(name, spec.kind, splits, labels, metric, tuple(wanted), (*spec.columns, spec.target))


def _draw(rows: Dataset, count: int, seed: int, argument: str) -> Dataset:
    if count < 1:
        _fail(argument, count, "at least 1", "raise it or leave it out")
    return rows if count >= len(rows) else rows.shuffle(seed=seed).select(range(count))


def _need_columns(rows: Dataset, spec: Spec, where: str) -> None:
    missing = [column for column in (*spec.columns, spec.target) if column not in rows.column_names]
    if missing:
        got = ", ".join(rows.column_names)
        _fail(
            f"{where}: columns",
            got,
            f"{', '.join(missing)} among them",
            "name the columns that hold the data",
        )


def _unlabelled(rows: Dataset, spec: Spec) -> bool:
    """GLUE's test sets on the hub carry -1 in place of every label."""
    return spec.kind in ("text", "pair") and all(value == -1 for value in rows[spec.target][:])


def _texts(rows: Dataset, spec: Spec, where: str) -> dict[str, list]:
    found = {}
    for ours, column in zip(("text", "text_pair"), spec.columns, strict=False):
        values = rows[column][:]
        for number, value in enumerate(values):
            if not isinstance(value, str):
                got = "null" if value is None else f"a {type(value).__name__}"
                _fail(f"{where}: column {column}: row {number}", got, "a text", "drop or fill such rows")
        if not any(value.strip() for value in values):
            _fail(
                f"{where}: column {column}", "blank in every row", "texts", "name the column with the texts"
            )
        found[ours] = values
    return found


def _targets(rows: Dataset, spec: Spec, where: str) -> list:
    values = rows[spec.target][:]
    for number, value in enumerate(values):
        if value is None or value == "" or (value == -1 and spec.kind != "regression"):
            got = {None: "null", "": "an empty label"}.get(value, "-1 (no label)")
            _fail(f"{where}: column {spec.target}: row {number}", got, "a label", "drop or fill such rows")
    return values


def _numbers(rows: Dataset, spec: Spec, where: str) -> dict[str, list]:
    found = []
    for number, value in enumerate(_targets(rows, spec, where)):
        try:
            if isinstance(value, bool):
                raise ValueError
            found.append(float(value))
            if not math.isfinite(found[-1]):
                raise ValueError
        except (TypeError, ValueError):
            place = f"{where}: column {spec.target}: row {number}"
            _fail(place, repr(value), "a finite number", "mend it, or choose the task type text for classes")
    return {**_texts(rows, spec, where), "label": found}


def _class_names(feature: Any, spec: Spec) -> tuple[str, ...]:
    """Names the data set itself fixes for its integer labels, or those of the catalogue."""
    feature = getattr(feature, "feature", feature)
    return tuple(getattr(feature, "names", ())) or spec.labels


def _as_class(value: object, place: str) -> int | str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        if not value.is_integer():
            _fail(
                place, value, "a class (text or whole number)", "choose the task type regression for numbers"
            )
        return int(value)
    if isinstance(value, int | str):
        return value
    return _fail(
        place, f"a {type(value).__name__}", "a class (text or whole number)", "name the label column"
    )


def _class_table(
    train: Iterable[int | str], names: tuple[str, ...], where: str, named: bool
) -> dict[int | str, int]:
    """Label as found in the data -> id."""
    seen = sorted(set(train), key=lambda value: (isinstance(value, str), value))
    if names and all(isinstance(value, int) for value in seen):
        return {i: i for i in range(len(names))}
    if names and (named or all(value in names for value in seen)):
        return {name: i for i, name in enumerate(names)}
    if len(seen) < 2:
        _fail(where, f"one label only ({seen[0]!r})", "two or more", "add rows of the other classes")
    return {value: i for i, value in enumerate(seen)}


def _lookup(value: int | str, table: dict[int | str, int], place: str) -> int:
    if value not in table:
        known = ", ".join(map(str, list(table)[:20])) + (", ..." if len(table) > 20 else "")
        _fail(
            place,
            repr(value),
            f"a known label ({known})",
            "mend it, or add such training rows",
        )
    return table[value]


def _classes(
    name: str, used: dict[str, Dataset], spec: Spec
) -> tuple[dict[str, dict[str, list]], tuple[str, ...]]:
    found: dict[str, dict[str, list]] = {}
    table: dict[int | str, int] = {}
    names = _class_names(next(iter(used.values())).features[spec.target], spec)
    for split, rows in used.items():
        where = f"{name} {split}"
        texts = _texts(rows, spec, where)
        place = f"{where}: column {spec.target}"
        values = [_as_class(v, f"{place}: row {i}") for i, v in enumerate(_targets(rows, spec, where))]
        values = list(map(str, values)) if spec.named else values
        table = table or _class_table(values, names, place, spec.named)
        found[split] = {
            **texts,
            "label": [_lookup(v, table, f"{place}: row {i}") for i, v in enumerate(values)],
        }
    return found, _names(table, names)


def _names(table: dict[int | str, int], names: tuple[str, ...]) -> tuple[str, ...]:
    return names if names and len(names) == len(table) else tuple(map(str, table))


def _tokens(
    name: str, used: dict[str, Dataset], spec: Spec
) -> tuple[dict[str, dict[str, list]], tuple[str, ...]]:
    (words_column,) = spec.columns
    found: dict[str, dict[str, list]] = {}
    table: dict[int | str, int] = {}
    names = _class_names(next(iter(used.values())).features[spec.target], spec)
    for split, rows in used.items():
        where = f"{name} {split}"
        words, tags = rows[words_column][:], rows[spec.target][:]
        for number, (row, marks) in enumerate(zip(words, tags, strict=True)):
            place = f"{where}: row {number}"
            row, marks = (v.split() if isinstance(v, str) else v for v in (row, marks))
            if not row or not marks or None in row or None in marks:
                wanted = f"words in {words_column} and tags in {spec.target}"
                _fail(place, "null or nothing", wanted, "drop or fill such rows")
            if len(row) != len(marks):
                got = f"{len(row)} words and {len(marks)} tags"
                _fail(place, got, "one tag a word", f"mend {words_column} or {spec.target}")
            marks = [_as_class(mark, place) for mark in marks]
            words[number], tags[number] = list(map(str, row)), list(map(str, marks)) if spec.named else marks
        if not table:
            place = f"{where}: column {spec.target}"
            table = _class_table((tag for marks in tags for tag in marks), names, place, spec.named)
        ids = [[_lookup(tag, table, f"{where}: row {i}") for tag in marks] for i, marks in enumerate(tags)]
        found[split] = {"tokens": words, "tags": ids}
    return found, _names(table, names)
