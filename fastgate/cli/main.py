"""The command line: `fastgate demo | finetune | evaluate | sweep | report | explain | info | bench`.

Each command imports torch and transformers when it runs. So the help and the errors of options come at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

import fastgate
from fastgate.cli.bench import bench
from fastgate.cli.command_group import CommandGroup
from fastgate.cli.demo import demo
from fastgate.cli.evaluate import evaluate
from fastgate.cli.finetune import finetune
from fastgate.cli.info import explain, info
from fastgate.cli.report import report
from fastgate.cli.sweep import sweep

app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def print_version(wanted: bool) -> None:
    """The callback of --version: prints the version and ends the command."""
    if wanted:
        typer.echo(f"fastgate {fastgate.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=print_version, is_eager=True),
    ] = False,
) -> None:
    """Remove the self-attention sublayers that a task does not need, and run the rest without wasted work."""


for command in (demo, finetune, evaluate, sweep, report, explain, info, bench):
    app.command()(command)


if __name__ == "__main__":
    app()
