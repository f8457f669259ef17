"""Odd and damaged data files: the reader raises a DataError or gives the rows that plain parsers give.

The reference is Python's json and csv, line by line: every row is there, none is more, and every cell is what
the file says (a cell of a table may be read as the number it spells).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import random
from pathlib import Path
from typing import Any

from fuzzing import HOSTILE, damage, nested

from fastgate.errors import DataError, FastgateError
from fastgate.tasks.files import read_file
from fastgate.tasks.load import load_files

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv")
TEXTS = (
    "a good film", "a bad film", "", " ", '"', '"quoted"', 'a "word" here', '"open', "comma, here", "tab\there",
    "line\nbreak", "carriage\rreturn", "é", "日本語", "\U0001f600", "NA", "null", "None", "nan", "inf", "True", "007",
    "1", "1.0", "-1", "1e5", "2020-01-01", "2020-01-01T00:00:00Z", "12:30", "[1, 2]", "{}", "['a', 'b']", "\\", "\\n",
    "'", "=1+1", "#comment", "\ufeffbom", "\u2028", "\x85", "\x0b", "\x00", "x" * 5000, " lead", "trail ",
    "1_000", "0x10", "١٢", "9" * 40, "1.10", "+5", ".5", "5.", "1,5", "NULL", "n/a", "-",
)  # fmt: skip
LABELS: tuple[tuple[Any, ...], ...] = (
    (0, 1), ("neg", "pos"), (True, False), (0.0, 1.0), ("0", "1"), (0, "1"), (1.5, 2), (10**30, 1), (2**63, 0),
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
    made = []
    for i in range(count):
        text = rng.choice(TEXTS) if rng.random() < odd and not (late and i < count - 1) else TEXTS[i % 2]
        made.append({"text": text, "label": labels[i % len(labels)]})
    if late:
        made[-1]["label"] = rng.choice(("text", 0.25, None, [1], {"a": 1}, 3))
    if rng.random() < 0.1:
        made[-1][rng.choice(("more", "", "Text", "label "))] = rng.choice(TEXTS)
    if rng.random() < 0.05:
        del made[rng.randrange(count)]["label"]
    if rng.random() < 0.1:
        made[rng.randrange(count)]["text"] = rng.choice(HOSTILE)
    return made


def written(rng: random.Random, rows: list[dict[str, Any]], suffix: str) -> bytes:
    if suffix in (".csv", ".tsv"):
        out = io.StringIO(newline="")
        names = list(dict.fromkeys(name for row in rows for name in row))
        separator = "\t" if suffix == ".tsv" else rng.choice((",", ",", ",", ";"))
        quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC))
        if suffix == ".tsv" and rng.random() < 0.5:  # as most programs write them: no quotes at all
            end = rng.choice(("\n", "\r\n"))
            lines = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
            return end.join("\t".join(line) for line in lines).encode("utf-8", "surrogatepass")
        writer = csv.writer(out, delimiter=separator, quoting=quoting, lineterminator=rng.choice(("\n", "\r\n")))
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
    if rng.random() < 0.05:
        deep = nested(rng.choice((50, 990, 100_000)), rng.choice(("list", "object")))
        text = text.replace('"label": 1', '"label": ' + deep, 1)
    if rng.random() < 0.05:
        text = text.replace('"label": 1', rng.choice((
            '"label": 1, "label": 0', '"label": NaN', '"label": Infinity', '"label": 1e999', '"label": ' + "9" * 5000,
            '"label": 01', "'label': 1", '"label": 1,', '"label": 0.1e1', '"text": "other", "label": 1',
        )), 1)  # fmt: skip
    data = text.encode("utf-8", "surrogatepass")
    return gzip.compress(data, mtime=0) if suffix == ".jsonl.gz" else data


def _cell(value: Any) -> str:
    try:
        return "" if value is None else str(value)
    except ValueError:  # an integer of more than 4300 digits
        return "9" * 100


def mutate(rng: random.Random) -> tuple[str, str, bytes]:
    """(suffix, what was done, the bytes)."""
    suffix = rng.choice(SUFFIXES)
    data, said = written(rng, rows_of(rng), suffix), []
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        what, data = damage(rng, data)
        said.append(what)
    if rng.random() < 0.05:
        other = rng.choice(SUFFIXES)
        said.append(f"{suffix} named {other}")
        suffix = other
    return suffix, ", ".join(said) or "as written", data


# What plain parsers read.


class Unreadable(Exception):
    """A plain parser cannot read it."""


def references(suffix: str, data: bytes) -> list[list[dict[str, Any] | list[tuple[str, str]]]]:
    """The ways to read a file that are right; none: nothing but a DataError is."""
    try:
        if suffix == ".jsonl.gz":
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, ValueError, Exception):
        text = _other_encoding(data)
        if text is None:
            return []
    if suffix in (".csv", ".tsv"):
        return _tables(suffix, text)
    found: list[Any] = []
    for parse in (_lines, _list) if suffix == ".json" else (_lines,):
        try:
            found.append(parse(text))
        except (ValueError, RecursionError):
            continue
    return [rows for rows in found if rows and all(isinstance(row, dict) for row in rows)]


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
    found: list[Any] = []
    separator = "\t" if suffix == ".tsv" else ","
    ways: list[dict[str, Any]] = [{"strict": True}, {}]
    if suffix == ".tsv":
        ways.append({"quoting": csv.QUOTE_NONE, "quotechar": None})
    csv.field_size_limit(10**9)
    for way in ways:
        try:
            lines = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter=separator, **way) if line]
        except csv.Error:
            continue
        if suffix == ".tsv" and "quoting" not in way and any("\n" in cell for line in lines for cell in line):
            continue  # a stray quote that swallows lines
        if len(lines) < 2 or any(len(line) > len(lines[0]) for line in lines):
            continue
        width = len(lines[0])
        found.append([list(zip(lines[0], [*line, *[""] * (width - len(line))], strict=True)) for line in lines[1:]])
    return found


# Whether what was read is one of them.


def same_rows(found: list[dict[str, Any]], wanted: list[Any]) -> bool:
    return len(found) == len(wanted) and all(map(_same_row, found, wanted))


def _same_row(found: dict[str, Any], wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return _same_value(found, wanted)
    values = list(found.values())
    return len(values) == len(wanted) and all(
        _same_cell(value, cell) for value, (_, cell) in zip(values, wanted, strict=True)
    )


def _same_value(found: Any, wanted: Any) -> bool:
    """Missing keys are None; 1 and 1.0 are equal, True and 1 are not."""
    if isinstance(wanted, dict):
        if not isinstance(found, dict):
            return False
        return all(_same_value(found.get(key), wanted.get(key)) for key in found.keys() | wanted.keys())
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(_same_value, found, wanted))
    if isinstance(wanted, bool) or isinstance(found, bool):
        return found is wanted
    if isinstance(wanted, int | float) and isinstance(found, int | float):
        return found == wanted or (math.isnan(found) and math.isnan(wanted))
    return type(found) is type(wanted) and bool(found == wanted)


def _same_cell(found: Any, cell: str) -> bool:
    if found is None:
        return cell == ""
    if isinstance(found, bool):
        return str(found).lower() == cell.strip().lower()
    if isinstance(found, int):
        try:
            return int(cell) == found
        except ValueError:
            return False
    if isinstance(found, float):
        try:
            return float(cell) == found or math.isnan(found)
        except ValueError:
            return cell == "" and math.isnan(found)
    return bool(found == cell)


def run_case(seed: int, folder: Path) -> tuple[str, str]:
    """(what happened, what was done). Raises Wrong."""
    rng = random.Random(seed)
    suffix, said, data = mutate(rng)
    path = folder / f"rows{suffix}"
    path.write_bytes(data)
    said = f"{suffix}, {said}"
    try:
        found = [dict(row) for row in read_file(path)]
    except DataError:
        return ("refused" if not references(suffix, data) else "refused, though it can be read"), said
    except Exception as error:
        raise Wrong(f"{said}: read_file raised {type(error).__name__}: {str(error)[:300]}") from error
    ways = references(suffix, data)
    if not any(same_rows(found, wanted) for wanted in ways):
        shown = f"{len(found)} rows {str(found)[:200]}; the file says {str(ways[:1])[:200]}" if ways else str(found)[:300]
        raise Wrong(f"{said}: rows were changed in silence: {shown}")
    if rng.random() < 0.3:
        _check_task(path, found, said)
    return "read", said


def _check_task(path: Path, found: list[dict[str, Any]], said: str) -> None:
    """A task made of the file has its rows, or is refused."""
    kind = "text" if path.suffix != ".tsv" else "regression"
    try:
        task = load_files(kind, path, path)
    except FastgateError:
        return
    except Exception as error:
        raise Wrong(f"{said}: load_files raised {type(error).__name__}: {str(error)[:300]}") from error
    texts = task.train["text"][:]
    if len(texts) != len(found) or any(text != str(row["text"]) for text, row in zip(texts, found, strict=True)):
        raise Wrong(f"{said}: the task has other texts than the file")
