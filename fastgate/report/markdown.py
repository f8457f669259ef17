"""Markdown tables: one function that writes them all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int | Sequence[int] = 1
) -> str:
    """A table with this header. All other columns than the text columns hold numbers, aligned right.

    text_columns: their indices, or how many of the first columns hold text.
    """
    left = range(text_columns) if isinstance(text_columns, int) else text_columns
    rule = ["---" if column in left else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
