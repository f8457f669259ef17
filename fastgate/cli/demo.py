"""`fastgate demo`: the whole of fastgate on real text, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastgate.cli.command_group import resume_hint, typed_command
from fastgate.cli.options import DataDir, Seed, TaskName, expand_path
from fastgate.cli.progress import console
from fastgate.errors import ArgumentError, format_error
from fastgate.extras import need


def demo(
    context: typer.Context,
    task: TaskName = None,
    data_dir: DataDir = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the pruned model and the report. Replaces an earlier demo there.",
            callback=expand_path,
        ),
    ] = Path("fastgate-demo"),
    seed: Seed = 0,
) -> None:
    """Fine-tune, prune and time a small BERT on docstrings of the installed packages, in minutes."""
    if task is None and data_dir is not None:
        raise ArgumentError(format_error("demo", "--data-dir", "it without --task", "a task", "pass --task"))
    need("demo", "demo")
    from fastgate.cli.demo_run import run_demo
    from fastgate.training.run_folder import check_replaceable

    check_replaceable(out)
    with resume_hint(lambda: f"begin again with: {typed_command(context)}"):
        run_demo(out, console(), task_name=task, data_dir=data_dir, seed=seed)
