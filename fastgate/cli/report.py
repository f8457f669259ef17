"""`fastgate report`: tables and plots of a sweep's results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastgate.cli.options import DataDir, expand_path
from fastgate.cli.progress import console


def report(
    lines: Annotated[
        Path, typer.Argument(help="File of results that `fastgate sweep` wrote.", callback=expand_path)
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for tables.md and the plots.", callback=expand_path)
    ] = Path("report"),
    data_dir: DataDir = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="First time each choice of layers on this machine (fastgate bench)."),
    ] = False,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Sweep file (YAML): print only one table, of its tasks and targets.", callback=expand_path
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision to measure in: float32 or bfloat16.")] = "float32",
) -> None:
    """Make tables and plots of a sweep: scores, paired differences to dense, speed-ups, kept layers."""
    from fastgate.benchmark.compare import dtype_of
    from fastgate.report.sweep_report import write
    from fastgate.training.disk import check_makeable
    from fastgate.training.sweep_results import check_results

    dtype_of("report", dtype)
    check_results(lines)
    check_makeable("report", "--out", out)
    write(lines, out, data_dir, measure, console(stderr=True), recipe, dtype)
    console().print((out / "tables.md").read_text(encoding="utf-8"), soft_wrap=True)
