"""Lists of words or tags: as they are, or out of the text that a table keeps them as."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from fastgate.data.formats import refuse

# A flat Python list of texts and numbers. Items without a comma between them do not fit: Python would join
# two texts into one, which is how NumPy writes arrays.
_ITEM = r"""(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|-?[0-9]+(?:\.[0-9]+)?)"""
_PYTHON_LIST = re.compile(rf"\[\s*(?:{_ITEM}\s*(?:,\s*{_ITEM}\s*)*,?\s*)?\]")
_BRACKETED = re.compile(r"[\[({]\s*['\"]|\[.*\]$|\(.*\)$|\w+\(\[", re.DOTALL)
_SEPARATED = re.compile(r"[\w'\"][,;]|^'.+'$")  # several tags, or a piece of a list
_IN_PARENTHESES = re.compile(r"\([^()]*\)")  # where tags such as N(soort,ev) hold commas


def words_of(value: Any, where: str, place: str) -> list[Any]:
    """The list that `value` is or stands for: a JSON list, a Python list, or words separated by blanks.

    Raises DataError for text that looks like a list and is none, such as NumPy's `['EU' 'rejects']`, and for
    anything else.
    """
    if isinstance(value, list | tuple):
        return list(value)
    if value is None:
        return []
    if not isinstance(value, str):
        return refuse(
            where, place, f"a {type(value).__name__}", "a list", "write a list of words and one of tags"
        )
    text = value.strip()
    listed = _listed(text)
    if listed is not None:
        return listed
    words = text.split()
    stand_alone = len(words) > 1 and words[0] in ("[", "(") and words[-1] in ("]", ")")  # brackets as words
    if _BRACKETED.match(text) and not stand_alone:
        remedy = "write a JSON list (json.dumps), or the words separated by blanks"
        refuse(where, place, f"{text[:60]!r}, which is no complete list", "a list of words or tags", remedy)
    return words


def tags_of(value: Any, where: str, place: str) -> list[Any]:
    """As `words_of`. Raises DataError also for text with commas or semicolons between the tags."""
    tags = words_of(value, where, place)
    if isinstance(value, str) and _listed(value.strip()) is None:
        for tag in tags:
            if _SEPARATED.search(_IN_PARENTHESES.sub("", tag)):
                remedy = "write a JSON list (json.dumps), or the words and the tags separated by blanks"
                refuse(where, place, repr(value.strip()[:60]), "tags separated by blanks, or a list", remedy)
    return tags


def _listed(text: str) -> list[Any] | None:
    if not text.startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if not _PYTHON_LIST.fullmatch(text):
            return None
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, list) else None
