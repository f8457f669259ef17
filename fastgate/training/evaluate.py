"""Read a model and score it on a task's rows: one pass, in order, on the device the model is on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from fastgate.data.catalog import check_kind
from fastgate.data.metrics import IGNORED
from fastgate.data.task import Task
from fastgate.errors import ArgumentError, DataError, format_error
from fastgate.models.checkpoint import load
from fastgate.models.checkpoint_files import META
from fastgate.models.patching import patch
from fastgate.training.model import (
    check_weights,
    is_pruned,
    load_quietly,
    longest_row,
    model_source,
    new_weights,
)

if TYPE_CHECKING:
    from datasets import Dataset


def score(model: Any, task: Task, rows: Dataset, collator: Any, batch_size: int = 64) -> dict[str, float]:
    """All metrics of `task` for tokenised `rows` with `labels`; the model is left in eval mode.

    Windows of one `document` (Task.tokenize) are one row to the metrics: the mean of their logits. Raises
    DataError for no rows and for a model whose outputs are not the task's, ArgumentError for rows longer than
    the model takes and for outputs that are NaN.
    """
    from torch.utils.data import DataLoader
    from transformers import EvalPrediction

    if len(rows) == 0:
        raise DataError(
            format_error("fastgate", "rows to score", "none", "at least one", "raise --max-eval-rows")
        )
    model.eval()
    config = getattr(model, "config", None)
    longest = None if config is None else longest_row(config)
    device = next(model.parameters()).device
    predicted, gold = [], []
    documents: list[int] = []
    with torch.inference_mode():
        for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collator):  # type: ignore[arg-type]
            labels = batch.pop("labels")
            documents += batch.pop("document").tolist() if "document" in batch else []
            if longest is not None and batch["input_ids"].shape[1] > longest:
                got, wanted = f"a row of {batch['input_ids'].shape[1]} tokens", f"at most {longest}"
                remedy = "lower --max-length to the positions of the model"
                raise ArgumentError(format_error("fastgate", "--max-length", got, wanted, remedy))
            output = model(**{key: value.to(device) for key, value in batch.items()})
            logits = getattr(output, "logits", None)
            if logits is None or _shape(task) != (logits.dim(), logits.shape[-1]):
                _wrong_kind(model, task.kind, f"{_shape(task)[1]} outputs for each row or word")
            predicted.append(logits.float().cpu().numpy())
            gold.append(labels.numpy())
    if task.kind == "tokens":
        longest = max(part.shape[1] for part in gold)
        predicted = [_widen(part, longest, 0.0) for part in predicted]
        gold = [_widen(part, longest, IGNORED) for part in gold]
    logits, labels = np.concatenate(predicted), np.concatenate(gold)
    _check_numbers(model, task, logits, labels)
    if documents:
        _, places, of = np.unique(np.asarray(documents), return_index=True, return_inverse=True)
        sums = np.zeros((len(places), *logits.shape[1:]))
        np.add.at(sums, of, logits)
        logits, labels = sums / np.bincount(of)[:, None], labels[places]
    return task.metrics(EvalPrediction(logits, labels))


def _shape(task: Task) -> tuple[int, int]:
    """How many dimensions the task's logits have, and the last: (rows, classes), (rows, length, tags)."""
    return 3 if task.kind == "tokens" else 2, 1 if task.kind == "regression" else len(task.labels)


def _check_numbers(model: Any, task: Task, logits: np.ndarray, labels: np.ndarray) -> None:
    scored = logits[labels != IGNORED] if task.kind == "tokens" else logits
    if len(scored) == 0:
        raise DataError(
            format_error("fastgate", "rows to score", "no tagged word", "at least one", "raise --max-length")
        )
    bad = int(np.isnan(scored).reshape(len(scored), -1).any(1).sum())
    if bad:
        got = f"NaN in {bad} of {len(scored)} outputs of {type(model).__name__}"
        remedy = "its weights or its training are broken: train again with a lower --lr"
        raise ArgumentError(format_error("fastgate", "model", got, "numbers", remedy))


def _wrong_kind(model: Any, kind: str, wanted: str) -> NoReturn:
    config = getattr(model, "config", None)
    outputs = f" with {config.num_labels} outputs" if config is not None else ""
    remedy = "evaluate it on the task it was tuned for, or fine-tune it on this one first"
    got = f"{type(model).__name__}{outputs}"
    raise DataError(format_error("fastgate", "model", got, f"a model for {kind} with {wanted}", remedy))


def class_names(model: Any, kind: str) -> list[str]:
    """The names of the model's classes in the order of their ids, none for regression.

    kind: of the task (catalog.KINDS). Raises DataError for a model whose head is not for that kind.
    """
    check_kind(kind)
    heads = [base.__name__ for base in type(model).__mro__]
    head = "ForTokenClassification" if kind == "tokens" else "ForSequenceClassification"
    if not any(name.endswith(head) for name in heads):
        _wrong_kind(model, kind, f"a head {head}")
    count = model.config.num_labels
    if (kind == "regression") != (count == 1):
        _wrong_kind(model, kind, "one output" if kind == "regression" else "two or more classes")
    if kind == "regression":
        return []
    problem = getattr(model.config, "problem_type", None)
    if kind != "tokens" and problem not in (None, "single_label_classification"):
        _wrong_kind(model, kind, f"one class a row; the problem_type in its config.json is {problem}")
    names = model.config.id2label
    if sorted(names) != list(range(count)):
        got, wanted = f"ids {sorted(names)} in id2label", f"0 to {count - 1}"
        raise DataError(format_error("fastgate", "model", got, wanted, "mend id2label in config.json"))
    return [str(names[i]) for i in range(count)]


def check_fits(model: Any, task: Task) -> None:
    """Refuse a model whose head, or whose classes in their order, are not the task's.

    Names that transformers makes up (`LABEL_0`) stand for the ids, whatever the task calls them.
    """
    names = class_names(model, task.kind)
    made_up = names == [f"LABEL_{i}" for i in range(len(names))]
    if len(names) != len(task.labels) or (names != list(task.labels) and not made_up):
        remedy = "evaluate it on the task it was tuned for, or mend id2label in config.json"
        got, wanted = f"labels {', '.join(names)}", f"{', '.join(task.labels)}, in this order"
        raise DataError(format_error("fastgate", "model", got, wanted, remedy))


def _widen(part: np.ndarray, length: int, value: float) -> np.ndarray:
    """Pad the second dimension."""
    widths = [(0, 0), (0, length - part.shape[1])] + [(0, 0)] * (part.ndim - 2)
    return np.pad(part, widths, constant_values=value)


def read_model(path: str | Path) -> Any:
    """A fastgate checkpoint, or a model of transformers patched; in eval mode, on the GPU if there is one.

    Raises ArgumentError for a path without a model, CheckpointError for a damaged one or one that lacks
    weights.
    """
    import transformers

    source = model_source(path, "PATH", ("pruned", "dense"))
    if (Path(source) / META).is_file():
        model: Any = load(source)
    else:
        config = load_quietly(lambda: transformers.AutoConfig.from_pretrained(source), path, "PATH")
        if is_pruned(source, config):
            model = load(source)
        else:
            names = [name for name in config.architectures or [] if hasattr(transformers, name)]
            kind = getattr(transformers, names[0]) if names else transformers.AutoModel
            options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
            model, report = load_quietly(lambda: kind.from_pretrained(source, **options), path, "PATH")
            new = [
                n
                for n in new_weights(report)
                if not (n.startswith("pooler.") and n in report["missing_keys"])
            ]
            check_weights(path, "PATH", new, report)
            model = patch(model)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
