"""Read a model and score it on a task's rows, in their order and on the device of the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from fastgate.data.catalog import check_kind
from fastgate.data.metrics import IGNORED
from fastgate.data.task import Predictions, Task
from fastgate.errors import ArgumentError, DataError, format_error
from fastgate.models.architectures import longest_row
from fastgate.models.checkpoint import load
from fastgate.models.checkpoint_files import META
from fastgate.models.patching import patch
from fastgate.training.model import (
    check_weights,
    is_pruned,
    load_quietly,
    model_source,
    new_weights,
)
from fastgate.training.progress import SCORE, Listener, Progress

if TYPE_CHECKING:
    from datasets import Dataset


def collator_of(task: Task, tokenizer: Any) -> Any:
    """Makes batches of a task's tokenised rows: pads them to the longest row, labels of tokens with -100."""
    from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

    kind = DataCollatorForTokenClassification if task.kind == "tokens" else DataCollatorWithPadding
    return kind(tokenizer)


def score(
    model: Any,
    task: Task,
    rows: Dataset,
    collator: Any,
    batch_size: int = 64,
    listener: Listener | None = None,
) -> dict[str, float]:
    """All metrics of `task` for tokenised `rows` with `labels`; the model is left in eval mode.

    Windows of one `document` (Task.tokenize) count as one row, whose logits are the mean of theirs.
    `listener` is called with a Progress after every batch. Raises
    DataError for no rows and for a model whose outputs are not the task's, ArgumentError for rows longer than
    the model takes and for outputs that are NaN.
    """
    from torch.utils.data import DataLoader

    if len(rows) == 0:
        raise DataError(
            format_error("fastgate", "rows to score", "none", "at least one", "raise --max-eval-rows")
        )
    model.eval()
    logits: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    documents: list[int] = []
    with torch.inference_mode():
        batches = DataLoader(rows, batch_size=batch_size, collate_fn=collator)  # type: ignore[arg-type, unused-ignore]
        for number, batch in enumerate(batches, 1):
            labels.append(batch.pop("labels").numpy())
            documents += batch.pop("document").tolist() if "document" in batch else []
            logits.append(_logits(model, task, batch))
            if listener is not None:
                listener(Progress(SCORE, number, len(batches)))
    if task.kind == "tokens":
        longest = max(part.shape[1] for part in labels)
        logits = [_pad_columns(part, longest, 0.0) for part in logits]
        labels = [_pad_columns(part, longest, IGNORED) for part in labels]
    all_logits, all_labels = np.concatenate(logits), np.concatenate(labels)
    _check_numbers(model, task, all_logits, all_labels)
    if documents:
        numbers = np.asarray(documents)
        _, first, document_of = np.unique(numbers, return_index=True, return_inverse=True)
        sums = np.zeros((len(first), *all_logits.shape[1:]))
        np.add.at(sums, document_of, all_logits)
        all_logits, all_labels = sums / np.bincount(document_of)[:, None], all_labels[first]
    return task.metrics(Predictions(all_logits, all_labels))


def _logits(model: Any, task: Task, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """The model's logits for a batch, once its rows are known to fit the model and the outputs the task."""
    config, tokens = getattr(model, "config", None), batch["input_ids"].shape[1]
    if config is not None and tokens > longest_row(config):
        got, wanted = f"a row of {tokens} tokens", f"at most {longest_row(config)}"
        remedy = "lower --max-length to the positions of the model"
        raise ArgumentError(format_error("fastgate", "--max-length", got, wanted, remedy))
    device = next(model.parameters()).device
    output = model(**{key: value.to(device) for key, value in batch.items()})
    logits = getattr(output, "logits", None)
    if logits is None or _shape(task) != (logits.dim(), logits.shape[-1]):
        _refuse_model(model, task.kind, f"{_shape(task)[1]} outputs for each row or word")
    return np.asarray(logits.float().cpu().numpy())


def _shape(task: Task) -> tuple[int, int]:
    """The number of dimensions of the task's logits, and the size of the last one.

    Logits are (rows, classes), or (rows, length, tags) of a token task.
    """
    return 3 if task.kind == "tokens" else 2, 1 if task.kind == "regression" else len(task.labels)


def _check_numbers(model: Any, task: Task, logits: np.ndarray, labels: np.ndarray) -> None:
    scored = logits[labels != IGNORED] if task.kind == "tokens" else logits
    if len(scored) == 0:
        raise DataError(
            format_error("fastgate", "rows to score", "no tagged word", "at least one", "raise --max-length")
        )
    nan_rows = int(np.isnan(scored).reshape(len(scored), -1).any(1).sum())
    if nan_rows:
        got = f"NaN in {nan_rows} of {len(scored)} outputs of {type(model).__name__}"
        remedy = "its weights or its training are broken: train it again with a lower --lr"
        raise ArgumentError(format_error("fastgate", "model", got, "numbers", remedy))


def _refuse_model(model: Any, kind: str, wanted: str) -> NoReturn:
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
        _refuse_model(model, kind, f"a head {head}")
    count = model.config.num_labels
    if (kind == "regression") != (count == 1):
        _refuse_model(model, kind, "one output" if kind == "regression" else "two or more classes")
    if kind == "regression":
        return []
    problem = getattr(model.config, "problem_type", None)
    if kind != "tokens" and problem not in (None, "single_label_classification"):
        _refuse_model(model, kind, f"one class a row; the problem_type in its config.json is {problem}")
    names = model.config.id2label
    if sorted(names) != list(range(count)):
        got, wanted = f"ids {sorted(names)} in id2label", f"0 to {count - 1}"
        raise DataError(format_error("fastgate", "model", got, wanted, "correct id2label in config.json"))
    return [str(names[i]) for i in range(count)]


def check_fits(model: Any, task: Task) -> None:
    """Refuse a model whose head, or whose classes in their order, are not the task's.

    The default names of transformers (`LABEL_0`) stand for the ids, whatever the task calls them.
    """
    names = class_names(model, task.kind)
    are_default = names == [f"LABEL_{i}" for i in range(len(names))]
    if len(names) != len(task.labels) or (names != list(task.labels) and not are_default):
        remedy = "evaluate it on the task it was tuned for, or correct id2label in config.json"
        got, wanted = f"labels {', '.join(names)}", f"{', '.join(task.labels)}, in this order"
        raise DataError(format_error("fastgate", "model", got, wanted, remedy))


def _pad_columns(part: np.ndarray, length: int, value: float) -> np.ndarray:
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
        model = load(source) if is_pruned(source, config) else _read_transformers(source, path, config)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _read_transformers(source: str, path: str | Path, config: Any) -> Any:
    """A model of transformers, patched. Only a pooler may be missing from its file."""
    import transformers

    names = [name for name in config.architectures or [] if hasattr(transformers, name)]
    model_class = getattr(transformers, names[0]) if names else transformers.AutoModel
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    model, report = load_quietly(lambda: model_class.from_pretrained(source, **options), path, "PATH")
    new = [
        name
        for name in new_weights(report)
        if not (name.startswith("pooler.") and name in report["missing_keys"])
    ]
    check_weights(path, "PATH", new, report)
    return patch(model)
