"""The rows of a data file: JSON lines, a JSON list, comma-separated or tab-separated values.

Every value stays as the file has it. A cell of a table is text: `NA`, `null`, `001`, `1e5` and blanks around
a word do not change, and an empty cell is an empty text. Nothing is guessed from other rows.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from fastgate.errors import DataError, format_error

_MAX_CELL = 2**31 - 1  # characters; the default of csv is 131072
_QUOTED = re.compile(r'"(?:[^"]|"")*"')  # a whole cell in quotation marks, those inside it doubled


@dataclass(frozen=True)
class Rows:
    """What a file holds. lines: the line each row begins at, empty where rows have no line of their own."""

    column_names: tuple[str, ...]
    column: Callable[[str], list[Any]]
    count: int
    lines: Sequence[int] = ()


def refuse(where: str, place: str, got: object, wanted: str, remedy: str) -> NoReturn:
    raise DataError(format_error(where, place, got, wanted, remedy))


class _RepeatedKey(ValueError):
    """A key that is twice in one JSON object."""


def _repeated(names: list[str]) -> list[str]:
    return [name[:80] for name, count in Counter(names).items() if count > 1]


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _RepeatedKey(f"the key {_repeated([key for key, _ in pairs])[0]!r} twice in one object")
    return values


_decoder = json.JSONDecoder(object_pairs_hook=_without_repeated_keys)


def _json(text: str, where: str, first_line: int) -> Any:
    """One JSON value; first_line: the line that `text` begins at."""
    remedy = "correct that line; .jsonl has one JSON object a line, .json may be one list of objects"
    try:
        return _decoder.decode(text)
    except json.JSONDecodeError as error:
        refuse(where, f"line {first_line + error.lineno - 1}", f"no JSON ({error.msg})", "JSON", remedy)
    except _RepeatedKey as error:
        refuse(where, f"line {first_line}", error, "every key once", "remove or rename one of them")
    except RecursionError:
        refuse(
            where, f"line {first_line}", "brackets nested too deeply", "an object with flat values", remedy
        )
    except ValueError:  # Python reads no whole number of more than 4300 digits
        refuse(where, f"line {first_line}", "a number of thousands of digits", "numbers", remedy)


def _from_objects(rows: list[Any], lines: list[int], where: str) -> Rows:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            place = f"line {lines[number]}" if lines else f"row {number}"
            remedy = "write each row as an object of column names and values"
            refuse(where, place, f"a {type(row).__name__}, not an object", "an object", remedy)
    names = tuple(dict.fromkeys(key for row in rows for key in row))
    return Rows(names, lambda column: [row.get(column) for row in rows], len(rows), lines)


def json_lines(text: str, where: str) -> Rows:
    """One object a line; empty lines are passed over. A key that a row lacks is null there."""
    numbered = [
        (number, _json(line, where, number))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip(" \t\r")
    ]
    return _from_objects([row for _, row in numbered], [number for number, _ in numbered], where)


def json_file(text: str, where: str) -> Rows:
    """One list of objects, or JSON lines."""
    if not text.lstrip().startswith("["):
        return json_lines(text, where)
    return _from_objects(_json(text, where, 1), [], where)


def _from_cells(rows: list[list[str]], lines: list[int], where: str, remedy: str) -> Rows:
    """A table whose first row is the header. Columns without a name (a written index) are left out."""
    if not rows:
        return Rows((), lambda column: [], 0)
    header, width = rows[0], len(rows[0])
    twice = _repeated([name for name in header if name])
    if twice:
        refuse(where, "header", f"{twice[0]!r} twice", "every column name once", "rename one of them")
    for line, row in zip(lines, rows, strict=True):
        if len(row) != width:
            got = f"{len(row)} fields under a header of {width}"
            refuse(where, f"line {line}", got, f"{width} fields", remedy)
    places = {name: place for place, name in enumerate(header) if name}
    body = rows[1:]
    return Rows(tuple(places), lambda name: [row[places[name]] for row in body], len(body), lines[1:])


def comma_separated(text: str, where: str) -> Rows:
    """RFC 4180: a cell that begins with a quotation mark ends with the next single one and may hold commas,
    line ends and doubled quotation marks. Empty lines are passed over; every row has the header's width.
    """
    remedy = (
        "put quotation marks around cells with commas or line ends and double those inside, or use .jsonl"
    )
    header = text.lstrip().split("\n", 1)[0].strip()
    if "," not in header and re.search("[;\t|]", header):
        other = "separate the columns by commas, or name a file separated by tabs .tsv"
        refuse(where, "header", f"no comma in {header[:80]!r}", "columns separated by commas", other)
    rows: list[list[str]] = []
    lines: list[int] = []
    limit = csv.field_size_limit(_MAX_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    before = 0
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(before + 1)
            before = reader.line_num
    except csv.Error as error:
        refuse(where, f"line {before + 1}", f"damaged quotation marks ({error})", "RFC 4180", remedy)
    finally:
        csv.field_size_limit(limit)
    _check_cell_lines(text, rows, lines, where, remedy)
    return _from_cells(rows, lines, where, remedy)


def _check_cell_lines(text: str, rows: list[list[str]], lines: list[int], where: str, remedy: str) -> None:
    """Refuse a cell over several lines, each of which is a whole row, with a value of some column that other
    rows have: two texts with one stray quotation mark each, not one text."""
    raw = io.StringIO(text, newline="").readlines()
    ends = [*(line - 1 for line in lines[1:]), len(raw)]
    several = [
        place for place, end in enumerate(ends) if any(raw[n].strip() for n in range(lines[place], end))
    ]
    if not several:
        return
    single = [row for place, row in enumerate(rows) if place and place not in set(several)]
    known = [set(column) for column in zip(*(row for row in single if len(row) == len(rows[0])), strict=True)]
    for place in several:
        inside = [
            line.rstrip("\r\n").split(",") for line in raw[lines[place] - 1 : ends[place]] if line.strip()
        ]
        if all(len(cells) == len(rows[0]) for cells in inside) and any(
            all(cells[column] in values for cells in inside) for column, values in enumerate(known)
        ):
            got = f"one cell over {len(inside)} lines that are whole rows"
            refuse(where, f"line {lines[place]}", got, "one row, or quotation marks in pairs", remedy)


def tab_separated(text: str, where: str) -> Rows:
    """One row a line, cells between tabs, a quotation mark is a character like any other, as GLUE has it.

    Only a file whose quotation marks are all those of a CSV writer (each cell with one is quoted as a whole,
    those inside are doubled, and some are doubled or the header is quoted) is read without them.
    Empty lines are passed over; every row has the header's width.
    """
    numbered = [(n, line.removesuffix("\r")) for n, line in enumerate(text.split("\n"), 1)]
    lines = [number for number, line in numbered if line]
    rows = [line.split("\t") for _, line in numbered if line]
    with_quotes = [cell for row in rows for cell in row if '"' in cell]
    doubled = any('""' in cell[1:-1] for cell in with_quotes) or any(cell.startswith('"') for cell in rows[0])
    if doubled and all(map(_QUOTED.fullmatch, with_quotes)):
        rows = [
            [cell[1:-1].replace('""', '"') if cell.startswith('"') else cell for cell in row] for row in rows
        ]
    remedy = (
        "write one row a line and no tab inside a text; for texts with tabs or line ends use .jsonl or .csv"
    )
    return _from_cells(rows, lines, where, remedy)
