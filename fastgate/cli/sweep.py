"""`fastgate sweep`: many runs on several tasks, in one or more processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastgate.cli.command_group import end_command, resume_hint, typed_command
from fastgate.cli.options import DataDir, check_number, expand_path
from fastgate.cli.progress import Display, console
from fastgate.extras import need

if TYPE_CHECKING:
    from fastgate.training.sweep_config import SweepRun

RecipeArgument = Annotated[
    Path,
    typer.Argument(
        help="Sweep file (YAML) with tasks, seeds, runs and settings, such as bench/sweeps/tasks.yaml.",
        callback=expand_path,
    ),
]


def sweep(
    context: typer.Context,
    recipe: RecipeArgument,
    data_dir: DataDir = None,
    model: Annotated[
        str | None, typer.Option(help="Model to use instead of the one in the sweep file.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="File to append results to, one JSON line per run.", callback=expand_path)
    ] = Path("tasks.jsonl"),
    work: Annotated[
        Path, typer.Option(help="Folder for dense models and unfinished runs.", callback=expand_path)
    ] = Path("sweep-work"),
    workers: Annotated[
        int, typer.Option(help="Number of processes. They share the cores and GPUs.", callback=check_number)
    ] = 1,
    left: Annotated[
        bool, typer.Option("--left", help="Print the runs that are not finished yet, and start none.")
    ] = False,
    as_worker: Annotated[bool, typer.Option("--as-worker", hidden=True)] = False,
) -> None:
    """Run methods, sparsities and seeds on tasks. The same command continues an interrupted sweep."""
    need("sweep", "train")
    from fastgate.training import sweep as sweeps
    from fastgate.training.model import model_source
    from fastgate.training.sweep_config import read_sweep_config
    from fastgate.training.workers import end_with_parent

    if as_worker:
        end_with_parent()
    runs = read_sweep_config(recipe, model)
    for name in {run.model for run in runs} - {"minilm"}:
        model_source(name, "--model" if model else "model", ("dense",))
    if left:
        for run in sweeps.runs_left(runs, out):
            typer.echo(json.dumps(run.identity))
        return
    if not as_worker:
        sweeps.check_files(out, work)
    with resume_hint(lambda: f"continue with: {typed_command(context)}"):
        if as_worker:
            _do_runs(runs, data_dir, out, work, plain=True)
            return  # the process that started the workers reports what is left
        if _check(runs, data_dir, out):
            if workers == 1:
                _do_runs(runs, data_dir, out, work)
                statuses = [0]
            else:
                statuses = _start_workers(recipe, data_dir, model, out, work, workers)
            _end(runs, out, work, statuses)


def _check(runs: list[SweepRun], data_dir: Path | None, out: Path) -> bool:
    """Print how many runs are left and check that they can work. Returns whether any is left."""
    from fastgate.training import sweep as sweeps

    left = sweeps.runs_left(runs, out)
    console().print(
        f"{len(runs)} runs, {len(runs) - len(left)} of them in {out}, {len(left)} left", soft_wrap=True
    )
    if left:
        sweeps.check_runs(left, data_dir)
    return bool(left)


def _do_runs(
    runs: list[SweepRun], data_dir: Path | None, out: Path, work: Path, *, plain: bool = False
) -> None:
    """plain: print lines even on a terminal, because other processes print to it too."""
    from fastgate.training import sweep as sweeps

    screen = console()

    def tell(line: str) -> None:
        screen.print(line, soft_wrap=True)

    with Display(screen, plain) as display:
        sweeps.sweep(runs, data_dir, out, work, tell=tell, listener=display)


def _start_workers(
    recipe: Path, data_dir: Path | None, model: str | None, out: Path, work: Path, workers: int
) -> list[int]:
    """The exit statuses of the workers, once all have ended."""
    from fastgate.training.workers import run_workers

    arguments = ["sweep", recipe, "--out", out, "--work", work]
    arguments += ["--data-dir", data_dir] if data_dir else []
    arguments += ["--model", model] if model else []
    return run_workers([str(argument) for argument in arguments], workers)


def _end(runs: list[SweepRun], out: Path, work: Path, statuses: list[int]) -> None:
    """End with status 1 if runs are left or a worker failed."""
    from fastgate.training import sweep as sweeps

    lines = sweeps.describe_runs_left(runs, out, work)
    for line in lines:
        console(stderr=True).print(line, soft_wrap=True)
    failed = [status for status in statuses if status]
    if lines or failed:
        ended = f", {len(failed)} of {len(statuses)} workers ended early" if failed else ""
        left = len(sweeps.runs_left(runs, out))
        end_command(f"sweep: {left} of {len(runs)} runs are left{ended}", 1)
