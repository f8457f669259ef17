"""Load a task by name or from the user's own files, and check every row before any training starts.

Messages name the options of the command line: `--train F` is the argument `train`, and so on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgate.data.catalog import CATALOG, Spec, check_kind, check_name, hub_config
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
    check_name(name)
    spec = CATALOG[name]
    if data_dir is not None:
        tables = read_folder(data_dir, spec.folder or name, {"train", *(evaluate_on or spec.evaluate_on)})
    elif spec.hub is None:
        wanted = f"a folder with {name}/train.jsonl.gz and a split to score on: only its owners distribute it"
        refuse(
            "fastgate",
            "--data-dir",
            "none",
            wanted,
            f"write rows of {spec.columns[0]} and {spec.target} there",
        )
    else:
        tables = read_hub(name, spec.hub, hub_config(name, spec), spec.hub_revision)
    return _build(name, spec, tables, evaluate_on, _RowLimits(max_train_rows, max_eval_rows, seed))


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
    tables = {} if train is None else {"train": read_file(train, "--train")}
    tables["validation"] = read_file(validation, "--validation")
    name = Path(train or validation).name.split(".")[0]
    return _build(name, spec, tables, (), _RowLimits(max_train_rows, max_eval_rows, seed))


def _check_spec(spec: Spec) -> None:
    allowed = {"text": (1,), "pair": (2,), "regression": (1, 2), "tokens": (1,)}[spec.kind]
    columns = ", ".join(spec.columns)
    if len(spec.columns) not in allowed:
        wanted = " or ".join(map(str, allowed)) + f" input column(s) for --task-type {spec.kind}"
        refuse("fastgate", "--columns", columns, wanted, "name the input columns again")
    if len({*spec.columns, spec.target}) <= len(spec.columns):
        got = f"{columns} with --label-column {spec.target}"
        refuse("fastgate", "--columns", got, "different columns", "name each column once")
    repeated = sorted({label for label in spec.labels if spec.labels.count(label) > 1})
    if repeated:
        refuse(
            "fastgate", "labels", f"{repeated[0]!r} twice", "every class name once", "rename one in id2label"
        )


@dataclass(frozen=True)
class _RowLimits:
    """At most so many rows, drawn by a shuffle with `seed`; None for all."""

    train: int | None
    evaluation: int | None
    seed: int

    def __post_init__(self) -> None:
        for option, count in (("--max-train-rows", self.train), ("--max-eval-rows", self.evaluation)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                refuse("fastgate", option, repr(count), "at least 1", "raise it or leave it out")


def _build(
    name: str, spec: Spec, tables: dict[str, Table], evaluate_on: Sequence[str], limits: _RowLimits
) -> Task:
    """The task of the tables, by split, once every row is checked."""
    import datasets

    used, scored, unlabelled = _choose_splits(name, spec, tables, evaluate_on)
    columns, labels = _read_columns(used, spec)
    splits = {split: datasets.Dataset.from_dict(values) for split, values in columns.items()}
    if limits.train is not None and "train" in splits:
        splits["train"] = _draw(splits["train"], limits.train, limits.seed)
    if limits.evaluation is not None:
        shares = _shares(limits.evaluation, [len(splits[split]) for split in scored])
        for split, share in zip(scored, shares, strict=True):
            splits[split] = _draw(splits[split], share, limits.seed)
        scored = [split for split, share in zip(scored, shares, strict=True) if share]
    metric = spec.metric
    if spec.kind == "tokens":
        metric = "entity_f1" if is_iob2(labels) else "token_accuracy"
    column_names = (*spec.columns, spec.target)
    return Task(name, spec.kind, splits, labels, metric, tuple(scored), column_names, unlabelled)


def _choose_splits(
    name: str, spec: Spec, tables: dict[str, Table], evaluate_on: Sequence[str]
) -> tuple[dict[str, Table], list[str], tuple[str, ...]]:
    """(splits to read, those of them to score on, those without labels). Raises DataError if one is missing.

    Splits without labels are left out, unless `evaluate_on` names one, which is an error.
    """
    if len(set(evaluate_on)) < len(evaluate_on):
        refuse("fastgate", "--evaluate-on", ", ".join(evaluate_on), "every split once", "name each once")
    existing = ", ".join(sorted(tables)) or "none"
    trained = ("train",) if "train" in tables or not spec.named else ()
    missing = [split for split in (*trained, *evaluate_on) if split not in tables]
    if missing:
        option = "--evaluate-on" if missing[0] in evaluate_on else f"--task {name}"
        refuse(option, "splits", existing, f"{', '.join(missing)} among them", "name splits that are there")
    scored = [split for split in (evaluate_on or spec.evaluate_on) if split in tables]
    used = {split: tables[split] for split in (*trained, *scored)}
    for rows in used.values():
        if len(rows) == 0:
            refuse(rows.where, "rows", "none", "at least one row", "use another split")
        _need_columns(rows, spec)
    unlabelled = tuple(split for split in scored if _is_unlabelled(used[split], spec))
    if unlabelled and evaluate_on:
        place, remedy = f"column {spec.target}", "evaluate on another split"
        refuse(used[unlabelled[0]].where, place, "labels that are all -1", "gold labels", remedy)
    scored = [split for split in scored if split not in unlabelled]
    used = {split: rows for split, rows in used.items() if split not in unlabelled}
    if not scored:
        wanted = f"a labelled split out of {', '.join(evaluate_on or spec.evaluate_on)}"
        refuse(f"--task {name}", "splits", existing, wanted, "add one, or name another with --evaluate-on")
    return used, scored, unlabelled


_Columns = dict[str, dict[str, list[Any]]]  # split -> column -> values


def _read_columns(used: dict[str, Table], spec: Spec) -> tuple[_Columns, tuple[str, ...]]:
    """The columns of a Task for every split, and the names of the labels."""
    if spec.kind == "tokens":
        return _tokens(used, spec)
    if spec.kind == "regression":
        return {s: {**_texts(rows, spec), "label": _numbers(rows, spec)} for s, rows in used.items()}, ()
    return _classes(used, spec)


def _shares(count: int, sizes: Sequence[int]) -> list[int]:
    """How many of `count` rows each split gives, by its size: `count` together, or all if there are fewer."""
    if count >= sum(sizes):
        return list(sizes)
    exact = [count * size / sum(sizes) for size in sizes]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda split: shares[split] - exact[split])
    for split in by_remainder[: count - sum(shares)]:
        shares[split] += 1
    return shares


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


def _is_unlabelled(rows: Table, spec: Spec) -> bool:
    """GLUE's test sets on the hub carry -1 in place of every label."""
    return spec.kind in ("text", "pair") and all(
        class_key(value) == "-1" for value in rows.column(spec.target)
    )


def _check_characters(text: str, rows: Table, column: str, number: int) -> None:
    if _HALF_CHARACTER.search(text):
        got = "half of a surrogate pair, which is no character"
        refuse(rows.where, rows.place(column, number), got, "a text", "write the character as UTF-8")


def _texts(rows: Table, spec: Spec) -> dict[str, list[Any]]:
    texts = {}
    for name, column in zip(("text", "text_pair"), spec.columns, strict=False):
        values = rows.column(column)
        for number, value in enumerate(values):
            if not isinstance(value, str):
                got = "null" if value is None else f"a {type(value).__name__}"
                refuse(rows.where, rows.place(column, number), got, "a text", "drop or fill such rows")
            _check_characters(value, rows, column, number)
        if not any(value.strip() for value in values):
            remedy = "name the column with the texts"
            refuse(rows.where, f"column {column}", "blank in every row", "texts", remedy)
        texts[name] = values
    return texts


def _targets(rows: Table, spec: Spec) -> list[Any]:
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
    numbers = []
    for number, value in enumerate(_targets(rows, spec)):
        try:
            if isinstance(value, bool) or (isinstance(value, str) and not _NUMBER.fullmatch(value)):
                raise ValueError
            numbers.append(float(value))
            if not math.isfinite(numbers[-1]):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            got, remedy = repr(value)[:80], "correct it, or choose --task-type text for classes"
            refuse(rows.where, rows.place(spec.target, number), got, "a finite number", remedy)
    return numbers


def _classes(used: dict[str, Table], spec: Spec) -> tuple[_Columns, tuple[str, ...]]:
    texts = {split: _texts(rows, spec) for split, rows in used.items()}
    keys = {
        split: class_keys(rows, spec.target, _targets(rows, spec), range(len(rows)))
        for split, rows in used.items()
    }
    classes = Classes.of(used, keys, spec)
    columns: _Columns = {}
    for split, rows in used.items():
        ids = [classes.id(key, rows, spec.target, n) for n, key in enumerate(keys[split])]
        columns[split] = {**texts[split], "label": ids}
    return columns, classes.names


def _tokens(used: dict[str, Table], spec: Spec) -> tuple[_Columns, tuple[str, ...]]:
    (words_column,) = spec.columns
    words, tags, numbers, keys = {}, {}, {}, {}
    for split, rows in used.items():
        words[split], tags[split] = _words_and_tags(rows, words_column, spec.target)
        numbers[split] = [number for number, row in enumerate(tags[split]) for _ in row]
        all_tags = [tag for row in tags[split] for tag in row]
        keys[split] = class_keys(rows, spec.target, all_tags, numbers[split])
    classes = Classes.of(used, keys, spec)
    columns: _Columns = {}
    for split, rows in used.items():
        ids = iter(
            [classes.id(k, rows, spec.target, n) for k, n in zip(keys[split], numbers[split], strict=True)]
        )
        columns[split] = {"tokens": words[split], "tags": [[next(ids) for _ in row] for row in tags[split]]}
    return columns, classes.names


def _words_and_tags(
    rows: Table, words_column: str, tags_column: str
) -> tuple[list[list[str]], list[list[Any]]]:
    """The lists of every row, as long as each other and without gaps."""
    words, tags = rows.column(words_column), rows.column(tags_column)
    for number, (raw_words, raw_tags) in enumerate(zip(words, tags, strict=True)):
        place = rows.place(tags_column, number)
        row_words = words_of(raw_words, rows.where, rows.place(words_column, number))
        row_tags = tags_of(raw_tags, rows.where, place)
        if not row_words or not row_tags or any(item in (None, "") for item in (*row_words, *row_tags)):
            wanted = f"words in {words_column} and tags in {tags_column}"
            refuse(rows.where, place, "null or nothing", wanted, "drop or fill such rows")
        if len(row_words) != len(row_tags):
            got = f"{len(row_words)} words and {len(row_tags)} tags"
            refuse(
                rows.where, place, got, "one tag for each word", f"correct {words_column} or {tags_column}"
            )
        if any(class_key(tag) in ("-1", "-100") for tag in row_tags):
            refuse(rows.where, place, "-1 or -100 (no tag)", "a tag for every word", "drop or fill such rows")
        for word in row_words:
            if isinstance(word, bool) or not isinstance(word, str | int | float):
                got, remedy = f"a {type(word).__name__} among the words", "write every word as text"
                refuse(rows.where, rows.place(words_column, number), got, "words", remedy)
            _check_characters(str(word), rows, words_column, number)
        words[number], tags[number] = list(map(str, row_words)), row_tags
    return words, tags
