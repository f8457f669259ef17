"""MaxDrop, the budget of score: the search, the rows held out, a run."""

from __future__ import annotations

import json

import datasets
import pytest
from helpers import tiny_models
from helpers.commands import run

import fastgate
from fastgate.errors import ArgumentError, DataError
from fastgate.training.max_drop import hold_out, most_removable
from fastgate.training.targets import MaxDrop

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("layers", [1, 2, 3, 6, 12, 24])
def test_the_search_finds_the_most_that_can_be_removed(layers):
    for true in range(layers):
        tried = []

        def attempt(removed, true=true, tried=tried):
            tried.append(removed)
            return 1.0 if removed <= true else 0.0

        assert most_removable(layers, 0.5, attempt) == true
        assert len(tried) == len(set(tried)) <= layers.bit_length() and layers not in tried


def test_a_budget_is_a_share_of_the_score():
    assert MaxDrop(0.02).lowest_score(0.5) == pytest.approx(0.49)
    assert MaxDrop(0.02).lowest_score(-0.5) == pytest.approx(-0.51)  # a correlation may be below 0
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ArgumentError, match="MaxDrop: share: got"):
            MaxDrop(share)


def test_rows_are_held_out_by_the_seed_and_documents_whole():
    rows = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"x": list(range(50))})})
    splits = hold_out(rows, 0)
    assert len(splits["held_out"]) == 5 and sorted(
        splits["train"]["x"][:] + splits["held_out"]["x"][:]
    ) == list(range(50))
    assert (
        hold_out(rows, 0)["held_out"]["x"][:]
        == splits["held_out"]["x"][:]
        != hold_out(rows, 1)["held_out"]["x"][:]
    )
    windows = {"x": list(range(60)), "document": [i // 3 for i in range(60)]}
    splits = hold_out(datasets.DatasetDict({"train": datasets.Dataset.from_dict(windows)}), 0)
    assert not set(splits["train"]["document"][:]) & set(splits["held_out"]["document"][:])
    assert len(splits["held_out"]) == 6
    with pytest.raises(DataError, match="MaxDrop: train: got 19 training rows"):
        hold_out(datasets.DatasetDict({"train": datasets.Dataset.from_dict({"x": [0] * 19})}), 0)


@pytest.mark.parametrize("drop, kept", [(0.99, 1), (1e-9, None)])
def test_finetune_within_a_budget(tmp_path, drop, kept):
    tiny_models.model_folder(tmp_path / "model")
    for split in ("train", "validation"):
        tiny_models.write_rows(tmp_path / "data" / "sst2" / f"{split}.jsonl", tiny_models.sentiment(64))
    command = [
        "finetune", "--model", tmp_path / "model", "--task", "sst2", "--data-dir", tmp_path / "data",
        "--epochs", 1, "--prune-epochs", 1, "--max-length", 24, "--batch-size", 16,
        "--max-drop", drop, "--out", tmp_path / "out",
    ]  # fmt: skip
    run(*command)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    pruned = result["pruned"]
    if kept is not None:
        assert len(pruned["kept"]) == kept and set(pruned["attempts"]) == {"1", "2"}
    floor = MaxDrop(drop).lowest_score(result["dense"]["held_out"])
    best = max([int(removed) for removed, score in pruned["attempts"].items() if score >= floor], default=0)
    assert len(pruned["kept"]) == 3 - best
    assert fastgate.explain(fastgate.load(tmp_path / "out" / "pruned")).kept == tuple(pruned["kept"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "dense", "pruned", "result.json", "run.json", "history.json",
    }  # fmt: skip
    message = run(*command[:-1], tmp_path / "other", "--target-sparsity", 0.5, code=1).stderr
    assert "got --target-sparsity and --max-drop, wanted one of" in " ".join(message.split())
