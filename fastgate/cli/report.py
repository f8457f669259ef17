"""`fastgate report`: tables and plots of a sweep's results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastgate.cli.options import DataDir, Dtype, expand_path
from fastgate.cli.progress import console
from fastgate.extras import need


def report(
    lines: Annotated[
        Path, typer.Argument(help="File of results from `fastgate sweep`.", callback=expand_path)
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder to write report.md and its plots (PNG and SVG) to.", callback=expand_path),
    ] = Path("report"),
    data_dir: DataDir = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="First measure the speed-up of each pruned model on this machine."),
    ] = False,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Sweep file (YAML). Report only its tasks and targets, in fewer columns.",
            callback=expand_path,
        ),
    ] = None,
    dtype: Dtype = "float32",
) -> None:
    """Write tables and plots of a sweep: scores, differences to dense, speed-ups, kept layers."""
    need("report", "report")
    from fastgate.report.sweep_report import write_sweep_report
    from fastgate.training.disk import check_makeable
    from fastgate.training.sweep_results import check_results

    check_results(lines)
    check_makeable("report", "--out", out)
    typer.echo(write_sweep_report(lines, out, data_dir, measure, console(stderr=True), recipe, dtype))
    typer.echo(f"Tables and plots: {out / 'report.md'}")
