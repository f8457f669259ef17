"""`fastgate evaluate`: the scores of a model on a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastgate.cli.command_group import print_note
from fastgate.cli.options import (
    AsJson,
    BatchSize,
    Columns,
    DataDir,
    DataOptions,
    EvaluateOn,
    LabelColumn,
    MaxEvalRows,
    MaxLength,
    Stride,
    TaskName,
    TaskType,
    TrainFile,
    ValidationFile,
    expand_path,
)
from fastgate.cli.progress import Display, console
from fastgate.extras import need
from fastgate.text_table import text_table


def evaluate(
    path: Annotated[
        Path,
        typer.Argument(
            help="Model to score: a fastgate checkpoint, or a fine-tuned model in a folder.",
            callback=expand_path,
        ),
    ],
    task: TaskName = None,
    data_dir: DataDir = None,
    task_type: TaskType = None,
    train: TrainFile = None,
    validation: ValidationFile = None,
    columns: Columns = None,
    label_column: LabelColumn = None,
    evaluate_on: EvaluateOn = None,
    batch_size: BatchSize = 64,
    max_length: MaxLength = 128,
    stride: Stride = None,
    max_eval_rows: MaxEvalRows = None,
    as_json: AsJson = False,
) -> None:
    """Score a fine-tuned model on a task."""
    need("evaluate", "train")
    from fastgate.training import load_tokenizer
    from fastgate.training.evaluate import check_fits, class_names, collator_of, read_model, score

    model = read_model(path)
    labels = [] if task_type is None else class_names(model, task_type)
    data = DataOptions(
        task=task, data_dir=data_dir, task_type=task_type, train=train, validation=validation,
        columns=columns, label_column=label_column, evaluate_on=evaluate_on, max_eval_rows=max_eval_rows,
    )  # fmt: skip
    loaded = data.load("evaluate", labels=labels, seed=0)
    check_fits(model, loaded)
    tokenizer = load_tokenizer(path, loaded)
    rows = loaded.tokenize(tokenizer, max_length, stride)["evaluation"]
    for note in loaded.notes:
        print_note(note)
    with Display(console(stderr=True)) as display:
        scores = score(model, loaded, rows, collator_of(loaded, tokenizer), batch_size, display)
    count = len(loaded.evaluation)
    if as_json:
        result = {"task": loaded.name, "rows": count, "metric": loaded.metric, "scores": scores}
        typer.echo(json.dumps({**result, "input": loaded.counts}))
        return
    screen = console()
    windows = f" in {len(rows)} windows" if len(rows) != count else ""
    screen.print(f"{loaded.name}: {count} rows{windows} of {', '.join(loaded.evaluate_on)}", soft_wrap=True)
    rows_of_table = [
        [name, f"{value:.4f}", "main metric" if name == loaded.metric else ""]
        for name, value in scores.items()
    ]
    screen.print(text_table(["metric", "score", ""], rows_of_table, (0, 2)), soft_wrap=True)
