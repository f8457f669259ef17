"""`fastgate explain` and `fastgate info`: what runs, in a model and on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastgate.cli.options import AsJson, expand_path


def explain(
    path: Annotated[
        Path,
        typer.Argument(
            help="Model to explain: a fastgate checkpoint, or a BERT or RoBERTa, in a folder or on the hub.",
            callback=expand_path,
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show what a model computes, layer by layer: output rows, steps and share of the FLOPs."""
    from fastgate.models.explanation import explain as explain_model
    from fastgate.training.evaluate import read_model

    explanation = explain_model(read_model(path))
    typer.echo(json.dumps(explanation.to_dict()) if as_json else str(explanation))


def info(as_json: AsJson = False) -> None:
    """Show versions, the build, and which implementation runs each op on this machine and why."""
    from fastgate.env import collect, render

    facts = collect()
    typer.echo(json.dumps(facts) if as_json else render(facts))
