"""A task: checked rows, how they become tokens, and how predictions are scored."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, say
from . import metrics
from .files import quiet

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import EvalPrediction, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """Rows that have been checked, under the same column names whatever they were called in the files.

    Columns of every split: `text` (and `text_pair`) with `label`, or `tokens` (list of words) with `tags`
    (list of ids, one a word). `labels` holds the class names in the order of the ids, empty for regression.
    `evaluate_on` names the splits that are scored together.
    """

    name: str
    kind: str
    splits: dict[str, Dataset]
    labels: tuple[str, ...]
    metric: str
    evaluate_on: tuple[str, ...]
    columns: tuple[str, ...] = field(default=())

    @property
    def train(self) -> Dataset:
        return self.splits["train"]

    @property
    def evaluation(self) -> Dataset:
        """The rows of `evaluate_on`, one split after the other."""
        return _join([self.splits[split] for split in self.evaluate_on])

    def tokenize(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int | None = None
    ) -> DatasetDict:
        """Every split as model inputs with `labels`, cut at `max_length` tokens, plus `evaluation`, the
        joined one.

        stride: texts longer than `max_length` tokens are not cut but become windows of that length, each with
        its text's label, which share `stride` tokens with the window before; the column `document` says which
        row they are of, and `score` takes the mean of their logits. For tasks of single texts.

        In token tasks a word's label sits on its first sub-word; every other position carries -100. Words
        beyond `max_length`, or that the tokenizer turns into nothing, are not scored.
        """
        import datasets

        if (self.kind == "tokens" or stride is not None) and not tokenizer.is_fast:
            remedy = "load it with use_fast=True, or use a model that has a fast tokenizer"
            got = type(tokenizer).__name__
            raise DataError(
                say("tokenize", "tokenizer", got, "a fast tokenizer, which knows its words", remedy)
            )
        if stride is not None:
            self._check_stride(tokenizer, max_length, stride)
        plain = _encode_tokens if self.kind == "tokens" else _encode_text
        encode = partial(plain, tokenizer=tokenizer, max_length=max_length)
        if stride is not None:
            encode = partial(_encode_windows, tokenizer=tokenizer, max_length=max_length, stride=stride)
        found, first = {}, 0
        with quiet():
            for name, rows in self.splits.items():
                found[name] = rows.map(
                    encode if stride is None else partial(encode, first=first),
                    batched=True,
                    with_indices=stride is not None,
                    remove_columns=rows.column_names,
                    new_fingerprint=uuid.uuid4().hex,
                )
                first += len(rows)
        found["evaluation"] = _join([found[name] for name in self.evaluate_on])
        return datasets.DatasetDict(found)

    def _check_stride(self, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int) -> None:
        columns = next(iter(self.splits.values())).column_names
        if self.kind == "tokens" or "text_pair" in columns:
            got = "a token task" if self.kind == "tokens" else "a task of pairs"
            raise DataError(say("tokenize", "stride", got, "a task of single texts", "leave it out"))
        room = max_length - tokenizer.num_special_tokens_to_add()
        if not 0 <= stride < room:
            wanted = f"0 to {room - 1}, less than the {room} tokens of text in a window"
            raise DataError(say("tokenize", "stride", stride, wanted, "lower it, or raise max_length"))

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Pads a batch to its longest row, labels with -100."""
        from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

        kind = DataCollatorForTokenClassification if self.kind == "tokens" else DataCollatorWithPadding
        return kind(tokenizer)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Scores of logits against labels, for `Trainer(compute_metrics=task.metrics)`; `self.metric` is
        the main."""
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


def _encode_text(
    rows: dict[str, list], *, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    pair = [rows["text_pair"]] if "text_pair" in rows else []
    encoded = dict(tokenizer(rows["text"], *pair, truncation=True, max_length=max_length, padding=False))
    encoded["labels"] = rows["label"]
    return encoded


def _encode_windows(
    rows: dict[str, list],
    indices: list[int],
    *,
    first: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
) -> dict[str, Any]:
    """first: the number of the split's first row among all splits'."""
    encoded = dict(
        tokenizer(
            rows["text"], truncation=True, max_length=max_length, padding=False, stride=stride,
            return_overflowing_tokens=True,
        )
    )  # fmt: skip
    of = encoded.pop("overflow_to_sample_mapping")
    encoded["labels"] = [rows["label"][row] for row in of]
    encoded["document"] = [first + indices[row] for row in of]
    return encoded


def _encode_tokens(
    rows: dict[str, list], *, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    encoding = tokenizer(
        rows["tokens"], is_split_into_words=True, truncation=True, max_length=max_length, padding=False
    )
    labels = []
    for row, tags in enumerate(rows["tags"]):
        before, aligned = None, []
        for word in encoding.word_ids(row):
            aligned.append(metrics.IGNORED if word is None or word == before else tags[word])
            before = word
        labels.append(aligned)
    return {**encoding, "labels": labels}
