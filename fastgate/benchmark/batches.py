"""Batches of real rows for timing: in the order of the data, or sorted by length."""

from __future__ import annotations

from typing import Any

from fastgate.benchmark.baselines import Batch
from fastgate.data.task import Task
from fastgate.errors import ArgumentError, format_error

ORDERS = ("data", "length")


def real_batches(
    task: Task, tokenizer: Any, *, max_length: int, batch_size: int, count: int, order: str
) -> list[Batch]:
    """`count` batches of the task's evaluation rows in the order of the data, or all rows sorted by length
    first: what `choose_batches` says of them."""
    return choose_batches(
        evaluation_rows(task, tokenizer, max_length),
        tokenizer,
        batch_size=batch_size,
        count=count,
        order=order,
    )


def evaluation_rows(task: Task, tokenizer: Any, max_length: int) -> Any:
    """The model's inputs of each evaluation row of the task, as a data set."""
    return task.tokenize(tokenizer, max_length)["evaluation"].remove_columns("labels")


def check_order(order: str) -> None:
    """Raises ArgumentError for an order that is none of ORDERS."""
    if order not in ORDERS:
        raise ArgumentError(
            format_error("bench", "--order", repr(order), " or ".join(ORDERS), "pass one of these")
        )


def choose_batches(rows: Any, tokenizer: Any, *, batch_size: int, count: int, order: str) -> list[Batch]:
    """`count` padded batches of `evaluation_rows`.

    Sorted by length the batches are spread evenly from the shortest to the longest, and every batch is nearly
    full.
    """
    check_order(order)
    if batch_size < 1 or count < 1:
        got = f"batch size {batch_size}, {count} batches"
        raise ArgumentError(format_error("bench", "batches", got, "at least 1 of 1 row", "raise it"))
    whole = max(len(rows) // batch_size, 1)
    if order == "data":
        starts = [i * batch_size for i in range(min(count, whole))]
    else:
        lengths = [len(ids) for ids in rows["input_ids"]]
        rows = rows.select(sorted(range(len(rows)), key=lengths.__getitem__))
        starts = [
            whole * (2 * i + 1) // (2 * min(count, whole)) * batch_size for i in range(min(count, whole))
        ]
    keys = tokenizer.model_input_names
    return [
        dict(tokenizer.pad({key: rows[start : start + batch_size][key] for key in keys}, return_tensors="pt"))
        for start in starts
    ]
