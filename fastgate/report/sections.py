"""A table with its title and the sentences below it, as Markdown for a file and as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastgate.report.markdown import markdown_table
from fastgate.text_table import paragraph, text_table


@dataclass(frozen=True)
class Section:
    """A part of a report.

    title: its heading, or nothing.
    header: names of the columns; empty for a section without a table.
    rows: cells of each row.
    text_columns: indices of the columns that hold text. The others hold numbers.
    notes: paragraphs below the table. An item of a list begins with a dash.
    """

    title: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text_columns: Sequence[int] = (0,)
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The section as Markdown, with an empty line at its end."""
        parts = [f"## {self.title}\n"] if self.title else []
        if self.header:
            parts.append(markdown_table(self.header, self.rows, self.text_columns) + "\n")
        return "\n".join([*parts, *(f"{note}\n" for note in self.notes)])

    def text(self) -> str:
        """The section in lines of at most 80 columns."""
        parts = [paragraph(self.title) + "\n"] if self.title else []
        if self.header:
            parts.append(text_table(self.header, self.rows, self.text_columns) + "\n")
        return "\n".join([*parts, *(paragraph(note, indent="  ") for note in self.notes), ""])
