"""Scores of a task, from scikit-learn, scipy and seqeval."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

IGNORED = -100  # the label of tokens that are not scored: special tokens, padding, later sub-words


def _undefined(metric: str, reason: str) -> None:
    warnings.warn(f"{metric} is undefined and counts as 0: {reason}", RuntimeWarning, stacklevel=3)


def _f1_average(labels: Sequence[str]) -> str:
    return "binary" if len(labels) == 2 else "macro"


def classification(logits: np.ndarray, gold: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, F1 (of class 1 of two, macro of more), Matthews correlation; logits (rows, classes).

    Matthews is undefined where gold labels or predictions are of one class: it counts as 0, with a warning.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = logits.argmax(-1)
    for what, ids in (("gold labels", gold), ("predictions", predicted)):
        if len(np.unique(ids)) < 2:
            _undefined("Matthews correlation", f"the {what} are of one class")
    return {
        "accuracy": float(accuracy_score(gold, predicted)),
        "f1": float(f1_score(gold, predicted, average=_f1_average(labels), zero_division=0)),
        "matthews": float(matthews_corrcoef(gold, predicted)),
    }


def regression(predicted: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """Spearman and Pearson correlation and mean squared error.

    A correlation is undefined where gold numbers or predictions are all equal: it counts as 0,
    with a warning.
    """
    from scipy.stats import pearsonr, spearmanr

    predicted, gold = predicted.reshape(-1).astype(np.float64), gold.reshape(-1).astype(np.float64)
    spearman = pearson = 0.0
    flat = [w for w, v in (("gold numbers", gold), ("predictions", predicted)) if np.ptp(v) == 0.0]
    if flat:
        _undefined("correlation", f"the {flat[0]} are all equal")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nearly equal numbers
            spearman, pearson = (float(f(predicted, gold).statistic) for f in (spearmanr, pearsonr))
    return {"spearman": spearman, "pearson": pearson, "mse": float(np.mean((predicted - gold) ** 2))}


def is_iob2(labels: Sequence[str]) -> bool:
    """Whether the tags mark entities: `O`, `B-x`, `I-x`."""
    return "O" in labels and len(labels) > 1 and all(tag == "O" or tag[:2] in ("B-", "I-") for tag in labels)


def tokens(logits: np.ndarray, gold: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Accuracy a word and, for IOB2 tags, the F1 of whole entities.

    logits (rows, length, tags), gold (rows, length) with -100 where nothing is scored.
    """
    predicted = logits.argmax(-1)
    scored = gold != IGNORED
    scores = {"token_accuracy": float((predicted[scored] == gold[scored]).mean())}
    if is_iob2(labels):
        from seqeval.metrics import f1_score

        def words(ids: np.ndarray) -> list[list[str]]:
            return [[labels[i] for i in row[mask]] for row, mask in zip(ids, scored, strict=True)]

        if not any(labels[i] != "O" for i in np.unique(gold[scored])):
            _undefined("entity F1", "there is no entity in the gold tags")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores = {"entity_f1": float(f1_score(words(gold), words(predicted), zero_division=0)), **scores}
    return scores
