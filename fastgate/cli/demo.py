"""`fastgate demo`: the whole of fastgate on real text, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastgate.cli.command_group import resume_hint
from fastgate.cli.options import DataDir, Seed, TaskName, expand_path
from fastgate.cli.progress import console
from fastgate.errors import ArgumentError, format_error


def demo(
    task: TaskName = None,
    data_dir: DataDir = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the checkpoint and the report.", callback=expand_path)
    ] = Path("fastgate-demo"),
    seed: Seed = 0,
) -> None:
    """Fine-tune, self-prune and compare a small BERT on text this machine has, in minutes."""
    from fastgate.cli.demo_run import run_demo
    from fastgate.training.run_folder import check_replaceable

    if task is None and data_dir is not None:
        raise ArgumentError(format_error("demo", "--data-dir", "it without --task", "a task", "pass --task"))
    check_replaceable(out)
    with resume_hint(lambda: "run the same command to begin again"):
        run_demo(out, console(), task_name=task, data_dir=data_dir, seed=seed)
