"""Plain-text tables: never wider than asked, nothing cut off, words whole where they fit."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fastgate.text_table import paragraph, text_table


def test_a_table_that_fits_is_not_wrapped():
    assert text_table(["model", "ms", "note"], [["a", "1.0", "x y"], ["long name", "12.5", ""]], (0, 2)) == (
        "model        ms  note\n---------  ----  ----\na           1.0  x y\nlong name  12.5"
    )


def test_long_text_wraps_at_spaces_before_numbers_do():
    rows = [["one two three", "1,234.5"], ["four", "6.7"]]
    assert text_table(["name", "tokens a second"], rows, width=18) == (
        "name      tokens a\n"
        "            second\n"
        "--------  --------\n"
        "one two    1,234.5\n"
        "three\n"
        "four           6.7"
    )


def test_a_word_is_broken_only_where_the_table_cannot_fit_otherwise():
    rows = [["x" * 30, "1234567890"]]
    assert max(map(len, text_table(["", "n"], rows, width=20).splitlines())) == 20
    assert "1234567890" in text_table(["", "n"], rows, width=20)  # the text column is broken first
    assert "x" * 30 in text_table(["", "n"], rows, width=42)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.text("ab1 .-{,}", max_size=40), min_size=4, max_size=4), min_size=1, max_size=5))
def test_no_line_is_too_long_and_no_character_is_lost(cells):
    header, *rows = cells
    text = text_table(header, rows, (0, 2), width=40)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 40
    kept = [line for line in lines if set(line) - {"-", " "}]
    letters = [character for character in "".join(kept) if character not in " -"]
    given = [character for row in cells for cell in row for character in cell if character not in " -"]
    assert sorted(letters) == sorted(given)


def test_a_paragraph_is_indented_below_its_first_line():
    assert paragraph("- one two three", indent="  ", width=10) == "- one two\n  three"
    assert paragraph("/a/long/path/that-stays", width=10) == "/a/long/path/that-stays"
