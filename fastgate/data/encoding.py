"""How rows of a task become model inputs, and what is counted of what they lose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from fastgate.data import metrics


class Tokenizer(Protocol):
    """What a task needs of a tokenizer; those of transformers have it."""

    @property
    def is_fast(self) -> bool: ...

    @property
    def pad_token_id(self) -> Any: ...

    @property
    def unk_token_id(self) -> Any: ...

    def num_special_tokens_to_add(self, pair: bool = False) -> int: ...

    def __call__(self, *texts: Any, **options: Any) -> Any: ...


def _count_tokens(counts: Counter[str], encoding: Any, tokenizer: Tokenizer, paired: bool) -> None:
    """Count tokens, and those that the tokenizer does not know, without the special ones."""
    rows, special = encoding["input_ids"], tokenizer.num_special_tokens_to_add(paired)
    counts["tokens"] += sum(max(0, len(row) - special) for row in rows)
    counts["unknown"] += sum(row.count(tokenizer.unk_token_id) for row in rows)


def _count_truncated(encoding: Any, encode_whole: Callable[[], Any]) -> int:
    """How many rows lost tokens. encode_whole: encodes them without truncation, for slow tokenizers."""
    if encoding.encodings is not None:
        return sum(bool(row.overflowing) for row in encoding.encodings)
    pairs = zip(encoding["input_ids"], encode_whole()["input_ids"], strict=True)
    return sum(len(truncated) < len(row) for truncated, row in pairs)


def encode_text(
    rows: dict[str, list[Any]], *, tokenizer: Tokenizer, max_length: int, counts: Counter[str]
) -> dict[str, Any]:
    """Encode texts, or pairs of texts, truncated to `max_length` tokens."""
    texts = [rows["text"], *([rows["text_pair"]] if "text_pair" in rows else [])]
    encoding = tokenizer(*texts, truncation=True, max_length=max_length, padding=False)
    counts["truncated"] += _count_truncated(encoding, lambda: tokenizer(*texts, padding=False, verbose=False))
    _count_tokens(counts, encoding, tokenizer, len(texts) > 1)
    return {**encoding, "labels": rows["label"]}


def encode_windows(
    rows: dict[str, list[Any]],
    indices: list[int],
    *,
    first: int,
    tokenizer: Tokenizer,
    max_length: int,
    stride: int,
    counts: Counter[str],
) -> dict[str, Any]:
    """Encode texts as windows. first: number of the split's first row among the rows of all splits."""
    encoded = dict(
        tokenizer(
            rows["text"], truncation=True, max_length=max_length, padding=False, stride=stride,
            return_overflowing_tokens=True,
        )
    )  # fmt: skip
    row_of_window = encoded.pop("overflow_to_sample_mapping")
    _count_tokens(counts, encoded, tokenizer, False)
    encoded["labels"] = [rows["label"][row] for row in row_of_window]
    encoded["document"] = [first + indices[row] for row in row_of_window]
    return encoded


def encode_tokens(
    rows: dict[str, list[Any]], *, tokenizer: Tokenizer, max_length: int, counts: Counter[str]
) -> dict[str, Any]:
    """Encode lists of words. The tag of a word becomes the label of its first token."""
    encoding = tokenizer(
        rows["tokens"], is_split_into_words=True, truncation=True, max_length=max_length, padding=False
    )
    counts["truncated"] += sum(bool(row.overflowing) for row in encoding.encodings)
    _count_tokens(counts, encoding, tokenizer, False)
    labels = []
    for row, tags in enumerate(rows["tags"]):
        before, aligned = None, []
        for word in encoding.word_ids(row):
            aligned.append(metrics.IGNORED if word is None or word == before else tags[word])
            before = word
        labels.append(aligned)
        counts["unscored_words"] += len(tags) - sum(label != metrics.IGNORED for label in aligned)
    return {**encoding, "labels": labels}
