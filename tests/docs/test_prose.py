"""Sentences that users read have at most 30 words, and the README has at most 900 words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST_SENTENCE = 30  # words
LONGEST_README = 900  # words
FOLDERS = ("docs", "docs/guides", "docs/concepts")
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md")))]

# What is no prose, and what stands in its place.
NO_PROSE = (
    (r"(?ms)^( *)(```+|~~~+).*?^\1\2 *$", ""),  # fenced code
    (r"(?ms)^ *\$\$.*?\$\$ *$", ""),  # formulas
    (r"(?s)<!--.*?-->", ""),
    (r"(?m)^ *\|.*$", ""),  # tables
    (r"(?m)^#.*$", ""),  # headings
    (r"(?m)^ *(!!!|\?\?\?|===|---).*$", ""),  # titles of admonitions and tabs, front matter
    (r"!?\[([^\]]*)\]\([^)]*\)", r"\1"),  # links and images: their text stays
    (r"`[^`]*`", "code"),
    (r"\$[^$\n]+\$", "formula"),
    (r"</?\w[^>]*>", ""),  # HTML
    (r"(?m)^ *([-*+]|\d+\.) ", "\n\n"),  # list items end what is before them
)
# A sentence ends with its paragraph, or with a mark that a blank follows.
END = re.compile(r"\n\s*\n|(?<=[.:;?!])[\"')*_]*\s+")


def sentences(markdown: str) -> list[str]:
    """The sentences of a page: one line each, with a word in place of code and formulas."""
    for pattern, replacement in NO_PROSE:
        markdown = re.sub(pattern, replacement, markdown)
    return [" ".join(part.split()) for part in END.split(markdown) if part.strip()]


def words(sentence: str) -> int:
    return sum(any(character.isalnum() for character in word) for word in sentence.split())


def too_long(markdown: str) -> list[str]:
    """The sentences of a page that are too long, each with its number of words."""
    counted = [(words(sentence), sentence) for sentence in sentences(markdown)]
    return [f"{count} words: {sentence}" for count, sentence in counted if count > LONGEST_SENTENCE]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short(page: Path) -> None:
    assert too_long(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_has_pages(folder: str) -> None:
    assert any(page.parent == ROOT / folder for page in PAGES)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= LONGEST_README


EXAMPLE = """\
# A heading of a page, which is no sentence

First sentence. Second one: with
two lines; and [a link](https://example.org/a.b) and `some.code(1)`!

- an item
- another item, with $a. b$ in it
    1. and one inside

| a table | is no. sentence |
| --- | --- |

```python
x = 1  # neither. is this
```

=== "A tab"

    Text in a tab. <br>Last one
"""


def test_page_is_split_into_sentences() -> None:
    assert sentences(EXAMPLE) == [
        "First sentence.",
        "Second one:",
        "with two lines;",
        "and a link and code!",
        "an item",
        "another item, with formula in it",
        "and one inside",
        "Text in a tab.",
        "Last one",
    ]


def test_long_sentence_is_noticed() -> None:
    longest = " ".join(["word"] * LONGEST_SENTENCE)
    assert too_long(f"Short. {longest}. Short.") == []
    assert too_long(f"Short. {longest} more. Short.") == [f"31 words: {longest} more."]
    assert len(too_long(f"- {longest}\n  more\n- {longest}\n- Short.")) == 1
    assert too_long(f"| {longest} more |\n\n```\n{longest} more\n```") == []
