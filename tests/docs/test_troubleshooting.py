"""Every message that docs/troubleshooting.md quotes is one that the source writes."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
VARIABLE = "…"  # what a quoted message has in place of a value
FORM = re.compile(r"(.+?): (.+?): got (.+?), wanted (.+?); (.+)")  # fastgate.errors.format_error
SHORTEST = 4  # characters of a literal that a message may be composed of


@cache
def literals() -> frozenset[str]:
    """Every constant in the source: whole strings, the fixed parts of f-strings, and None, True and so on."""
    found = set()
    for path in (ROOT / "fastgate").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant):
                found.add(str(node.value))
    return frozenset(found)


def is_written(text: str) -> bool:
    """Whether `text` is a literal of the source, or several of them one after another."""
    if text in literals():
        return True
    return any(
        text[:end] in literals() and is_written(text[end:]) for end in range(SHORTEST, len(text) - SHORTEST)
    )


def unknown_parts(message: str) -> list[str]:
    """The fixed parts of a quoted message that the source does not have."""
    form = FORM.fullmatch(message)
    fields = form.groups() if form else (message,)
    parts = [part for field in fields for part in field.split(VARIABLE) if part]
    return [part for part in parts if not is_written(part)]


def entries() -> dict[str, str]:
    """The phrase in a heading -> the message quoted below it."""
    text = PAGE.read_text(encoding="utf-8")
    return dict(re.findall(r"^### (.+)\n\n```text\n(.+)\n```$", text, re.MULTILINE))


@pytest.mark.parametrize("heading", entries())
def test_message_is_in_the_source(heading: str) -> None:
    assert unknown_parts(entries()[heading]) == []


@pytest.mark.parametrize("heading", entries())
def test_heading_quotes_the_message(heading: str) -> None:
    phrases = re.findall("`([^`]+)`", heading)
    assert phrases and any(phrase in entries()[heading] for phrase in phrases)


def test_page_has_every_quote_under_a_heading() -> None:
    quotes = PAGE.read_text(encoding="utf-8").count("```text") - 1  # one shows the form
    assert len(entries()) == quotes >= 25


def test_other_message_is_noticed() -> None:
    message = next(message for message in entries().values() if FORM.fullmatch(message))
    assert unknown_parts(message.replace(", wanted ", ", wanted rather ")) != []
    assert unknown_parts("freeze: model: got a model, wanted one that is warm; heat it") != []
