"""Tasks: what is read, what is refused and with which words, how words meet sub-words, how scores are
counted."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny_models
from transformers import EvalPrediction

from fastgate.data import load_files, load_task, metrics
from fastgate.data.catalog import CATALOG, hub_config
from fastgate.errors import ArgumentError, DataError
from fastgate.training import dense_model, load_tokenizer
from fastgate.training.evaluate import collator_of, score


def text_rows(*labels):
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


@pytest.fixture
def files(tmp_path):
    """files(train_rows, validation_rows) -> two paths."""

    def write(train, validation):
        return tiny_models.write_rows(tmp_path / "t.jsonl", train), tiny_models.write_rows(
            tmp_path / "v.jsonl", validation
        )

    return write


def test_a_named_task_reads_its_folder_and_scores_two_splits_together(tmp_path):
    folder = tmp_path / "sst2"
    folder.mkdir()
    rows = {
        "train": tiny_models.sentiment(40),
        "validation": tiny_models.sentiment(6),
        "test": tiny_models.sentiment(10)[6:],
    }
    for split, split_rows in rows.items():
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in split_rows))
    task = load_task("sst2", tmp_path)
    assert (task.kind, task.metric, task.labels) == ("text", "accuracy", ("negative", "positive"))
    assert task.evaluate_on == ("validation", "test")
    assert task.evaluation["label"][:] == [0, 1] * 5
    assert task.evaluation["text"][:6] == [row["sentence"] for row in rows["validation"]]
    assert load_task("sst2", tmp_path, evaluate_on=["test"]).evaluation.num_rows == 4


def test_fewer_training_rows_are_drawn_by_the_seed_from_all_of_them(tmp_path):
    for split in ("train", "validation"):
        tiny_models.write_rows(tmp_path / "sst2" / f"{split}.jsonl", tiny_models.sentiment(50))
    draws = [load_task("sst2", tmp_path, max_train_rows=20, seed=seed).train["text"][:] for seed in (0, 0, 1)]
    assert len(draws[0]) == 20 and draws[0] == draws[1] != draws[2]
    assert set(draws[0]) != set(load_task("sst2", tmp_path).train["text"][:20])
    assert load_task("sst2", tmp_path, max_eval_rows=7).evaluation.num_rows == 7


def test_a_split_of_minus_ones_is_left_out_of_the_score(tmp_path):
    for split in ("train", "validation"):
        tiny_models.write_rows(tmp_path / "sst2" / f"{split}.jsonl", tiny_models.sentiment(8))
    tiny_models.write_rows(tmp_path / "sst2" / "test.jsonl", [{"sentence": "hidden", "label": -1}])
    assert load_task("sst2", tmp_path).evaluate_on == ("validation",)
    with pytest.raises(DataError, match="all -1"):
        load_task("sst2", tmp_path, evaluate_on=["test"])


@pytest.mark.parametrize("ending", ["jsonl", "json", "list.json", "csv", "tsv"])
def test_every_format_gives_the_same_rows(tmp_path, ending):
    texts, labels = ["None", 'a "quoted", one', "null", "plain"], ["x", "y", "x", "y"]
    path = tmp_path / f"rows.{ending}"
    rows = [{"body": t, "kind": k} for t, k in zip(texts, labels, strict=True)]
    if ending == "list.json":
        path.write_text(json.dumps(rows, indent=1))
    elif ending.startswith("json"):
        tiny_models.write_rows(path, rows)
    else:
        import csv

        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="," if ending == "csv" else "\t")
            writer.writerows([("body", "kind"), *zip(texts, labels, strict=True)])
    task = load_files("text", path, path, columns=["body"], target="kind")
    assert task.train["text"][:] == texts
    assert task.train["label"][:] == [0, 1, 0, 1] and task.labels == ("x", "y")
    assert task.columns == ("body", "kind")


@pytest.mark.parametrize(
    "labels, names, ids",
    [
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        ([3, 1, 3], ("1", "3"), [1, 0, 1]),
        ([1.0, 0.0, 1.0], ("0", "1"), [1, 0, 1]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
    ],
)
def test_labels_of_any_type_become_ids_in_sorted_order(files, labels, names, ids):
    task = load_files("text", *files(text_rows(*labels), text_rows(*labels)))
    assert task.labels == names and task.train["label"][:] == ids


@pytest.mark.parametrize(
    "kind, train, validation, expected",
    [
        (
            "text",
            text_rows("a", "b"),
            text_rows("a", "c"),
            "row 1: got 'c', wanted a known label (a, b)",
        ),
        ("text", text_rows("a", "a"), text_rows("a"), "one label only ('a')"),
        ("text", text_rows("a", None), text_rows("a"), "column label: line 2, row 1: got null"),
        ("text", text_rows("a", ""), text_rows("a"), "got an empty label"),
        ("text", text_rows(0.5, 1.0), text_rows(1.0), "--task-type regression"),
        (
            "text",
            [{"text": None, "label": 1}, *text_rows(0)],
            text_rows(0),
            "column text: line 1, row 0: got null",
        ),
        (
            "text",
            [{"text": 3, "label": 1}, {"text": 4, "label": 0}],
            text_rows(0),
            "got a int, wanted a text",
        ),
        ("text", [{"text": " ", "label": 1}, {"text": "", "label": 0}], text_rows(0), "blank in every row"),
        ("text", [{"words": "x", "label": 1}], text_rows(0), "got words, label, wanted text among them"),
        ("pair", text_rows(0, 1), text_rows(0), "wanted text_pair among them"),
        ("regression", text_rows("high", "low"), text_rows("low"), "got 'high', wanted a finite number"),
        ("regression", text_rows(1.0, float("nan")), text_rows(1.0), "got nan, wanted a finite number"),
        (
            "tokens",
            [{"tokens": ["a", "b"], "tags": ["O"]}],
            [{"tokens": ["a"], "tags": ["O"]}],
            "row 0: got 2 words and 1 tags",
        ),
        (
            "tokens",
            [{"tokens": ["a", "b"], "tags": ["O", "B-x"]}],
            [{"tokens": ["a"], "tags": ["B-y"]}],
            "'B-y', wanted a known label (B-x, O)",
        ),
        ("tokens", [{"tokens": [], "tags": []}], [{"tokens": ["a"], "tags": ["O"]}], "null or nothing"),
        ("words", text_rows(0, 1), text_rows(0), "one of text, pair, regression, tokens"),
    ],
)
def test_bad_rows_are_refused_with_the_place_and_the_remedy(files, kind, train, validation, expected):
    with pytest.raises(DataError) as caught:
        load_files(kind, *files(train, validation))
    message = str(caught.value)
    assert expected in message
    assert message.startswith(("--train ", "--validation ", "fastgate: --task-type: "))
    assert ", wanted " in message and message.count(";") >= 1


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("rows.jsonl", b"", "(empty)"),
        ("rows.jsonl", b"\n\n", "one row"),
        ("rows.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', "line 2"),
        (
            "rows.jsonl",
            b'{"text": "a", "label": 1}\n{"text": "b", "label": {"x": 2}}\n',
            "row 1: got a dict, wanted a class",
        ),
        ("rows.jsonl", b"[1]\n[2]\n", "a list, not an object"),
        ("rows.json", b'{"text": "a", "label": 1}\n{"text": \n', "line 2"),
        ("rows.json", b'[{"text": "a", "label": 1},\n{"text": "b" "label": 1}]', "line 2"),
        ("rows.json", b'[{"text": "a", "label": 1}, 3]', "row 1: got a int, not an object"),
        ("rows.json", b"[]", "no rows"),
        ("rows.jsonl.gz", b"this is no gzip", "damaged gzip"),
        ("rows.csv", b"text,label\na,1\nb,2,3\n", "line 3: got 3 fields under a header of 2"),
        ("rows.csv", b"text,label\n", "no rows"),
        ("rows.csv", b"text,label\n\xff\xfe,1\n", "not UTF-8"),
        ("rows.txt", b"a\n", "JSON lines (.jsonl, .jsonl.gz), .json (lines, or one list), .csv or .tsv"),
    ],
)
def test_damaged_files_are_refused_by_line(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_files("text", tmp_path / name, tmp_path / name)
    assert expected in str(caught.value)


def test_labels_that_are_given_need_no_training_rows(files):
    _, path = files(text_rows(1, 3), text_rows(3, 1, 3))
    task = load_files("text", None, path, labels=("1", "3"))
    assert task.evaluation["label"][:] == [1, 0, 1] and list(task.splits) == ["validation"]
    with pytest.raises(DataError, match="got '1', wanted a known label"):
        load_files("text", None, path, labels=("3", "5"))


def test_missing_files_folders_tasks_and_splits_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_files("text", tmp_path / "none.csv", tmp_path / "none.csv")
    with pytest.raises(DataError, match="without a folder cola"):
        load_task("cola", tmp_path)
    with pytest.raises(DataError, match="one of sst2, cola"):
        load_task("sst3", tmp_path)
    tiny_models.write_rows(tmp_path / "cola" / "validation.jsonl", tiny_models.sentiment(4))
    with pytest.raises(DataError, match=r"got validation in .*train.jsonl.gz"):
        load_task("cola", tmp_path)
    tiny_models.write_rows(
        tmp_path / "rte" / "train.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 1}]
    )
    with pytest.raises(DataError, match="a labelled split out of validation"):
        load_task("rte", tmp_path)
    with pytest.raises(DataError, match="got 0, wanted at least 1"):
        tiny_models.write_rows(tmp_path / "cola" / "train.jsonl", tiny_models.sentiment(4))
        load_task("cola", tmp_path, max_train_rows=0)


def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch):
    import datasets

    def refuse(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError, match=r"hub data set nyu-mll/glue: got ConnectionError: no route.*--data-dir"
    ):
        load_task("mrpc")


def test_a_hub_data_set_is_asked_for_by_the_catalogue(monkeypatch):
    import datasets

    asked = []

    def answer(path, config, revision):
        asked.append((path, config, revision))
        names = ["O", "B-person"]
        features = datasets.Features(
            tokens=datasets.List(datasets.Value("string")),
            ner_tags=datasets.List(datasets.ClassLabel(names=names)),
        )
        rows = {"tokens": [["she", "went"]], "ner_tags": [[1, 0]]}
        return {
            split: datasets.Dataset.from_dict(rows, features) for split in ("train", "validation", "test")
        }

    monkeypatch.setattr(datasets, "load_dataset", answer)
    task = load_task("wnut17")
    assert asked == [("leondz/wnut_17", None, "refs/convert/parquet")]
    assert task.labels == ("O", "B-person") and task.train["tags"][0] == [1, 0]
    assert task.metric == "entity_f1" and task.evaluate_on == ("test",)
    assert [hub_config(name, CATALOG[name]) for name in ("sst2", "imdb", "ud_ewt")] == [
        "sst2",
        None,
        "en_ewt",
    ]


def test_the_label_sits_on_the_first_sub_word_only(tmp_path, files):
    rows = [{"tokens": ["films", "in", "paris", "zz"], "tags": ["N", "P", "N", "X"]}]
    task = load_files("tokens", *files(rows, rows))
    tokenizer = tiny_models.tokenizer(tmp_path / "words")
    encoded = task.tokenize(tokenizer, 16)["train"][0]
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert pieces == ["[CLS]", "film", "##s", "in", "paris", "z", "##z", "[SEP]"]
    n, p, x = (task.labels.index(tag) for tag in "NPX")
    assert encoded["labels"] == [-100, n, -100, p, n, x, -100, -100]
    short = task.tokenize(tokenizer, 4)["evaluation"][0]
    assert short["labels"] == [-100, n, -100, -100] and len(short["input_ids"]) == 4
    batch = collator_of(task, tokenizer)([encoded, short])
    assert batch["labels"][1].tolist() == [-100, n, -100] + [-100] * 5


def rows_of(spec, count=12):
    """Rows of the form that the task's files have."""
    rows = []
    for i in range(count):
        row = {column: f"good film {i} {column}" for column in spec.columns}
        if spec.kind == "tokens":
            words = ["she", "went", "to", "paris"][: 1 + i % 4]
            tags = ["O", "O", "O", "B-LOC"] if spec.metric == "entity_f1" else ["PRP", "VBD", "TO", "NNP"]
            row = {spec.columns[0]: words, spec.target: tags[: 1 + i % 4]}
        elif spec.kind == "regression":
            row[spec.target] = i / 2
        else:
            row[spec.target] = i % len(spec.labels)
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", CATALOG)
def test_every_task_of_the_catalogue_is_read_from_files_of_its_form(name, tmp_path):
    spec = CATALOG[name]
    for split in ("train", *spec.evaluate_on):
        tiny_models.write_rows(tmp_path / (spec.folder or name) / f"{split}.jsonl", rows_of(spec))
    task = load_task(name, tmp_path)
    assert (task.kind, task.metric, task.evaluate_on) == (spec.kind, spec.metric, spec.evaluate_on)
    tokenizer = tiny_models.tokenizer(tmp_path / "words")
    encoded = task.tokenize(tokenizer, 16)["evaluation"]
    assert len(encoded) == 12 * len(spec.evaluate_on)
    labels = np.array([label for row in encoded["labels"] for label in np.atleast_1d(row) if label != -100])
    if spec.kind == "regression":
        assert labels.max() == 5.5 and task.labels == ()
    else:
        assert set(labels) == set(range(len(task.labels)))
    if spec.labels:
        assert task.labels == spec.labels
    batch = collator_of(task, tokenizer)([encoded[i] for i in range(4)])
    assert batch["labels"].shape[0] == 4


def test_data_that_only_its_owners_give_away_is_asked_for_in_a_folder():
    with pytest.raises(DataError, match=r"--data-dir: got none, wanted a folder with ptb/train\.jsonl\.gz"):
        load_task("ptb")


def test_long_texts_become_windows_that_are_scored_as_one(tmp_path, files):
    """Every token of a text is in a window, neighbours share `stride` tokens, a score is of the mean."""
    words = ["one", "two", "three", "paris", "london", "good", "bad", "film", "story", "plot"]
    rows = [{"text": " ".join(words), "label": 1}, {"text": "good bad", "label": 0}]
    task = load_files("text", *files(rows, rows))
    tokenizer = tiny_models.tokenizer(tmp_path / "words")
    encoded = task.tokenize(tokenizer, 6, stride=1)["evaluation"]
    assert encoded["document"][:] == [2, 2, 2, 3] and encoded["labels"][:] == [1, 1, 1, 0]
    parts = [tokenizer.convert_ids_to_tokens(ids)[1:-1] for ids in encoded["input_ids"][:]]
    assert parts == [words[0:4], words[3:7], words[6:10], ["good", "bad"]]

    class Model(torch.nn.Module):
        """Logits of class 1: 7 with the word `film`, -2 without."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask, **rest):
            film = tokenizer.convert_tokens_to_ids("film")
            has_film = (input_ids == film).any(1) * 9.0 - 2.0
            return SimpleNamespace(logits=torch.stack([torch.zeros_like(has_film), has_film], 1))

    # The windows of the first text: -2, -2 and 7, in two batches; the mean is right, two of three are not.
    assert score(Model(), task, encoded, collator_of(task, tokenizer), batch_size=2)["accuracy"] == 1.0
    whole = task.tokenize(tokenizer, 64, stride=1)["evaluation"]
    assert whole["document"][:] == [2, 3]


@pytest.mark.parametrize("kind", ["pair", "tokens"])
def test_windows_are_for_single_texts(kind, tmp_path, files):
    row = (
        {"tokens": ["she"], "tags": ["A"]}
        if kind == "tokens"
        else {"text": "a", "text_pair": "b", "label": 1}
    )
    rows = [row, {**row, "tags": ["B"]} if kind == "tokens" else {**row, "label": 0}]
    task = load_files(kind, *files(rows, rows))
    with pytest.raises(DataError, match=r"stride: got a .*, wanted a task of single texts"):
        task.tokenize(tiny_models.tokenizer(tmp_path / "words"), 8, stride=2)


@pytest.mark.parametrize("stride", [-1, 6])
def test_a_stride_is_shorter_than_a_window(stride, tmp_path, files):
    task = load_files("text", *files(text_rows("a", "b"), text_rows("a", "b")))
    with pytest.raises(DataError, match=r"stride: got -?\d, wanted 0 to 5"):
        task.tokenize(tiny_models.tokenizer(tmp_path / "words"), 8, stride=stride)


def test_pairs_are_two_segments_and_cut_to_length(tmp_path, files):
    rows = [{"text": "good film", "text_pair": "bad story", "label": i} for i in (0, 1)]
    task = load_files("pair", *files(rows, rows))
    encoded = task.tokenize(tiny_models.tokenizer(tmp_path / "words"), 5)
    assert encoded["train"][0]["token_type_ids"] == [0, 0, 0, 1, 1]
    assert encoded["evaluation"]["labels"][:] == [0, 1]


def test_scores_are_the_textbook_ones():
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    scores = metrics.classification(logits, np.array([0, 1, 0, 1]), ("no", "yes"))
    assert scores == {"accuracy": 0.5, "f1": 0.5, "matthews": 0.0}
    scores = metrics.regression(np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0]))
    assert scores["spearman"] == pytest.approx(1.0) and scores["mse"] == pytest.approx(1 / 3)
    assert scores["pearson"] == pytest.approx(0.98198, abs=1e-5)
    assert metrics.regression(np.ones(3), np.array([1.0, 2.0, 3.0]))["spearman"] == 0.0


def test_entities_count_as_a_whole_and_unscored_positions_do_not_count():
    labels = ("O", "B-x", "I-x")
    gold = np.array([[-100, 1, 2, 0, -100], [-100, 1, 0, 0, -100]])
    predicted = np.array([[1, 1, 0, 0, 1], [2, 1, 0, 0, 2]])  # the first entity is too short
    scores = metrics.tokens(np.eye(3)[predicted], gold, labels)
    assert scores["entity_f1"] == pytest.approx(0.5)  # one of two found, one of two right
    assert scores["token_accuracy"] == pytest.approx(5 / 6)
    assert list(metrics.tokens(np.eye(3)[predicted], gold, ("A", "B", "C"))) == ["token_accuracy"]


def test_a_task_scores_predictions_as_the_trainer_hands_them_over(files):
    task = load_files("text", *files(text_rows("a", "b"), text_rows("a", "b")))
    logits = np.array([[2.0, 1.0], [3.0, 1.0]])
    plain = task.metrics(EvalPrediction(logits, np.array([0, 1])))
    assert plain["accuracy"] == 0.5
    assert task.metrics(EvalPrediction((logits, logits), np.array([0, 1]))) == plain


def test_the_dense_model_has_the_tasks_head(tmp_path, files):
    folder = tiny_models.model_folder(tmp_path / "model")
    task = load_files("text", *files(text_rows("a", "b", "c"), text_rows("a")))
    model = dense_model(folder, task)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and model.config.label2id["c"] == 2
    task = load_files("regression", *files(text_rows(1, 2, 3), text_rows(1)))
    model = dense_model(folder, task)
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"
    rows = [{"tokens": ["a", "b"], "tags": ["O", "B-x"]}]
    model = dense_model(folder, load_files("tokens", *files(rows, rows)))
    assert type(model).__name__ == "BertForTokenClassification" and model.config.id2label == {
        0: "B-x",
        1: "O",
    }
    half = tmp_path / "half"
    model.to(torch.bfloat16).save_pretrained(half)
    assert dense_model(half, task).dtype == torch.float32  # as an optimizer needs its weights
    with pytest.raises(ArgumentError, match=r"config.json"):
        dense_model(tmp_path / "nothing", task)
    assert load_tokenizer(folder)("good film")["input_ids"][0] == 2
