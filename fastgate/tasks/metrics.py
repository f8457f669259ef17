"""Scores of a task, from scikit-learn, scipy and seqeval."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

IGNORED = -100  # the label of tokens that are not scored: special tokens, padding, later sub-words


def _f1_average(labels: Sequence[str]) -> str:
    return "binary" if len(labels) == 2 else "macro"


def classification(logits: np.ndarray, gold: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, F1 (of class 1 of two, macro of more), Matthews correlation; logits (rows, classes)."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = logits.argmax(-1)
    return {
        "accuracy": float(accuracy_score(gold, predicted)),
        "f1": float(f1_score(gold, predicted, average=_f1_average(labels), zero_division=0)),
        "matthews": float(matthews_corrcoef(gold, predicted)),
    }


def regression(predicted: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """Spearman and Pearson correlation (0 for constant predictions) and mean squared error."""
    from scipy.stats import pearsonr, spearmanr

    predicted, gold = predicted.reshape(-1).astype(np.float64), gold.reshape(-1).astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spearman, pearson = (float(f(predicted, gold).statistic) for f in (spearmanr, pearsonr))
    return {
        "spearman": 0.0 if np.isnan(spearman) else spearman,
        "pearson": 0.0 if np.isnan(pearson) else pearson,
        "mse": float(np.mean((predicted - gold) ** 2)),
    }


def is_iob2(labels: Sequence[str]) -> bool:
    """Whether the tags mark entities: `O`, `B-x`, `I-x`."""
    return "O" in labels and len(labels) > 1 and all(tag == "O" or tag[:2] in ("B-", "I-") for tag in labels)


def tokens(logits: np.ndarray, gold: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Accuracy a word and, for IOB2 tags, the F1 of whole entities.

    logits (rows, length, tags), gold (rows, length) with -100 where nothing is scored.
    """
    predicted = logits.argmax(-1)
    scored = gold != IGNORED
    found = {"token_accuracy": float((predicted[scored] == gold[scored]).mean())}
    if is_iob2(labels):
        from seqeval.metrics import f1_score

        def words(ids: np.ndarray) -> list[list[str]]:
            return [[labels[i] for i in row[mask]] for row, mask in zip(ids, scored, strict=True)]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = {"entity_f1": float(f1_score(words(gold), words(predicted), zero_division=0)), **found}
    return found
