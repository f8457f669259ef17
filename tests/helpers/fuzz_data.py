"""Odd and damaged data files: the reader raises a DataError or gives the rows that plain parsers give.

The reference is Python's json and csv: all rows and no others come back, and every value is what the file
says, a cell of a table as text. Columns without a name are left out.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.fuzzing import HOSTILE, damage, nested

from fastgate.data.files import read_file
from fastgate.data.load import load_files
from fastgate.errors import DataError, FastgateError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv")
TEXTS = (
    "a good film", "a bad film", "", " ", '"', '"quoted"', 'a "word" here', '"open', "comma, here",
    "tab\there", "line\nbreak", "carriage\rreturn", "é", "日本語", "\U0001f600", "NA", "null", "None", "nan",
    "inf", "True", "007", "1", "1.0", "-1", "1e5", "2020-01-01", "2020-01-01T00:00:00Z", "12:30", "[1, 2]",
    "{}", "['a', 'b']", "\\", "\\n", "'", "=1+1", "#comment", "\ufeffbom", "\u2028", "\x85", "\x0b", "\x00",
    "x" * 5000, " lead", "trail ", "1_000", "0x10", "١٢", "9" * 40, "1.10", "+5", ".5", "5.", "1,5", "NULL",
    "n/a", "-",
)  # fmt: skip
LABELS: tuple[tuple[Any, ...], ...] = (
    (0, 1), ("neg", "pos"), (True, False), (0.0, 1.0), ("0", "1"), (0, "1"), (1.5, 2),
    (10**30, 1), (2**63, 0),
    (None, 1), ("01", "1"), (2**53 + 1, 2**53), (-1, 0), ("yes", "no"),
)  # fmt: skip


class Wrong(AssertionError):
    """Rows were lost or changed in silence, or an error of another kind was raised."""


def rows_of(rng: random.Random) -> list[dict[str, Any]]:
    """A few rows of a text and a label: mostly plain, with odd cells among them."""
    labels = LABELS[0] if rng.random() < 0.4 else rng.choice(LABELS)
    odd = rng.choice((0.0, 0.0, 0.1, 0.5, 1.0))
    late = rng.random() < 0.1  # the first odd cell comes late
    count = rng.choice((1, 2, 3, 8, 30))
    rows = []
    for i in range(count):
        text = rng.choice(TEXTS) if rng.random() < odd and not (late and i < count - 1) else TEXTS[i % 2]
        rows.append({"text": text, "label": labels[i % len(labels)]})
    if late:
        rows[-1]["label"] = rng.choice(("text", 0.25, None, [1], {"a": 1}, 3))
    if rng.random() < 0.1:
        rows[-1][rng.choice(("more", "", "Text", "label "))] = rng.choice(TEXTS)
    if rng.random() < 0.05:
        del rows[rng.randrange(count)]["label"]
    if rng.random() < 0.1:
        rows[rng.randrange(count)]["text"] = rng.choice(HOSTILE)
    return rows


ODD_JSON: tuple[Callable[[random.Random], str], ...] = (
    *(lambda rng, text=text: text for text in (
        '"label": 1, "label": 0', '"label": NaN', '"label": Infinity', '"label": 1e999',
        '"label": ' + "9" * 5000,
        '"label": 01', "'label': 1", '"label": 1,', '"label": 0.1e1', '"text": "other", "label": 1',
    )),
    lambda rng: '"label": ' + nested(rng.choice((50, 400, 990, 100_000)), rng.choice(("list", "object"))),
)  # fmt: skip


def written(rng: random.Random, rows: list[dict[str, Any]], suffix: str, odd: bool) -> bytes:
    """odd: with something in JSON that a writer of rows does not write."""
    if suffix in (".csv", ".tsv"):
        out = io.StringIO(newline="")
        names = list(dict.fromkeys(name for row in rows for name in row))
        separator = "\t" if suffix == ".tsv" else rng.choice((",", ",", ",", ";"))
        quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC))
        if suffix == ".tsv" and rng.random() < 0.5:  # as most programs write them: no quotes at all
            end = rng.choice(("\n", "\r\n"))
            lines = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
            return end.join("\t".join(line) for line in lines).encode("utf-8", "surrogatepass")
        writer = csv.writer(
            out, delimiter=separator, quoting=quoting, lineterminator=rng.choice(("\n", "\r\n"))
        )
        writer.writerow(names)
        for row in rows:
            writer.writerow([_cell(row.get(name)) for name in names])
        return out.getvalue().encode("utf-8", "surrogatepass")
    ascii_only = rng.random() < 0.5
    if suffix == ".json" and rng.random() < 0.6:
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=rng.choice((None, 2)))
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
        text += rng.choice(("\n", "", "\n\n"))
    if odd:
        text = text.replace('"label": 1', rng.choice(ODD_JSON)(rng), 1)
    data = text.encode("utf-8", "surrogatepass")
    return gzip.compress(data, mtime=0) if suffix == ".jsonl.gz" else data


def _cell(value: Any) -> str:
    try:
        return "" if value is None else str(value)
    except ValueError:  # an integer of more than 4300 digits
        return "9" * 100


def mutate(rng: random.Random) -> tuple[str, str, bytes, bool]:
    """(suffix, what was done, the bytes, whether the rows are nothing out of the ordinary)."""
    suffix = rng.choice(SUFFIXES)
    rows = rows_of(rng)
    odd = rng.random() < 0.1
    plain = (
        suffix != ".csv"
        and not odd
        and all(
            list(row) == ["text", "label"]
            and row["text"] in TEXTS[:2]
            and row["label"] in (0, 1, "neg", "pos")
            for row in rows
        )
    )
    data, damages = written(rng, rows, suffix, odd), []
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        what, data = damage(rng, data)
        damages.append(what)
    if rng.random() < 0.05:
        plain, other = False, rng.choice(SUFFIXES)
        damages.append(f"{suffix} named {other}")
        suffix = other
    return suffix, ", ".join(damages) or "as written", data, plain


# What plain parsers read.


class Unreadable(Exception):
    """A plain parser cannot read it."""


def references(suffix: str, data: bytes) -> list[list[dict[str, Any]]]:
    """The ways to read a file that are right; none: nothing but a DataError is."""
    try:
        if suffix == ".jsonl.gz":
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")
    except Exception:  # gzip and zlib raise several
        text = _other_encoding(data)
        if text is None:
            return []
    if suffix in (".csv", ".tsv"):
        return _tables(suffix, text)
    rows_read: list[Any] = []
    for parse in (_lines, _list) if suffix == ".json" else (_lines,):
        try:
            rows_read.append(parse(text))
        except (ValueError, RecursionError):
            continue
    return [rows for rows in rows_read if rows and all(isinstance(row, dict) for row in rows)]


def _other_encoding(data: bytes) -> str | None:
    """UTF-16 and UTF-32 say what they are by their first bytes."""
    for mark, encoding in ((b"\xff\xfe\x00\x00", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError:
                return None
    return None


def _lines(text: str) -> list[Any]:
    # Only a line feed ends a line of JSON lines; what JSON calls blank is skipped.
    return [json.loads(line) for line in text.split("\n") if line.strip(" \t\r\n")]


def _list(text: str) -> list[Any]:
    rows = json.loads(text)
    if not isinstance(rows, list):
        return [rows]
    return rows


def _tables(suffix: str, text: str) -> list[Any]:
    csv.field_size_limit(10**9)
    if "\n" not in text:
        text = text.replace("\r", "\n")
    rows_read: list[Any] = []
    for read in (_plain_tabs, _quoted_tabs) if suffix == ".tsv" else (_strict_commas, _commas):
        try:
            lines = [line for line in read(text) if line]
        except (csv.Error, ValueError):
            continue
        if len(lines) > 1 and all(len(line) == len(lines[0]) for line in lines):
            rows_read.append(
                [{n: cell for n, cell in zip(lines[0], line, strict=True) if n} for line in lines[1:]]
            )
    return rows_read


def _plain_tabs(text: str) -> list[list[str]]:
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [line.split("\t") for line in lines if line]


def _quoted_tabs(text: str) -> list[list[str]]:
    """Cells in quotation marks, each in one line."""
    rows_read = []
    for line in text.split("\n"):
        line = line.removesuffix("\r")
        if line:
            cells = line.split("\t")
            rows_read.append(
                [next(csv.reader([cell], strict=True)) if cell.startswith('"') else [cell] for cell in cells]
            )
    if any(len(cell) != 1 for row in rows_read for cell in row):
        raise ValueError
    return [[cell[0] for cell in row] for row in rows_read]


def _strict_commas(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), strict=True))


def _commas(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


# Whether what was read is one of them.


def same_rows(rows_read: list[dict[str, Any]], wanted: list[Any]) -> bool:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10 * limit)  # values may be nested as deeply as a parser takes them
    try:
        return len(rows_read) == len(wanted) and all(map(_same_row, rows_read, wanted))
    finally:
        sys.setrecursionlimit(limit)


def _same_row(row: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """A key that a row lacks is None there."""
    return all(_same_value(row.get(key), wanted.get(key)) for key in row.keys() | wanted.keys())


def _same_value(value: Any, wanted: Any) -> bool:
    if type(value) is not type(wanted):
        return False
    if isinstance(wanted, dict):
        return value.keys() == wanted.keys() and all(_same_value(value[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(value) == len(wanted) and all(map(_same_value, value, wanted))
    return bool(value == wanted) or (isinstance(wanted, float) and math.isnan(wanted) and math.isnan(value))


def run_case(seed: int, folder: Path) -> tuple[str, str]:
    """(what happened, what was done). Raises Wrong."""
    rng = random.Random(seed)
    suffix, description, data, plain = mutate(rng)
    path = folder / f"rows{suffix}"
    path.write_bytes(data)
    description = f"{suffix}, {description}"
    try:
        table = read_file(path)
        columns = {name: table.column(name) for name in table.column_names}
        rows_read = [{name: columns[name][i] for name in columns} for i in range(len(table))]
    except DataError as error:
        if plain and "as written" in description:
            raise Wrong(f"{description}: a plain file was refused: {error}") from error
        return ("refused" if not references(suffix, data) else "refused, though it can be read"), description
    except Exception as error:
        raise Wrong(f"{description}: read_file raised {type(error).__name__}: {str(error)[:300]}") from error
    ways = references(suffix, data)
    if not any(same_rows(rows_read, wanted) for wanted in ways):
        shown = (
            f"{len(rows_read)} rows {str(rows_read)[:200]}; the file says {str(ways[:1])[:200]}"
            if ways
            else str(rows_read)[:300]
        )
        raise Wrong(f"{description}: rows were changed in silence: {shown}")
    if rng.random() < 0.3:
        _check_task(path, rows_read, description)
    return "read", description


def _check_task(path: Path, rows_read: list[dict[str, Any]], description: str) -> None:
    """A task of the file has its rows, or is refused."""
    kind = "text" if path.suffix != ".tsv" else "regression"
    try:
        task = load_files(kind, path, path)
    except FastgateError:
        return
    except Exception as error:
        raise Wrong(f"{description}: load_files raised {type(error).__name__}: {str(error)[:300]}") from error
    texts = task.train["text"][:]
    if len(texts) != len(rows_read) or any(
        text != str(row["text"]) for text, row in zip(texts, rows_read, strict=True)
    ):
        raise Wrong(f"{description}: the task has other texts than the file")
