"""`fastgate explain` and `fastgate info`: what runs, in a model and on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgate.cli.options import AsJson, DataDir, MaxLength, TaskName, expand_path
from fastgate.errors import ArgumentError, format_error

_TASK_ROWS = 1024  # evaluation rows whose lengths --task takes


def explain(
    path: Annotated[
        Path,
        typer.Argument(
            help="Model to explain: a fastgate checkpoint, or a BERT or RoBERTa, in a folder or on the hub.",
            callback=expand_path,
        ),
    ],
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of each sequence, separated by commas; by default 8 sequences of 32 tokens."
        ),
    ] = None,
    task: TaskName = None,
    data_dir: DataDir = None,
    max_length: MaxLength = 128,
    as_json: AsJson = False,
) -> None:
    """Show what a model computes, layer by layer: output rows, steps and share of the FLOPs.

    The numbers refer to one batch: --lengths, or with --task up to 1024 evaluation rows of that task.
    """
    from fastgate.models.explanation import explain as explain_model
    from fastgate.training.evaluate import read_model

    if task is None and data_dir is not None:
        raise ArgumentError(
            format_error(
                "explain", "--data-dir", "it without --task", "both", "pass --task NAME, or leave it out"
            )
        )
    if task is not None and lengths is not None:
        got, remedy = "--lengths and --task", "leave one out"
        raise ArgumentError(format_error("explain", "lengths", got, "one of them", remedy))
    chosen = _lengths(lengths)
    model = read_model(path)
    if task is not None:
        chosen = _lengths_of_task(model, path, task, data_dir, max_length)
    explanation = explain_model(model) if chosen is None else explain_model(model, chosen)
    if as_json:
        typer.echo(json.dumps(explanation.to_dict()))
        return
    if task is not None:
        typer.echo(f"{task}: {len(explanation.lengths)} evaluation rows, cut to {max_length} tokens")
    typer.echo(str(explanation))
    if chosen is None:
        typer.echo("\nOther lengths: --lengths 8,16,32, or --task NAME for those of a task.")


def _lengths(text: str | None) -> list[int] | None:
    """The numbers of --lengths. Raises ArgumentError for what is no list of numbers."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdecimal() for part in parts):
        wanted, remedy = "numbers of tokens, separated by commas", "pass e.g. --lengths 8,16,32"
        raise ArgumentError(format_error("explain", "--lengths", repr(text), wanted, remedy))
    return [int(part) for part in parts]


def _lengths_of_task(model: Any, path: Path, task: str, data_dir: Path | None, max_length: int) -> list[int]:
    """Tokens of each evaluation row of the task, of a random draw if there are many."""
    from fastgate.benchmark.batches import evaluation_rows
    from fastgate.data.load import load_task
    from fastgate.training.feasibility import check_length
    from fastgate.training.model import load_tokenizer

    loaded = load_task(task, data_dir, max_train_rows=1, max_eval_rows=_TASK_ROWS)
    check_length("explain", "--max-length", max_length, model)
    rows = evaluation_rows(loaded, load_tokenizer(path, loaded), max_length)
    return [len(ids) for ids in rows["input_ids"]]


def info(as_json: AsJson = False) -> None:
    """Show versions, the build, and which implementation runs each op on this machine and why."""
    from fastgate.env import collect, render

    facts = collect()
    typer.echo(json.dumps(facts) if as_json else render(facts))
