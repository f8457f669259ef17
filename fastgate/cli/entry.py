"""The entry point of the `fastgate` command, which runs without the packages of fastgate[cli] to say so."""

from __future__ import annotations

import sys

from fastgate.errors import MissingPackage
from fastgate.extras import need


def main() -> None:
    """Run the command line. Exit status 1 with one line if a package for it is missing."""
    try:
        need("fastgate", "cli", "rich", "typer")
    except MissingPackage as error:
        sys.exit(f"error: {error}")
    from fastgate.cli.main import app

    app()
