"""Every code block of README.md and docs/ runs and prints what the page says.

The Python blocks of a page share one namespace. `{.python .gpu}` needs a CUDA device. `{.python .hub}` gets
its rows from here. The commands of a page run on small random models and rows in place of the hub's. `sh`
blocks and those without a language install, build, test or measure: they are not run here.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from helpers.code_blocks import blocks_of, run_python
from helpers.commands import run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "bash", "mermaid", "sh", "text", ""}
QUICK = ("--epochs", "1", "--prune-epochs", "2", "--lr", "1e-3", "--batch-size", "16", "--max-length", "24")


def pages_with(language):
    pages = [page for page in PAGES if any(block.language == language for block in blocks_of(page))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_has_a_language_that_is_tested(page):
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}: {block.language}"
        if not block.language:
            assert "fastgate." not in block.text, f"{page}:{block.line}: Python without a language"


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("python"))
def test_python(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    hub(monkeypatch)
    namespace: dict[str, object] = {}
    for block in blocks_of(page):
        if block.language == "python" and ("gpu" not in block.words or torch.cuda.is_available()):
            run_python(page, block, namespace)


def hub(monkeypatch):
    """`load_dataset` of the hub gives rows of ours."""
    import datasets

    words = {"good": 1, "great": 1, "superb": 1, "bad": 0, "awful": 0, "boring": 0}
    rows = [
        {"sentence": f"The {x} was {w}.", "label": y}
        for x in ("film", "plot", "cast")
        for w, y in words.items()
    ]
    splits = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name in ("train", "validation")}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: splits)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models and rows in the place of the hub's, and a finished run."""
    folder = tmp_path_factory.mktemp("pages")
    tiny_models.model_folder(folder / "bert")
    tiny_models.roberta_folder(folder / "roberta")
    tiny_models.sentiment_folder(folder / "data")
    words = ["she", "went", "to", "paris", "london"]
    tags = [["O", "O", "O", "B-location", "B-location"][i % 5] for i in range(5)]
    for split in ("train", "validation", "test"):
        rows = [{"tokens": words[: 2 + i % 4], "ner_tags": tags[: 2 + i % 4]} for i in range(48)]
        tiny_models.write_rows(folder / "data" / "wnut17" / f"{split}.jsonl", rows)
        rows = [{"text": row["sentence"], "label": row["label"]} for row in tiny_models.sentiment(48)]
        tiny_models.write_rows(folder / f"{split}.jsonl", rows)
    return folder


def on_small_models(line, world):
    """The arguments of a command of a page, on models and rows of ours."""
    names = {"bert-base-uncased": world / "bert", "roberta-base": world / "roberta"}
    arguments = [str(names.get(word, word)) for word in shlex.split(line)[1:]]
    arguments = [
        str(world / word) if re.fullmatch(r"(train|validation)\.jsonl", word) else word for word in arguments
    ]
    if "--task" in arguments:
        arguments += ["--data-dir", str(world / "data")]
    return [*arguments, *QUICK] if arguments[0] == "finetune" else arguments


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands(page, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        line for block in blocks_of(page) if block.language == "bash" for line in block.text.splitlines()
    ]
    if not any("--out run" in line for line in lines):
        run(*on_small_models("fastgate finetune --model bert-base-uncased --task sst2 --out run", world))
    for line in lines:
        assert line.startswith("fastgate "), f"{page}: {line}"
        run(*on_small_models(line, world))
