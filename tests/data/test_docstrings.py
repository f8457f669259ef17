"""The demo's corpus: masked names, no file in both splits, equal classes, the same rows every time."""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from fastgate.data import docstrings
from fastgate.data.docstrings import MASK, clean, collect, docstring_task
from fastgate.errors import DataError


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Like np.linalg.norm but for a torch.nn.Module.", f"Like {MASK} but for a {MASK}."),
        ("NumPy arrays; PyTorch's tensors; pandas-like", f"{MASK} arrays; {MASK}'s tensors; {MASK}"),
        ("See :class:`~sklearn.svm.SVC`, ``scikit-learn`` docs", f"See {MASK} , {MASK} docs"),
        ("input snp and nph stay", "input snp and nph stay"),
        ("Read https://numpy.org/doc now\n-----\n>>> np.ones(3)", "Read now"),
        (" ".join(str(i) for i in range(99)), " ".join(str(i) for i in range(docstrings.MAX_WORDS))),
    ],
)
def test_names_markup_and_examples_are_taken_out(text, expected):
    assert clean(text) == expected


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages of made-up docstrings, importing either of which would fail."""
    subjects = {"alpha": "grows vines over an old garden wall", "beta": "counts coins in a very deep cellar"}
    for package, subject in subjects.items():
        for m in range(30):
            folder = tmp_path / package / ("tests" if m == 29 else f"part{m % 3}")
            folder.mkdir(parents=True, exist_ok=True)
            lines = ["raise SystemExit('imported')"]
            for f in range(4):
                word = f"{chr(97 + m % 26)}{chr(97 + f)}x{'y' * (m // 26)}"
                lines += [f"def f{f}():", f'    """The {word} {subject} all day and through the night."""']
            shared = "Words that stand in both packages, so in neither of the two for certain."
            lines += ["class Shared:", f'    """{shared}"""']
            (folder / f"mod{m}.py").write_text("\n".join(lines))
        (tmp_path / package / "broken.py").write_text("def (:\n")
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(docstrings, "PACKAGES", {"alpha": ("alpha",), "beta": ("beta",)})
    return tuple(subjects)


def test_files_are_read_without_importing_and_never_shared_between_splits(packages):
    docstrings = collect(packages, {"train": 1000, "validation": 1000})
    assert not set(packages) & set(sys.modules)
    modules = {split: {item.module for item in items} for split, items in docstrings.items()}
    assert modules["train"] and modules["validation"] and not modules["train"] & modules["validation"]
    texts = [item.text for items in docstrings.values() for item in items]
    assert len(texts) == len(set(texts)) == 2 * 29 * 4
    assert not any("both packages" in text for text in texts)
    assert not any("/tests/" in module for split in modules.values() for module in split)


def test_templates_count_once():
    shapes = {
        docstrings._shape(f"Builds a {name} layer from {i} heads.")
        for i, name in enumerate(["BertX", "GPT_2"])
    }
    assert shapes == {"builds a layer from heads"}


def test_classes_are_equal_and_rows_repeat_exactly(packages, monkeypatch):
    biggest = docstrings.biggest
    monkeypatch.setattr(docstrings, "biggest", lambda count: biggest(count, packages))
    first, second = (docstring_task(2, 40, 20) for _ in range(2))
    assert first.labels == ("alpha", "beta") and first.evaluate_on == ("validation",)
    assert Counter(first.train["label"][:]) == {0: 20, 1: 20}
    assert Counter(first.evaluation["label"][:]) == {0: 10, 1: 10}
    assert first.train["text"][:] == second.train["text"][:]
    mixed = first.train["label"][:]
    assert mixed != sorted(mixed)
    assert all(("garden" in t) == (label == 0) for t, label in zip(first.train["text"], mixed, strict=True))
    assert len(docstring_task(2, 10_000, 10_000).train) < 10_000


def test_too_few_packages_are_refused(packages, monkeypatch):
    monkeypatch.setattr(docstrings, "biggest", lambda count: ("alpha",))
    with pytest.raises(DataError, match="two packages or more"):
        docstring_task(1, 10, 10)


def test_the_installed_packages_make_a_task():
    task = docstring_task(classes=4, train_rows=80, validation_rows=40)
    assert len(task.labels) == 4 and set(task.labels) <= set(docstrings.PACKAGES)
    assert Counter(task.train["label"][:]) == dict.fromkeys(range(4), 20)
    words = {word.lower() for text in task.train["text"] for word in text.replace(".", " ").split()}
    assert not words & {
        "numpy",
        "np",
        "torch",
        "pandas",
        "scipy",
        "sklearn",
        "matplotlib",
        "sympy",
        "transformers",
    }
