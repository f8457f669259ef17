"""`fastgate bench`: fastgate and baselines on the same batches."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fastgate.cli.options import (
    AsJson,
    BatchSize,
    DataDir,
    Dtype,
    MaxLength,
    check_number,
    check_task_name,
    choice_of,
    split_names,
)
from fastgate.cli.progress import console
from fastgate.errors import ArgumentError, format_error
from fastgate.extras import need


def bench(
    model: Annotated[
        str,
        typer.Option(
            help="Model to time: minilm, bert-base or bert-large with random weights, or a checkpoint, or a "
            "BERT or RoBERTa in a folder or on the hub."
        ),
    ],
    task: Annotated[
        str, typer.Option(help="Task whose evaluation rows are run, such as sst2.", callback=check_task_name)
    ],
    data_dir: DataDir = None,
    against: Annotated[
        str,
        typer.Option(
            help="Baselines to time, separated by commas: sdpa, eager, compile, onnxruntime, openvino."
        ),
    ] = "sdpa,eager",
    keep: Annotated[
        str | None,
        typer.Option(help="Layers that keep their attention, separated by commas. By default all do."),
    ] = None,
    batch_size: BatchSize = 32,
    batches: Annotated[int, typer.Option(help="Number of batches to time.", callback=check_number)] = 8,
    order: Annotated[
        str,
        typer.Option(
            help="Order of the rows: data (as in the task) or length (sorted by length, little padding).",
            callback=choice_of("data", "length"),
        ),
    ] = "data",
    threads: Annotated[
        int | None,
        typer.Option(help="Number of CPU threads. By default those of torch.", callback=check_number),
    ] = None,
    max_length: MaxLength = 128,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Time fastgate and baselines in turn on the same batches, after a check that their outputs are equal.

    With a pruned model fastgate's unpruned model is timed as well. Baselines run the unpruned model.
    """
    baselines, layers = split_names("--against", against), _layers(keep)
    need("bench", "train", "datasets")
    from fastgate.benchmark.compare import bench as run_bench
    from fastgate.benchmark.compare import bench_table

    result = run_bench(
        model, task, data_dir, against=baselines, keep=layers,
        batch_size=batch_size, batches=batches, order=order, threads=threads, max_length=max_length,
        console=console(stderr=True), dtype=dtype,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        typer.echo(bench_table(result))


def _layers(keep: str | None) -> list[int] | None:
    """The layers of --keep. Raises ArgumentError for what is no index, and for a layer named twice."""
    if keep is None:
        return None
    layers = []
    for part in (part.strip() for part in keep.split(",") if part.strip()):
        if not (part.isascii() and part.isdecimal()):
            remedy = "pass e.g. --keep 0,4,8"
            raise ArgumentError(format_error("bench", "--keep", repr(part), "layer indices", remedy))
        layers.append(int(part))
    if len(set(layers)) != len(layers):
        raise ArgumentError(format_error("bench", "--keep", keep, "different layers", "name each layer once"))
    return layers
