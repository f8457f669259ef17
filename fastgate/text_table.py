"""Tables and paragraphs as plain text for a terminal. Long cells wrap, and nothing is cut off."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from functools import cache

WIDTH = 80  # columns of a terminal
_GAP = "  "


def text_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    text_columns: int | Sequence[int] = 1,
    width: int = WIDTH,
) -> str:
    """A table of at most `width` columns, with a rule below its header. Cells that are too long wrap.

    text_columns: the indices of the columns that hold text, or how many of the first columns do. All other
    columns hold numbers, aligned right. A word is broken only if the table cannot fit otherwise.
    """
    cells = [tuple(header), *(tuple(row) for row in rows)]
    left = set(range(text_columns) if isinstance(text_columns, int) else text_columns)
    columns = list(zip(*cells, strict=True))
    widths = _widths(columns, left, width - len(_GAP) * (len(columns) - 1))
    lines = [_lines(row, widths, left) for row in cells]
    rule = _GAP.join("-" * size for size in widths)
    return "\n".join([*lines[0], rule, *(line for row in lines[1:] for line in row)])


def paragraph(text: str, indent: str = "", width: int = WIDTH) -> str:
    """The text in lines of at most `width` columns. Only a longer word makes a longer line.

    indent: of every line but the first.
    """
    return textwrap.fill(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


@cache
def _wrapped(cell: str, width: int) -> tuple[str, ...]:
    """The lines of a cell. A `±` stays with its number."""
    lines = textwrap.wrap(cell.replace("± ", "±\xa0"), width, break_on_hyphens=False)
    return tuple(line.replace("\xa0", " ") for line in lines) or ("",)


def _words(cell: str) -> list[str]:
    return cell.replace("± ", "±\xa0").split(" ")


def _lines(row: Sequence[str], widths: Sequence[int], left: set[int]) -> list[str]:
    """A row as lines of text."""
    cells = [_wrapped(cell, size) for cell, size in zip(row, widths, strict=True)]
    lines = []
    for i in range(max(map(len, cells))):
        parts = [cell[i] if i < len(cell) else "" for cell in cells]
        padded = [
            part.ljust(size) if column in left else part.rjust(size)
            for column, (part, size) in enumerate(zip(parts, widths, strict=True))
        ]
        lines.append(_GAP.join(padded).rstrip())
    return lines


def _widths(columns: Sequence[Sequence[str]], left: set[int], available: int) -> list[int]:
    """A width for each column, `available` in all: step by step the column where it costs least shrinks."""
    widths = [max(map(len, column)) or 1 for column in columns]
    rows = range(len(columns[0]))
    while sum(widths) > available:
        heights = [
            [len(_wrapped(column[row], size)) for row in rows]
            for column, size in zip(columns, widths, strict=True)
        ]
        tallest = [max(of_row) for of_row in zip(*heights, strict=True)]

        def cost(i: int, tallest: Sequence[int] = tallest) -> tuple[int, int, int]:
            """Whether a word breaks, the lines it adds, and the width left."""
            narrower = widths[i] - 1
            breaks = any(len(word) > narrower for cell in columns[i] for word in _words(cell))
            added = sum(max(len(_wrapped(columns[i][row], narrower)) - tallest[row], 0) for row in rows)
            return (1 if i in left else 2) if breaks else 0, added, -widths[i]

        candidates = [i for i, size in enumerate(widths) if size > 1]
        if not candidates:
            break
        widths[min(candidates, key=cost)] -= 1
    return widths
