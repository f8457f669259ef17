"""A task: checked rows, how they become tokens, and how predictions are scored."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgate.data import metrics
from fastgate.data.files import quiet
from fastgate.errors import DataError, format_error

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import EvalPrediction, PreTrainedTokenizerBase

_MANY_UNKNOWN, _MOSTLY_UNKNOWN = 0.2, 0.9  # shares of the tokens: said in `notes`, and refused


@dataclass(frozen=True)
class Task:
    """Rows that have been checked, under the same column names whatever they were called in the files.

    Columns of every split: `text` (and `text_pair`) with `label`, or `tokens` (list of words) with `tags`
    (list of ids, one a word). `labels` holds the class names in the order of the ids, empty for regression.
    `evaluate_on` names the splits that are scored together, `unlabelled` those left out for want of labels.

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
        """What the last `tokenize` left out of the rows, a sentence each: nothing is cut without a word."""
        found = [f"{split} carries no labels and is not scored" for split in self.unlabelled]
        length, rows = self.counts.get("max_length"), self.counts.get("rows", {})
        for split, count in self.counts.get("truncated", {}).items():
            if count:
                found.append(
                    f"{count} of {rows[split]} rows of {split} were longer than {length} tokens and cut"
                )
        for split, count in self.counts.get("unscored_words", {}).items():
            if count:
                found.append(
                    f"{count} words of {split} are beyond {length} tokens or no token, and not scored"
                )
        for split, share in self.counts.get("unknown", {}).items():
            if share > _MANY_UNKNOWN:
                found.append(f"{share:.0%} of the tokens of {split} are unknown to the tokenizer")
        return found

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

        `counts` and `notes` say afterwards how much was cut. Raises DataError for a tokenizer that cannot pad
        or that knows next to no token of the text.
        """
        import datasets

        self._check_room(tokenizer, max_length)
        if (self.kind == "tokens" or stride is not None) and not tokenizer.is_fast:
            remedy = "use a model with a fast tokenizer (tokenizer.json)"
            got = type(tokenizer).__name__
            raise DataError(
                format_error("--model", "tokenizer", got, "a fast tokenizer, which knows its words", remedy)
            )
        if stride is not None:
            self._check_stride(tokenizer, max_length, stride)
        plain = _encode_tokens if self.kind == "tokens" else _encode_text
        encode = partial(plain, tokenizer=tokenizer, max_length=max_length)
        if stride is not None:
            encode = partial(_encode_windows, tokenizer=tokenizer, max_length=max_length, stride=stride)
        found, first, counts = {}, 0, {}
        with quiet():
            for name, rows in self.splits.items():
                counts[name] = Counter(rows=len(rows))
                found[name] = rows.map(
                    partial(encode, counts=counts[name], **({} if stride is None else {"first": first})),
                    batched=True,
                    with_indices=stride is not None,
                    remove_columns=rows.column_names,
                    new_fingerprint=uuid.uuid4().hex,
                )
                first += len(rows)
        found["evaluation"] = _join([found[name] for name in self.evaluate_on])
        counts["evaluation"] = sum((counts[name] for name in self.evaluate_on), Counter())
        self._count(counts, max_length)
        return datasets.DatasetDict(found)

    def _count(self, counts: dict[str, Counter], max_length: int) -> None:
        """Fill `counts` for the training rows and those that are scored."""
        told = {split: counts[split] for split in ("train", "evaluation") if split in counts}
        unknown = {split: found["unknown"] / max(1, found["tokens"]) for split, found in told.items()}
        for split, found in told.items():
            if found["rows"] and (found["tokens"] == 0 or unknown[split] > _MOSTLY_UNKNOWN):
                share = f"{unknown[split]:.0%} unknown" if found["tokens"] else "no"
                remedy = "put the model's own tokenizer into its folder (tokenizer.save_pretrained)"
                got = f"{share} tokens in the rows of {split}"
                raise DataError(
                    format_error("--model", "tokenizer", got, "a tokenizer that knows the text", remedy)
                )
        self.counts.clear()
        self.counts["max_length"] = max_length
        for key in ("rows", "truncated", *(["unscored_words"] if self.kind == "tokens" else [])):
            self.counts[key] = {split: found[key] for split, found in told.items()}
        self.counts["unknown"] = {split: round(share, 4) for split, share in unknown.items()}

    def _check_room(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if tokenizer.pad_token_id is None:
            remedy = "set tokenizer.pad_token and save the tokenizer again"
            raise DataError(
                format_error("--model", "tokenizer", "no padding token", "one, for batches", remedy)
            )
        special = tokenizer.num_special_tokens_to_add(self._paired)
        if max_length <= special:
            wanted = f"{special + 1} or more: {special} tokens of a row are special ones"
            raise DataError(format_error("fastgate", "--max-length", max_length, wanted, "raise it"))

    @property
    def _paired(self) -> bool:
        return "text_pair" in next(iter(self.splits.values())).column_names

    def _check_stride(self, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int) -> None:
        if self.kind == "tokens" or self._paired:
            got = "a token task" if self.kind == "tokens" else "a task of pairs"
            raise DataError(
                format_error("fastgate", "--stride", got, "a task of single texts", "leave it out")
            )
        room = max_length - tokenizer.num_special_tokens_to_add()
        if not 0 <= stride < room:
            wanted = f"0 to {room - 1}, less than the {room} tokens of text in a window"
            raise DataError(
                format_error("fastgate", "--stride", stride, wanted, "lower it, or raise --max-length")
            )

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


def _note_tokens(counts: Counter, encoding: Any, tokenizer: PreTrainedTokenizerBase, paired: bool) -> None:
    """Count tokens, and those that the tokenizer does not know, without the special ones."""
    rows, special = encoding["input_ids"], tokenizer.num_special_tokens_to_add(paired)
    counts["tokens"] += sum(max(0, len(row) - special) for row in rows)
    counts["unknown"] += sum(row.count(tokenizer.unk_token_id) for row in rows)


def _truncated(encoding: Any, whole: Callable[[], Any]) -> int:
    """How many rows lost tokens. whole: encodes them again without truncation, for slow tokenizers."""
    if encoding.encodings is not None:
        return sum(bool(row.overflowing) for row in encoding.encodings)
    pairs = zip(encoding["input_ids"], whole()["input_ids"], strict=True)
    return sum(len(cut) < len(row) for cut, row in pairs)


def _encode_text(
    rows: dict[str, list], *, tokenizer: PreTrainedTokenizerBase, max_length: int, counts: Counter
) -> dict[str, Any]:
    texts = [rows["text"], *([rows["text_pair"]] if "text_pair" in rows else [])]
    encoding = tokenizer(*texts, truncation=True, max_length=max_length, padding=False)
    counts["truncated"] += _truncated(encoding, lambda: tokenizer(*texts, padding=False, verbose=False))
    _note_tokens(counts, encoding, tokenizer, len(texts) > 1)
    return {**encoding, "labels": rows["label"]}


def _encode_windows(
    rows: dict[str, list],
    indices: list[int],
    *,
    first: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    counts: Counter,
) -> dict[str, Any]:
    """first: the number of the split's first row among all splits'."""
    encoded = dict(
        tokenizer(
            rows["text"], truncation=True, max_length=max_length, padding=False, stride=stride,
            return_overflowing_tokens=True,
        )
    )  # fmt: skip
    of = encoded.pop("overflow_to_sample_mapping")
    _note_tokens(counts, encoded, tokenizer, False)
    encoded["labels"] = [rows["label"][row] for row in of]
    encoded["document"] = [first + indices[row] for row in of]
    return encoded


def _encode_tokens(
    rows: dict[str, list], *, tokenizer: PreTrainedTokenizerBase, max_length: int, counts: Counter
) -> dict[str, Any]:
    encoding = tokenizer(
        rows["tokens"], is_split_into_words=True, truncation=True, max_length=max_length, padding=False
    )
    counts["truncated"] += sum(bool(row.overflowing) for row in encoding.encodings)
    _note_tokens(counts, encoding, tokenizer, False)
    labels = []
    for row, tags in enumerate(rows["tags"]):
        before, aligned = None, []
        for word in encoding.word_ids(row):
            aligned.append(metrics.IGNORED if word is None or word == before else tags[word])
            before = word
        labels.append(aligned)
        counts["unscored_words"] += len(tags) - sum(label != metrics.IGNORED for label in aligned)
    return {**encoding, "labels": labels}
