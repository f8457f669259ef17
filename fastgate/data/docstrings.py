"""The demo's corpus: docstrings of the installed packages, classified by the package they come from."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastgate.data.task import Task
from fastgate.errors import DataError, format_error

# Packages that fastgate's own dependencies bring along, with the words that give each away: its names, and
# those it is imported under. Every such word is masked in every text.
PACKAGES: dict[str, tuple[str, ...]] = {
    "matplotlib": ("matplotlib", "mpl", "pyplot", "plt", "mpl_toolkits"),
    "networkx": ("networkx", "nx"),
    "numpy": ("numpy", "np"),
    "pandas": ("pandas", "pd"),
    "scipy": ("scipy", "sp"),
    "sklearn": ("sklearn", "scikit", "scikit-learn"),
    "sympy": ("sympy",),
    "torch": ("torch", "pytorch", "aten", "nn", "torchvision", "libtorch"),
    "transformers": ("transformers", "huggingface", "hugging", "hf"),
}
MASK = "this"
MIN_WORDS, MAX_WORDS = 12, 24
VALIDATION_SHARE = 0.2
_SKIPPED_FOLDERS = {"tests", "testing", "_vendor", "vendor", "externals", "_vendored", "third_party"}


class Docstring(NamedTuple):
    """One text, the package it comes from, and the module file it is in (relative to site-packages)."""

    text: str
    package: str
    module: str


def _number(text: str) -> int:
    """A number that is the same on every machine, for orders and splits without a random generator."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _module_files(package: str) -> list[tuple[Path, str]]:
    """The package's .py files without its tests and without code it carries for others; nothing is
    imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(next(iter(spec.submodule_search_locations)))
    files = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not _SKIPPED_FOLDERS & set(inside.parts) and not inside.name.startswith(("test_", "conftest")):
            files.append((path, f"{package}/{inside.as_posix()}"))
    return files


def _read(path: Path) -> Iterator[str]:
    """Docstrings of a file's module, classes and functions, cleaned of their indentation."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    waiting: list[ast.AST] = [tree]
    while waiting:  # statements only: an expression has no docstring
        node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield inspect.cleandoc(text)
        waiting += reversed(getattr(node, "body", ()))


_NAMES = "|".join(
    sorted((re.escape(word) for words in PACKAGES.values() for word in words), key=len, reverse=True)
)
# A name with everything that hangs on it by dots: `np.linalg.norm`, `torch.nn.Module`.
_GIVEAWAY = re.compile(rf"(?<![A-Za-z0-9])(?:{_NAMES})(?:[-_]\w+)*(?:\.\w+)*(?![A-Za-z0-9])", re.IGNORECASE)
_MARKUP = re.compile(r":\w+(?::\w+)*:|[`*~#|=_\-]{2,}|`|>>>|<[^>\n]{1,80}>")
_LINK = re.compile(r"\bhttps?://\S+")


def clean(text: str) -> str:
    """The first MAX_WORDS words of a docstring without markup, links and the names of the packages."""
    text = _LINK.sub(" ", text.split(">>>")[0])
    text = _MARKUP.sub(" ", text)
    text = _GIVEAWAY.sub(MASK, text)
    return " ".join(text.split()[:MAX_WORDS])


def _shape(text: str) -> str:
    """The text without identifiers and digits: templates filled in for one class after another become
    equal."""
    words = re.findall(r"[A-Za-z]\w*", text)
    return " ".join(w.lower() for w in words if w[1:].islower() or len(w) == 1)


def biggest(count: int, packages: Sequence[str] = tuple(PACKAGES)) -> tuple[str, ...]:
    """The `count` installed packages with the most source text, in alphabetical order."""
    sizes = {package: sum(path.stat().st_size for path, _ in _module_files(package)) for package in packages}
    return tuple(sorted(sorted(sizes, key=lambda package: (-sizes[package], package))[:count]))


def _split(module: str) -> str:
    return "validation" if _number(module) % 1000 < 1000 * VALIDATION_SHARE else "train"


def collect(packages: Sequence[str], wanted: Mapping[str, int]) -> dict[str, list[Docstring]]:
    """At most `wanted[split]` docstrings of each package, each text (and template) once in all splits.

    Module files are read in an order drawn by their names, each wholly for one split, until there are enough,
    so train and validation never share a file. A text that is in two packages is dropped from both.
    """
    first: dict[str, Docstring] = {}
    shared: set[str] = set()
    for package in packages:
        missing = dict(wanted)
        for path, module in sorted(_module_files(package), key=lambda file: _number(file[1])):
            split = _split(module)
            if missing.get(split, 0) <= 0:
                continue
            for raw in _read(path):
                text = clean(raw)
                shape = _shape(text)
                if len(text.split()) < MIN_WORDS:
                    continue
                if shape not in first:
                    first[shape] = Docstring(text, package, module)
                    missing[split] -= 1
                elif first[shape].package != package:
                    shared.add(shape)
            if not any(count > 0 for count in missing.values()):
                break
    chosen: dict[str, list[Docstring]] = {split: [] for split in wanted}
    counts: Counter[tuple[str, str]] = Counter()
    for shape, item in first.items():
        group = (_split(item.module), item.package)
        if shape not in shared and counts[group] < wanted[group[0]]:
            counts[group] += 1
            chosen[group[0]].append(item)
    return chosen


def docstring_task(classes: int = 6, train_rows: int = 2700, validation_rows: int = 1200) -> Task:
    """The corpus as a task: the biggest `classes` packages, the same number of rows from each.

    The same installed versions give the same rows in the same order. Raises DataError where fewer than two
    packages have enough docstrings.
    """
    import datasets

    labels = biggest(classes)
    docstrings = collect(labels, {"train": train_rows // classes, "validation": validation_rows // classes})
    splits = {}
    for split, items in docstrings.items():
        count = Counter(item.package for item in items)
        share = min(count[package] for package in labels) if labels else 0
        if len(labels) < 2 or share == 0:
            got = ", ".join(f"{package}: {count[package]}" for package in labels) or "none"
            remedy = "install fastgate with its dependencies, whose sources are the corpus"
            wanted = "two packages or more with docstrings"
            raise DataError(format_error("docstring_task", f"{split} docstrings", got, wanted, remedy))
        counts: Counter[str] = Counter()
        rows: dict[str, list[Any]] = {"text": [], "label": []}
        for item in sorted(items, key=lambda item: _number(item.text)):
            counts[item.package] += 1
            if counts[item.package] <= share:
                rows["text"].append(item.text)
                rows["label"].append(labels.index(item.package))
        splits[split] = datasets.Dataset.from_dict(rows)
    return Task("docstrings", "text", splits, labels, "accuracy", ("validation",), ("text", "label"))
