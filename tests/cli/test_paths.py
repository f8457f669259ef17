"""Whole paths by the command line: a BERT of twelve layers cut to two, a RoBERTa on a task of one's own."""

from __future__ import annotations

import copy
import csv
import json

import pytest
import torch
from helpers import tiny_models
from helpers.commands import run

import fastgate
from fastgate.benchmark.batches import choose_batches, evaluation_rows
from fastgate.benchmark.equivalence import check_outputs
from fastgate.benchmark.model_variants import unpruned
from fastgate.data import load_files, load_task
from fastgate.training import load_tokenizer, phases
from fastgate.training.targets import MaxDrop

pytestmark = pytest.mark.slow

QUICK = ["--epochs", 1, "--prune-epochs", 2, "--lr", 1e-3, "--batch-size", 16, "--max-length", 24]
QUEUES = ("billing", "delivery", "other")


@pytest.fixture
def trained(monkeypatch):
    """The models that were saved, as they were when they were."""
    models, save = [], phases.save

    def noting(model, *rest):
        models.append(copy.deepcopy(model).eval())
        return save(model, *rest)

    monkeypatch.setattr(phases, "save", noting)
    return models


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two models, and two tasks of the catalogue in files."""
    folder = tmp_path_factory.mktemp("paths")
    tiny_models.model_folder(folder / "bert", layers=12)
    tiny_models.roberta_folder(folder / "roberta")
    tiny_models.sentiment_folder(folder / "data")
    for split in ("train", "validation", "test"):
        tiny_models.write_rows(folder / "data" / "conll2003" / f"{split}.jsonl", tagged("ner_tags"))
    return folder


def tagged(column, count=48):
    """Sentences in which each word has one tag."""
    words, tags = ["she", "went", "to", "paris", "london"], ["O", "O", "O", "B-LOC", "B-LOC"]
    order = [[(i + j * j) % 5 for j in range(2 + i % 7)] for i in range(count)]
    return [{"tokens": [words[k] for k in row], column: [tags[k] for k in row]} for row in order]


def tickets(count):
    """Rows of a task that the catalogue does not have."""
    sentences = ("she was in paris, not london", "the story was very good", "a plot, two of three")
    return [
        {"subject": f"{sentences[i % 3]} {tiny_models.WORDS[i % 20]}", "queue": QUEUES[i % 3], "id": i}
        for i in range(count)
    ]


@torch.inference_mode()
def check_pruned(out, task, data, trained, layers, kept):
    """The checkpoint in `out`: as many layers kept, named everywhere, and the logits of what was trained and
    of Hugging Face without the attention of the others. data: options of `fastgate evaluate`."""
    result = json.loads((out / "result.json").read_text())
    chosen = result["pruned"]["kept"]
    assert len(chosen) == kept and result["pruned"]["layers"] == layers
    assert result["metric"] == task.metric and result["labels"] == list(task.labels)
    explained = json.loads(run("explain", out / "pruned", "--json").stdout)
    assert explained["kept"] == chosen and len(explained["layers"]) == layers
    assert [row["attention"] == "kept" for row in explained["layers"]] == [i in chosen for i in range(layers)]
    assert f"attention kept in {chosen} of {layers} layers" in run("explain", out / "pruned").stdout
    model, tokenizer = fastgate.load(out / "pruned"), load_tokenizer(out / "pruned", task)
    rows = evaluation_rows(task, tokenizer, 24)
    batches = choose_batches(rows, tokenizer, batch_size=16, count=2, order="data")
    (before,) = (one for one in trained if fastgate.explain(one).kept == tuple(chosen))
    for batch in batches:
        assert torch.equal(model(**batch).logits, before(**batch).logits)
    assert check_outputs(model, unpruned(model), batches) < 1e-5
    printed = json.loads(run("evaluate", out / "pruned", *data, "--max-length", 24, "--json").stdout)
    assert printed["scores"] == pytest.approx(result["pruned"]["scores"])
    assert printed["rows"] == result["rows"]["evaluation"] == len(rows)


@pytest.mark.parametrize("name", ["sst2", "conll2003"])
def test_a_bert_of_twelve_layers_keeps_two(name, world, tmp_path, trained):
    data = ["--task", name, "--data-dir", world / "data"]
    out = tmp_path / "out"
    shown = run(
        "finetune", "--model", world / "bert", *data, "--target-sparsity", 0.83, *QUICK, "--out", out
    ).stdout
    assert "attention kept in" in shown and "of 12 layers" in shown
    check_pruned(out, load_task(name, world / "data"), data, trained, layers=12, kept=2)


def test_a_bert_of_twelve_layers_within_a_budget(world, tmp_path, trained):
    data = ["--task", "sst2", "--data-dir", world / "data"]
    out = tmp_path / "out"
    run("finetune", "--model", world / "bert", *data, "--max-drop", 0.99, *QUICK, "--out", out)
    result = json.loads((out / "result.json").read_text())
    attempts, floor = result["pruned"]["attempts"], MaxDrop(0.99).lowest_score(result["dense"]["held_out"])
    assert "6" in attempts
    cut = max([int(removed) for removed, score in attempts.items() if score >= floor], default=0)
    check_pruned(out, load_task("sst2", world / "data"), data, trained, layers=12, kept=12 - cut)


def test_the_head_of_a_roberta_has_no_pooler(world, tmp_path):
    data = ["--task", "sst2", "--data-dir", world / "data", "--pooling", "mean", *QUICK]
    message = run("finetune", "--model", world / "roberta", *data, "--out", tmp_path / "out", code=1).stderr
    assert '"mean" for a RobertaForSequenceClassification' in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def as_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


OWN = {  # kind -> (training rows, rows to score on, how a file is written, its ending, columns, label column)
    "text": (tickets(48), tickets(24), as_csv, "csv", ["subject"], "queue"),
    "tokens": (tagged("pos", 48), tagged("pos", 24), tiny_models.write_rows, "jsonl", ["tokens"], "pos"),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_roberta_on_a_task_of_ones_own_by_one_command(kind, world, tmp_path, trained):
    """Two files are all it takes."""
    train, validation, write, ending, columns, label = OWN[kind]
    train, validation = (
        write(tmp_path / f"{name}.{ending}", rows)
        for name, rows in (("train", train), ("validation", validation))
    )
    data = ["--task-type", kind, "--columns", *columns, "--label-column", label, "--validation", validation]
    out = tmp_path / "out"
    target = ["--target-sparsity", 0.5, *QUICK, "--out", out]
    run("finetune", "--model", world / "roberta", *data, "--train", train, *target)
    task = load_files(kind, train, validation, columns=columns, target=label)
    assert task.labels == (QUEUES if kind == "text" else ("B-LOC", "O"))
    check_pruned(out, task, data, trained, layers=4, kept=2)
    saved = json.loads((out / "pruned" / "fastgate.json").read_text())["class"]
    assert saved == f"RobertaFor{'Sequence' if kind == 'text' else 'Token'}Classification"
