"""The options that several commands share, their checks, and the task that the data options describe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgate.errors import ArgumentError, DataError, format_error
from fastgate.training.setting_ranges import RANGES, option_of

if TYPE_CHECKING:
    from fastgate.data import Task

_FIELD_OF_PARAMETER = {option_of(field).lstrip("-").replace("-", "_"): field for field in RANGES}


def check_number(param: typer.CallbackParam, value: Any) -> Any:
    """The callback of every number: refuses one out of its range, and nan and inf."""
    field = _FIELD_OF_PARAMETER.get(param.name or "", param.name or "")
    if value is not None and not RANGES[field].holds(value):
        raise typer.BadParameter(f"got {value}, wanted {RANGES[field]}")
    return value


def choice_of(*names: str) -> Callable[[typer.Context, typer.CallbackParam, str], str]:
    """A callback for an option that has one of these values."""

    def check(context: typer.Context, param: typer.CallbackParam, value: str) -> str:
        if value not in names:
            option, wanted = option_of(param.name or ""), " or ".join(names)
            command = context.info_name or "fastgate"
            raise ArgumentError(format_error(command, option, repr(value), wanted, "pass one of these"))
        return value

    return check


def check_task_name(value: str | None) -> str | None:
    """The callback of --task. Raises DataError for a name that is not in the catalogue."""
    if value is not None:
        from fastgate.data.catalog import check_name

        check_name(value)
    return value


def check_task_type(value: str | None) -> str | None:
    """The callback of --task-type. Raises DataError for an unknown type."""
    if value is not None:
        from fastgate.data.catalog import check_kind

        check_kind(value)
    return value


def expand_path(value: Path | None) -> Path | None:
    """The callback of every path: expands `~`, which the shell leaves in `--out=~/run`."""
    try:
        str(value).encode()
        return None if value is None else value.expanduser()
    except UnicodeEncodeError as error:  # libraries that are not written in Python accept only UTF-8
        shown = str(value).encode(errors="backslashreplace").decode()
        raise typer.BadParameter(
            f"{shown} is no name in this locale; set PYTHONUTF8=1, or rename it if it is not UTF-8"
        ) from error
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from error


Model = Annotated[
    str, typer.Option(help="BERT or RoBERTa to fine-tune: a name on the hub, or a folder with the model.")
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="Task to use: sst2, cola, mrpc, stsb, qqp, mnli, qnli, rte, wnli, imdb, conll2003, wnut17, ptb, "
        "ud_ewt or ud_ewt_xpos.",
        callback=check_task_name,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder to read the task from, with files TASK/SPLIT.jsonl.gz. By default the task is "
        "downloaded from the hub.",
        callback=expand_path,
    ),
]
EvaluateOn = Annotated[
    str | None,
    typer.Option(
        help="Splits of --task to score on, separated by commas. By default the task's usual splits."
    ),
]
TaskType = Annotated[
    str | None,
    typer.Option(
        help="Type of task in your own files: text (one text, one class), pair (two texts, one class), "
        "regression (a number) or tokens (one tag per word).",
        callback=check_task_type,
    ),
]
TrainFile = Annotated[
    Path | None,
    typer.Option(
        "--train",
        help="Your file of training rows: .jsonl, .json, .csv or .tsv, or .jsonl.gz.",
        callback=expand_path,
    ),
]
ValidationFile = Annotated[
    Path | None,
    typer.Option(
        "--validation",
        help="Your file of rows to score on, in one of the formats of --train.",
        callback=expand_path,
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        help="Input columns of your files, separated by commas. Default: text, or text,text_pair for pair, "
        "or tokens for tokens."
    ),
]
LabelColumn = Annotated[
    str | None, typer.Option(help="Label column of your files. Default: label, or tags for tokens.")
]
MaxTrainRows = Annotated[
    int | None,
    typer.Option(
        help="Train on at most this many rows, drawn at random. By default on all.", callback=check_number
    ),
]
MaxEvalRows = Annotated[
    int | None,
    typer.Option(
        help="Score on at most this many rows, drawn at random. By default on all.", callback=check_number
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
MaxLength = Annotated[int, typer.Option(help="Truncate rows to this many tokens.", callback=check_number)]
Stride = Annotated[
    int | None,
    typer.Option(
        help="Split long texts into windows of --max-length tokens that overlap by this many tokens, and "
        "average their logits. By default long texts are truncated.",
        callback=check_number,
    ),
]
BatchSize = Annotated[int, typer.Option(help="Rows per batch.", callback=check_number)]
Seed = Annotated[int, typer.Option(help="Random seed.", callback=check_number)]
Dtype = Annotated[
    str,
    typer.Option(
        help="Precision of every model: float32 or bfloat16.", callback=choice_of("float32", "bfloat16")
    ),
]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The options that describe a task: a name of the catalogue, or a type with the user's own files."""

    task: str | None
    data_dir: Path | None
    task_type: str | None
    train: Path | None
    validation: Path | None
    columns: str | None
    label_column: str | None
    evaluate_on: str | None
    max_train_rows: int | None = None
    max_eval_rows: int | None = None

    @property
    def sources(self) -> dict[str, Any]:
        """Where the rows came from, as JSON, for results: every option but the task's name that was given."""
        options = {name: value for name, value in vars(self).items() if name != "task" and value is not None}
        return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}

    def load(self, command: str, *, labels: list[str], seed: int) -> Task:
        """The task. labels: class names of a model that is evaluated; empty takes those of the training rows.

        Raises ArgumentError or DataError for options that describe no task, or that contradict each other.
        """
        from fastgate.data import load_files, load_task

        if self.label_column == "":
            wanted, remedy = "the name of a column", "name it, or leave it out"
            raise ArgumentError(format_error(command, "--label-column", "''", wanted, remedy))
        own = {
            "--train": self.train, "--validation": self.validation,
            "--columns": self.columns, "--label-column": self.label_column,
        }  # fmt: skip
        of_catalogue = {"--data-dir": self.data_dir, "--evaluate-on": self.evaluate_on}
        names = {"--task": self.task, "--task-type": self.task_type}
        passed = [option for option, v in {**names, **own, **of_catalogue}.items() if v is not None]
        if self.task is not None and self.task_type is None:
            _refuse_others(command, "--task", [option for option in passed if option in own])
            return load_task(
                self.task,
                self.data_dir,
                evaluate_on=split_names("--evaluate-on", self.evaluate_on),
                max_train_rows=self.max_train_rows,
                max_eval_rows=self.max_eval_rows,
                seed=seed,
            )
        labels_known = self.train is not None or labels or self.task_type == "regression"
        if self.task is None and self.task_type and self.validation is not None and labels_known:
            _refuse_others(command, "--task-type", [option for option in passed if option in of_catalogue])
            return load_files(
                self.task_type,
                self.train,
                self.validation,
                columns=split_names("--columns", self.columns),
                target=self.label_column,
                labels=labels,
                max_train_rows=self.max_train_rows,
                max_eval_rows=self.max_eval_rows,
                seed=seed,
            )
        remedy = "pass --task NAME, or --task-type with --train and --validation"
        got = ", ".join(passed) or "nothing"
        raise DataError(format_error(command, "data", got, "one task", remedy))


def split_names(option: str, text: str | None) -> list[str]:
    """The names in an option, which are separated by commas; none for None. ArgumentError for commas only."""
    names = [part.strip() for part in (text or "").split(",") if part.strip()]
    if text is not None and not names:
        wanted = "names separated by commas"
        raise ArgumentError(format_error("fastgate", option, repr(text), wanted, "name one, or leave it out"))
    return names


def _refuse_others(command: str, option: str, others: list[str]) -> None:
    if others:
        got, remedy = f"it with {option}", f"leave {'it' if len(others) == 1 else 'them'} out"
        raise ArgumentError(format_error(command, ", ".join(others), got, f"{option} alone", remedy))
