"""Classes: what labels of any type are called, and which id each has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from fastgate.data.catalog import Spec
from fastgate.data.files import Table
from fastgate.data.formats import refuse

_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]{0,17}))(?:\.0)?")
_FRACTION = re.compile(r"[-+]?[0-9]*\.[0-9]+(?:[eE][-+]?[0-9]+)?")
_MISSING_VALUES = ("nan", "na", "n/a", "null", "none", "inf", "-inf")  # among numbers
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which no file can hold


def class_key(value: Any) -> str | None:
    """The name of a label's class, None for what is no label.

    A whole number has one name however it is written: 1, 1.0, "1", "1.0". Other text is itself: `01` and
    `1e0` are no numbers.
    """
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    if isinstance(value, int):  # True is "True"
        return str(value)
    if isinstance(value, str) and not _HALF_CHARACTER.search(value):
        return _canonical(value)
    return None


def class_keys(rows: Table, column: str, values: Sequence[Any], numbers: Sequence[int]) -> list[str]:
    """The class of each label, by name. numbers: the row number of each label.

    Raises DataError for what is no label, and for a column of scores or of numbers with missing values.
    """
    keys: list[str] = []
    for value, number in zip(values, numbers, strict=True):
        key = class_key(value)
        if key is None:
            got = value if isinstance(value, float) else f"a {type(value).__name__}"
            _refuse_label(rows, column, number, got)
        else:
            keys.append(key)
    booleans = [isinstance(value, bool) for value in values]
    if any(booleans) and not all(booleans):
        _refuse_label(
            rows, column, numbers[booleans.index(not booleans[0])], "true or false among other labels"
        )
    distinct = set(keys)
    words = {key for key in distinct if not _is_whole(key)}
    scores = {key for key in words if _FRACTION.fullmatch(key)}
    odd = scores | {key for key in words if key.lower() in _MISSING_VALUES}
    if odd and odd == words and (scores or words != distinct):
        place = next(place for place, key in enumerate(keys) if key in odd)
        _refuse_label(rows, column, numbers[place], repr(keys[place])[:80])
    return keys


def _refuse_label(rows: Table, column: str, number: int, got: object) -> NoReturn:
    remedy = "name the label column, fill the gap, or choose --task-type regression for numbers"
    refuse(rows.where, rows.place(column, number), got, "a class (text or whole number)", remedy)


def _canonical(name: str) -> str:
    whole = _WHOLE.fullmatch(name)
    return whole[1] if whole else name


def _is_whole(key: str) -> bool:
    return _WHOLE.fullmatch(key) is not None


def _order(key: str) -> tuple[bool, int, str]:
    """Numbers by their value and before words."""
    return (False, int(key), "") if _is_whole(key) else (True, 0, key)


@dataclass(frozen=True)
class Classes:
    """names: in the order of the ids. ids: the id of every label that the data may have."""

    names: tuple[str, ...]
    ids: dict[str, int]

    @classmethod
    def of(cls, used: dict[str, Table], keys: dict[str, list[str]], spec: Spec) -> Classes:
        """From the data set's own names, else from those of `spec`, else from the labels of the first split.

        Where names are given, labels that are all whole numbers are ids, unless a name is itself a number.
        """
        first = next(iter(used.values()))
        fixed = [rows.classes.get(spec.target, ()) for rows in used.values()]
        if fixed[0]:
            if len(set(fixed)) > 1:
                got, remedy = "splits whose classes differ", "use splits of one data set"
                refuse(first.where, f"column {spec.target}", got, "the same classes in each", remedy)
            return cls(fixed[0], {str(i): i for i in range(len(fixed[0]))})
        if spec.labels:
            seen = {key for split_keys in keys.values() for key in split_keys}
            by_name = {_canonical(name): i for i, name in enumerate(spec.labels)}
            if all(map(_is_whole, seen)) and not any(map(_is_whole, spec.labels)):
                return cls(spec.labels, {str(i): i for i in range(len(spec.labels))})
            if spec.named or seen & by_name.keys():
                return cls(spec.labels, by_name)
        return cls._of_rows(first, sorted(set(next(iter(keys.values()))), key=_order), spec)

    @classmethod
    def _of_rows(cls, rows: Table, seen: list[str], spec: Spec) -> Classes:
        place = f"column {spec.target}"
        if len(seen) < 2:
            refuse(
                rows.where,
                place,
                f"one label only ({seen[0]!r})",
                "two or more",
                "add rows of the other classes",
            )
        bare: dict[str, str] = {}
        for key in seen:
            other = bare.setdefault(key.strip(), key)
            if other != key:
                got = f"{other!r} and {key!r}, which differ in blanks only"
                refuse(
                    rows.where, place, got, "one spelling for each class", "remove the blanks around labels"
                )
        return cls(tuple(seen), {key: i for i, key in enumerate(seen)})

    def id(self, key: str, rows: Table, column: str, number: int) -> int:
        """The id of a label, of row `number`; DataError for an unknown one."""
        if key not in self.ids:
            known = [*self.ids][:20] if [*self.ids] == [*self.names] else self._with_names()
            wanted = f"a known label ({', '.join(known)}{', ...' if len(self.ids) > 20 else ''})"
            remedy = "correct it, or add training rows of that class"
            refuse(rows.where, rows.place(column, number), repr(key)[:80], wanted, remedy)
        return self.ids[key]

    def _with_names(self) -> list[str]:
        return [f"{i} for {name}" for i, name in enumerate(self.names)][:20]
