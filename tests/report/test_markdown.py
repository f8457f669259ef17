"""The one function that writes Markdown tables."""

from __future__ import annotations

from fastgate.report.markdown import markdown_table


def test_numbers_are_aligned_right_and_text_columns_left():
    assert markdown_table(["name", "ms", "note"], [["a", "1", "x"], ["b", "2", ""]], (0, 2)) == (
        "| name | ms | note |\n| --- | ---: | --- |\n| a | 1 | x |\n| b | 2 |  |"
    )
    assert markdown_table(["a", "b"], [], 2) == "| a | b |\n| --- | --- |"
