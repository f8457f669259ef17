"""Load a task by name or from the user's own files, and check every row before any training starts.

Messages name the options of the command line: `--train F` is the argument `train`, and so on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgate.data.catalog import CATALOG, Spec, check_kind, hub_config
from fastgate.data.files import Table, read_file, read_folder, read_hub
from fastgate.data.formats import refuse
from fastgate.data.labels import Classes, class_key, class_keys
from fastgate.data.lists import tags_of, words_of
from fastgate.data.metrics import is_iob2
from fastgate.data.task import Task

if TYPE_CHECKING:
    from datasets import Dataset

_NUMBER = re.compile(r"\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\s*")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which no tokenizer takes

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
    `max_train_rows` and `max_eval_rows` keep that many rows, drawn by a shuffle with `seed`; each of
    several splits keeps its share.
    """
    if name not in CATALOG:
        remedy = "pick one of them, or pass your own files with --task-type, --train and --validation"
        refuse("fastgate", "--task", repr(name), "one of " + ", ".join(CATALOG), remedy)
    spec = CATALOG[name]
    if data_dir is not None:
        raw = read_folder(data_dir, spec.folder or name, {"train", *(evaluate_on or spec.evaluate_on)})
    elif spec.hub is None:
        wanted = f"a folder with {name}/train.jsonl.gz and a split to score on: its owners give it away alone"
        refuse(
            "fastgate",
            "--data-dir",
            "none",
            wanted,
            f"write rows of {spec.columns[0]} and {spec.target} there",
        )
    else:
        raw = read_hub(name, spec.hub, hub_config(name, spec), spec.hub_revision)
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
    """A task from the user's own files (.jsonl, .jsonl.gz, .json, .csv, .tsv; formats.py says how they are
    read).

    kind: `text`, `pair`, `regression` (one or two text columns and a number) or `tokens` (lists of words and
    tags; in a table JSON or Python lists, or words separated by blanks). columns: the input columns, by
    default `text` (`text_pair`) or `tokens`; target: the label column, by default `label` or `tags`. labels:
    the class names in the order of the ids, by default those of the training rows, numbers in their order and
    before words; where they are given the rows hold these names, or all of them ids, and `train` may be None.
    Raises DataError as `load_task` does.
    """
    check_kind(kind)
    spec = Spec(
        kind,
        tuple(columns) or _DEFAULT_COLUMNS[kind],
        target or _DEFAULT_TARGET[kind],
        _DEFAULT_METRIC[kind],
        labels=tuple(labels),
        named=bool(labels) or kind == "regression",
    )
    _check_spec(spec)
    if train is None and not spec.named:
        refuse("fastgate", "--train", "none", "training rows, or the class names", "pass --train")
    raw = {} if train is None else {"train": read_file(train, "--train")}
    raw["validation"] = read_file(validation, "--validation")
    name = Path(train or validation).name.split(".")[0]
    return _build(name, spec, raw, (), max_train_rows, max_eval_rows, seed)


def _check_spec(spec: Spec) -> None:
    allowed = {"text": (1,), "pair": (2,), "regression": (1, 2), "tokens": (1,)}[spec.kind]
    given = ", ".join(spec.columns)
    if len(spec.columns) not in allowed:
        wanted = " or ".join(map(str, allowed)) + f" input column(s) for --task-type {spec.kind}"
        refuse("fastgate", "--columns", given, wanted, "name the input columns again")
    if len({*spec.columns, spec.target}) <= len(spec.columns):
        got = f"{given} with --label-column {spec.target}"
        refuse("fastgate", "--columns", got, "different columns", "name each column once")
    twice = sorted({label for label in spec.labels if spec.labels.count(label) > 1})
    if twice:
        refuse("fastgate", "labels", f"{twice[0]!r} twice", "every class name once", "rename one in id2label")


def _build(
    name: str,
    spec: Spec,
    raw: dict[str, Table],
    evaluate_on: Sequence[str],
    max_train_rows: int | None,
    max_eval_rows: int | None,
    seed: int,
) -> Task:
    import datasets

    _check_count("--max-train-rows", max_train_rows)
    _check_count("--max-eval-rows", max_eval_rows)
    if len(set(evaluate_on)) < len(evaluate_on):
        refuse("fastgate", "--evaluate-on", ", ".join(evaluate_on), "every split once", "name each once")
    there = ", ".join(sorted(raw)) or "none"
    trained = ("train",) if "train" in raw or not spec.named else ()
    missing = [split for split in (*trained, *evaluate_on) if split not in raw]
    if missing:
        option = "--evaluate-on" if missing[0] in evaluate_on else f"--task {name}"
        refuse(option, "splits", there, f"{', '.join(missing)} among them", "name splits that are there")
    wanted = [split for split in (evaluate_on or spec.evaluate_on) if split in raw]
    used = {split: raw[split] for split in (*trained, *wanted)}
    for rows in used.values():
        if len(rows) == 0:
            refuse(rows.where, "rows", "none", "at least one row", "use another split")
        _need_columns(rows, spec)
    unlabelled = tuple(split for split in wanted if _unlabelled(used[split], spec))
    if unlabelled and evaluate_on:
        where = used[unlabelled[0]].where
        refuse(
            where,
            f"column {spec.target}",
            "labels that are all -1",
            "gold labels",
            "evaluate on another split",
        )
    wanted = [split for split in wanted if split not in unlabelled]
    used = {split: rows for split, rows in used.items() if split not in unlabelled}
    if not wanted:
        needed = f"a labelled split out of {', '.join(evaluate_on or spec.evaluate_on)}"
        refuse(f"--task {name}", "splits", there, needed, "add one, or name another with --evaluate-on")
    if spec.kind == "tokens":
        plain, labels = _tokens(used, spec)
    elif spec.kind == "regression":
        plain, labels = (
            {s: {**_texts(rows, spec), "label": _numbers(rows, spec)} for s, rows in used.items()},
            (),
        )
    else:
        plain, labels = _classes(used, spec)
    splits = {split: datasets.Dataset.from_dict(columns) for split, columns in plain.items()}
    if max_train_rows is not None and "train" in splits:
        splits["train"] = _draw(splits["train"], max_train_rows, seed)
    if max_eval_rows is not None:
        shares = _shares(max_eval_rows, [len(splits[split]) for split in wanted])
        for split, share in zip(wanted, shares, strict=True):
            splits[split] = _draw(splits[split], share, seed)
        wanted = [split for split, share in zip(wanted, shares, strict=True) if share]
    metric = spec.metric
    if spec.kind == "tokens":
        metric = "entity_f1" if is_iob2(labels) else "token_accuracy"
    columns = (*spec.columns, spec.target)
    return Task(name, spec.kind, splits, labels, metric, tuple(wanted), columns, unlabelled)


def _check_count(option: str, count: int | None) -> None:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        refuse("fastgate", option, repr(count), "at least 1", "raise it or leave it out")


def _shares(count: int, sizes: Sequence[int]) -> list[int]:
    """How many of `count` rows each split gives, by its size: `count` together, or all if there are fewer."""
    if count >= sum(sizes):
        return list(sizes)
    exact = [count * size / sum(sizes) for size in sizes]
    found = [math.floor(share) for share in exact]
    largest = sorted(range(len(sizes)), key=lambda place: found[place] - exact[place])
    for place in largest[: count - sum(found)]:
        found[place] += 1
    return found


def _draw(rows: Dataset, count: int, seed: int) -> Dataset:
    return rows if count >= len(rows) else rows.shuffle(seed=seed).select(range(count))


def _need_columns(rows: Table, spec: Spec) -> None:
    missing = [column for column in (*spec.columns, spec.target) if column not in rows.column_names]
    if missing:
        names = [name if name == name.strip() else repr(name) for name in rows.column_names]
        got = ", ".join(names[:20])[:300] + (", ..." if len(names) > 20 else "")
        remedy = (
            "name the columns that hold the data with --columns and --label-column; tables need a header line"
        )
        refuse(rows.where, "columns", got, f"{', '.join(missing)} among them", remedy)


def _unlabelled(rows: Table, spec: Spec) -> bool:
    """GLUE's test sets on the hub carry -1 in place of every label."""
    return spec.kind in ("text", "pair") and all(
        class_key(value) == "-1" for value in rows.column(spec.target)
    )


def _check_characters(text: str, rows: Table, column: str, number: int) -> None:
    if _HALF_CHARACTER.search(text):
        got = "half of a surrogate pair, which is no character"
        refuse(rows.where, rows.place(column, number), got, "a text", "write the character as UTF-8")


def _texts(rows: Table, spec: Spec) -> dict[str, list]:
    found = {}
    for ours, column in zip(("text", "text_pair"), spec.columns, strict=False):
        values = rows.column(column)
        for number, value in enumerate(values):
            if not isinstance(value, str):
                got = "null" if value is None else f"a {type(value).__name__}"
                refuse(rows.where, rows.place(column, number), got, "a text", "drop or fill such rows")
            _check_characters(value, rows, column, number)
        if not any(value.strip() for value in values):
            remedy = "name the column with the texts"
            refuse(rows.where, f"column {column}", "blank in every row", "texts", remedy)
        found[ours] = values
    return found


def _targets(rows: Table, spec: Spec) -> list:
    values = rows.column(spec.target)
    for number, value in enumerate(values):
        blank = isinstance(value, str) and not value.strip()
        missing = spec.kind != "regression" and class_key(value) == "-1"
        if value is None or blank or missing:
            got = "null" if value is None else "an empty label" if blank else "-1 (no label)"
            remedy = "drop or fill such rows"
            if missing:
                remedy = "drop such rows, or give the class another name if it is one"
            refuse(rows.where, rows.place(spec.target, number), got, "a label", remedy)
    return values


def _numbers(rows: Table, spec: Spec) -> list[float]:
    found = []
    for number, value in enumerate(_targets(rows, spec)):
        try:
            if isinstance(value, bool) or (isinstance(value, str) and not _NUMBER.fullmatch(value)):
                raise ValueError
            found.append(float(value))
            if not math.isfinite(found[-1]):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            got, remedy = repr(value)[:80], "mend it, or choose --task-type text for classes"
            refuse(rows.where, rows.place(spec.target, number), got, "a finite number", remedy)
    return found


def _classes(used: dict[str, Table], spec: Spec) -> tuple[dict[str, dict[str, list]], tuple[str, ...]]:
    texts = {split: _texts(rows, spec) for split, rows in used.items()}
    keys = {
        split: class_keys(rows, spec.target, _targets(rows, spec), range(len(rows)))
        for split, rows in used.items()
    }
    classes = Classes.of(used, keys, spec)
    found: dict[str, dict[str, list]] = {
        split: {
            **texts[split],
            "label": [classes.id(key, rows, spec.target, n) for n, key in enumerate(keys[split])],
        }
        for split, rows in used.items()
    }
    return found, classes.names


def _tokens(used: dict[str, Table], spec: Spec) -> tuple[dict[str, dict[str, list]], tuple[str, ...]]:
    (words_column,) = spec.columns
    words, tags, numbers, keys = {}, {}, {}, {}
    for split, rows in used.items():
        words[split], tags[split] = _words_and_tags(rows, words_column, spec.target)
        numbers[split] = [number for number, marks in enumerate(tags[split]) for _ in marks]
        flat = [mark for marks in tags[split] for mark in marks]
        keys[split] = class_keys(rows, spec.target, flat, numbers[split])
    classes = Classes.of(used, keys, spec)
    found: dict[str, dict[str, list]] = {}
    for split, rows in used.items():
        ids = iter(
            [classes.id(k, rows, spec.target, n) for k, n in zip(keys[split], numbers[split], strict=True)]
        )
        found[split] = {"tokens": words[split], "tags": [[next(ids) for _ in marks] for marks in tags[split]]}
    return found, classes.names


def _words_and_tags(
    rows: Table, words_column: str, tags_column: str
) -> tuple[list[list[str]], list[list[Any]]]:
    """The lists of every row, as long as each other and without gaps."""
    words, tags = rows.column(words_column), rows.column(tags_column)
    for number, pair in enumerate(zip(words, tags, strict=True)):
        row = words_of(pair[0], rows.where, rows.place(words_column, number))
        marks = tags_of(pair[1], rows.where, rows.place(tags_column, number))
        place = rows.place(tags_column, number)
        if not row or not marks or any(mark in (None, "") for mark in (*row, *marks)):
            wanted = f"words in {words_column} and tags in {tags_column}"
            refuse(rows.where, place, "null or nothing", wanted, "drop or fill such rows")
        if len(row) != len(marks):
            got, remedy = f"{len(row)} words and {len(marks)} tags", f"mend {words_column} or {tags_column}"
            refuse(rows.where, place, got, "one tag a word", remedy)
        if any(class_key(mark) in ("-1", "-100") for mark in marks):
            refuse(rows.where, place, "-1 or -100 (no tag)", "a tag for every word", "drop or fill such rows")
        for word in row:
            if isinstance(word, bool) or not isinstance(word, str | int | float):
                got, remedy = f"a {type(word).__name__} among the words", "write every word as text"
                refuse(rows.where, rows.place(words_column, number), got, "words", remedy)
            _check_characters(str(word), rows, words_column, number)
        words[number], tags[number] = list(map(str, row)), marks
    return words, tags
