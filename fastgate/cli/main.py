"""The command line: `fastgate demo | finetune | evaluate | sweep | report | explain | info | bench`.

Each command imports what it needs when it runs, so that `fastgate --help` stays fast.
"""

from __future__ import annotations

import typer

from fastgate.cli.bench import bench
from fastgate.cli.command_group import CommandGroup
from fastgate.cli.demo import demo
from fastgate.cli.evaluate import evaluate
from fastgate.cli.finetune import finetune
from fastgate.cli.info import explain, info
from fastgate.cli.report import report
from fastgate.cli.sweep import sweep

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find out which self-attention sublayers a task does not need, remove them, and run the rest fast.",
)
for command in (demo, finetune, evaluate, sweep, report, explain, info, bench):
    app.command()(command)


def main() -> None:
    """The entry point of the `fastgate` command."""
    app()


if __name__ == "__main__":
    main()
