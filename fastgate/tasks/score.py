"""Read a model and score it on a task's rows: one pass, in order, on the device the model is on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checkpoint import META, load
from ..errors import ArgumentError, say
from ..patch import patch
from .metrics import IGNORED
from .model import quiet_loading
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset


def score(model: Any, task: Task, rows: Dataset, collator: Any, batch_size: int = 64) -> dict[str, float]:
    """All metrics of `task` for tokenised `rows` with `labels`; the model is left in eval mode.

    Windows of one `document` (Task.tokenize) are one row to the metrics: the mean of their logits.
    """
    from torch.utils.data import DataLoader
    from transformers import EvalPrediction

    model.eval()
    device = next(model.parameters()).device
    predicted, gold = [], []
    documents: list[int] = []
    with torch.inference_mode():
        for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collator):  # type: ignore[arg-type]
            labels = batch.pop("labels")
            documents += batch.pop("document").tolist() if "document" in batch else []
            logits = model(**{key: value.to(device) for key, value in batch.items()}).logits
            predicted.append(logits.float().cpu().numpy())
            gold.append(labels.numpy())
    if task.kind == "tokens":
        longest = max(part.shape[1] for part in gold)
        predicted = [_widen(part, longest, 0.0) for part in predicted]
        gold = [_widen(part, longest, IGNORED) for part in gold]
    logits, labels = np.concatenate(predicted), np.concatenate(gold)
    if documents:
        _, places, of = np.unique(np.asarray(documents), return_index=True, return_inverse=True)
        sums = np.zeros((len(places), *logits.shape[1:]))
        np.add.at(sums, of, logits)
        logits, labels = sums / np.bincount(of)[:, None], labels[places]
    return task.metrics(EvalPrediction(logits, labels))


def _widen(part: np.ndarray, length: int, value: float) -> np.ndarray:
    """Pad the second dimension."""
    widths = [(0, 0), (0, length - part.shape[1])] + [(0, 0)] * (part.ndim - 2)
    return np.pad(part, widths, constant_values=value)


def read_model(path: str | Path) -> Any:
    """A fastgate checkpoint, or a model of transformers patched; in eval mode, on the GPU if there is one."""
    import transformers

    if (Path(path) / META).is_file():
        model: Any = load(path)
    else:
        try:
            with quiet_loading():
                config = transformers.AutoConfig.from_pretrained(str(path))
                names = [name for name in config.architectures or [] if hasattr(transformers, name)]
                kind = getattr(transformers, names[0]) if names else transformers.AutoModel
                model = patch(kind.from_pretrained(str(path)))
        except OSError as error:
            got = f"{path} ({str(error).splitlines()[0][:160]})"
            wanted = "a fastgate checkpoint or a model of transformers"
            raise ArgumentError(
                say("fastgate", "model", got, wanted, "check the path or the name")
            ) from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
