"""A task: checked rows, how they become tokens, and how predictions are scored."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from fastgate.data import metrics
from fastgate.data.encoding import Tokenizer, encode_text, encode_tokens, encode_windows
from fastgate.data.files import no_progress_bars
from fastgate.errors import DataError, format_error

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_NOTED_UNKNOWN, _MAX_UNKNOWN = 0.2, 0.9  # shares of the tokens: `notes` says so, and DataError


class HasPredictions(Protocol):
    """Logits and labels as arrays, such as transformers' EvalPrediction."""

    @property
    def predictions(self) -> Any: ...

    @property
    def label_ids(self) -> Any: ...


class Predictions(NamedTuple):
    """Logits and labels of the rows that are scored."""

    predictions: np.ndarray
    label_ids: np.ndarray


@dataclass(frozen=True)
class Task:
    """Rows that have been checked, under the same column names whatever they were called in the files.

    Columns of every split: `text` (and `text_pair`) with `label`, or `tokens` (list of words) with `tags`
    (list of ids, one for each word).

    Args:
        name: of the task.
        kind: one of catalog.KINDS.
        splits: the rows, by name of the split.
        labels: the class names in the order of the ids, empty for regression.
        metric: name of the main score.
        evaluate_on: the splits that are scored together.
        columns: names of the input columns and of the label column in the files.
        unlabelled: splits that are not scored because they have no labels.
        counts: of the last `tokenize`, for results: `max_length`, and by split `rows`, `truncated` (rows that
            were longer), `unknown` (share of the tokens that the tokenizer does not know) and, for tags,
            `unscored_words`.
    """

    name: str
    kind: str
    splits: dict[str, Dataset]
    labels: tuple[str, ...]
    metric: str
    evaluate_on: tuple[str, ...]
    columns: tuple[str, ...] = field(default=())
    unlabelled: tuple[str, ...] = ()
    counts: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def notes(self) -> list[str]:
        """What the last `tokenize` left out of the rows, a sentence each."""
        notes = [f"{split} carries no labels and is not scored" for split in self.unlabelled]
        length, rows = self.counts.get("max_length"), self.counts.get("rows", {})
        for split, count in self.counts.get("truncated", {}).items():
            if count:
                notes.append(
                    f"{count} of {rows[split]} rows of {split} were longer than {length} tokens and truncated"
                )
        for split, count in self.counts.get("unscored_words", {}).items():
            if count:
                notes.append(
                    f"{count} words of {split} are beyond {length} tokens or no token, and not scored"
                )
        for split, share in self.counts.get("unknown", {}).items():
            if share > _NOTED_UNKNOWN:
                notes.append(f"{share:.0%} of the tokens of {split} are unknown to the tokenizer")
        return notes

    @property
    def train(self) -> Dataset:
        return self.splits["train"]

    @property
    def evaluation(self) -> Dataset:
        """The rows of `evaluate_on`, one split after the other."""
        return _join([self.splits[split] for split in self.evaluate_on])

    def tokenize(self, tokenizer: Tokenizer, max_length: int, stride: int | None = None) -> DatasetDict:
        """Every split as model inputs with `labels`, plus `evaluation`, the splits of `evaluate_on` joined.

        Rows are truncated to `max_length` tokens. With `stride`, for tasks of single texts, longer texts
        become windows of `max_length` tokens instead. Each window has its text's label and shares `stride`
        tokens with the one before. The column `document` says which row a window is of.

        In token tasks a word's label is on its first token, and every other position has -100. Words that are
        truncated, or that the tokenizer turns into nothing, are not scored.

        `counts` and `notes` say afterwards how much was truncated. Raises DataError for a tokenizer that
        cannot pad, or that knows hardly any token of the text.
        """
        import datasets

        self._check_tokenizer(tokenizer, max_length, stride)
        plain = encode_tokens if self.kind == "tokens" else encode_text
        encode = partial(plain, tokenizer=tokenizer, max_length=max_length)
        if stride is not None:
            encode = partial(encode_windows, tokenizer=tokenizer, max_length=max_length, stride=stride)
        splits: dict[str, Dataset] = {}
        counts: dict[str, Counter[str]] = {}
        first = 0
        with no_progress_bars():
            for name, rows in self.splits.items():
                counts[name] = Counter(rows=len(rows))
                splits[name] = rows.map(
                    partial(encode, counts=counts[name], **({} if stride is None else {"first": first})),
                    batched=True,
                    with_indices=stride is not None,
                    remove_columns=rows.column_names,
                    new_fingerprint=uuid.uuid4().hex,
                )
                first += len(rows)
        splits["evaluation"] = _join([splits[name] for name in self.evaluate_on])
        counts["evaluation"] = sum((counts[name] for name in self.evaluate_on), Counter())
        self._set_counts(counts, max_length)
        return datasets.DatasetDict(splits)

    def _set_counts(self, all_counts: dict[str, Counter[str]], max_length: int) -> None:
        """Fill `counts` for the training rows and those that are scored."""
        counts = {split: all_counts[split] for split in ("train", "evaluation") if split in all_counts}
        unknown = {split: count["unknown"] / max(1, count["tokens"]) for split, count in counts.items()}
        for split, count in counts.items():
            if count["rows"] and (count["tokens"] == 0 or unknown[split] > _MAX_UNKNOWN):
                share = f"{unknown[split]:.0%} unknown" if count["tokens"] else "no"
                remedy = "put the model's own tokenizer into its folder (tokenizer.save_pretrained)"
                got = f"{share} tokens in the rows of {split}"
                raise DataError(
                    format_error("--model", "tokenizer", got, "a tokenizer that knows the text", remedy)
                )
        self.counts.clear()
        self.counts["max_length"] = max_length
        for key in ("rows", "truncated", *(["unscored_words"] if self.kind == "tokens" else [])):
            self.counts[key] = {split: count[key] for split, count in counts.items()}
        self.counts["unknown"] = {split: round(share, 4) for split, share in unknown.items()}

    def _check_tokenizer(self, tokenizer: Tokenizer, max_length: int, stride: int | None) -> None:
        if tokenizer.pad_token_id is None:
            remedy = "set tokenizer.pad_token and save the tokenizer again"
            raise DataError(
                format_error("--model", "tokenizer", "no padding token", "one, for batches", remedy)
            )
        special = tokenizer.num_special_tokens_to_add(self._paired)
        if max_length <= special:
            wanted = f"{special + 1} or more: {special} tokens of a row are special ones"
            raise DataError(format_error("fastgate", "--max-length", max_length, wanted, "raise it"))
        if (self.kind == "tokens" or stride is not None) and not tokenizer.is_fast:
            got, remedy = type(tokenizer).__name__, "use a model with a fast tokenizer (tokenizer.json)"
            wanted = "a fast tokenizer, which knows its words"
            raise DataError(format_error("--model", "tokenizer", got, wanted, remedy))
        if stride is not None:
            self._check_stride(tokenizer, max_length, stride)

    @property
    def _paired(self) -> bool:
        return "text_pair" in next(iter(self.splits.values())).column_names

    def _check_stride(self, tokenizer: Tokenizer, max_length: int, stride: int) -> None:
        if self.kind == "tokens" or self._paired:
            got = "a token task" if self.kind == "tokens" else "a task of pairs"
            raise DataError(
                format_error("fastgate", "--stride", got, "a task of single texts", "leave it out")
            )
        window = max_length - tokenizer.num_special_tokens_to_add()
        if not 0 <= stride < window:
            wanted = f"0 to {window - 1}, less than the {window} tokens of text in a window"
            raise DataError(
                format_error("fastgate", "--stride", stride, wanted, "lower it, or raise --max-length")
            )

    def metrics(self, prediction: HasPredictions) -> dict[str, float]:
        """Scores of logits against labels, for `Trainer(compute_metrics=task.metrics)`. `self.metric` is the
        main one."""
        logits = prediction.predictions
        logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
        gold = np.asarray(prediction.label_ids)
        if self.kind == "regression":
            return metrics.regression(logits, gold)
        if self.kind == "tokens":
            return metrics.tokens(logits, gold, self.labels)
        return metrics.classification(logits, gold, self.labels)


def _join(parts: list[Dataset]) -> Dataset:
    import datasets

    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
