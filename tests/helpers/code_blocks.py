"""The fenced code blocks of a Markdown page, and a run of its Python blocks that checks what they print."""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)
_EXPECTED = "#> "


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block. words: what follows the language, `gpu` in `{.python .gpu}`. line: its first."""

    language: str
    words: tuple[str, ...]
    line: int
    text: str


def blocks_of(page: Path) -> list[CodeBlock]:
    """The fenced blocks of a page, in order."""
    source, blocks = page.read_text(), []
    for match in _FENCE.finditer(source):
        language, *words = match["info"].strip(" {}").replace(".", " ").split() or [""]
        line = source.count("\n", 0, match.start("body")) + 1
        blocks.append(CodeBlock(language, tuple(words), line, textwrap.dedent(match["body"])))
    return blocks


def run_python(page: Path, block: CodeBlock, namespace: dict[str, object]) -> None:
    """Run a block in `namespace`. What it prints must be what its comments `#> ...` say, if it has any."""
    printed = io.StringIO()
    padding = "\n" * (block.line - 1)  # tracebacks name the line of the page
    with contextlib.redirect_stdout(printed):
        exec(compile(padding + block.text, str(page), "exec"), namespace)
    lines = block.text.splitlines()
    expected = [line.strip()[len(_EXPECTED) :] for line in lines if line.strip().startswith(_EXPECTED)]
    if expected:
        # The Trainer prints its logs, dicts, between what the block prints.
        own = [line for line in printed.getvalue().splitlines() if line and not line.startswith("{")]
        assert own == expected, f"{page}:{block.line}: printed {own}, and the page says {expected}"
