"""Models and tokenizers of tasks: what is trained or scored is whole and fits the task."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.commands import run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    RobertaConfig,
)

import fastgate
from fastgate.data import load_files, metrics
from fastgate.errors import ArgumentError, CheckpointError, DataError, FastgateError
from fastgate.models.architectures import longest_row
from fastgate.training import dense_model, load_tokenizer
from fastgate.training.evaluate import check_fits, class_names, collator_of, read_model, score

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    return tiny_models.model_folder(tmp_path / "model")


def text_task(tmp_path, texts=("good film", "bad film"), labels=("neg", "pos"), name="rows"):
    rows = [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(texts)]
    path = tiny_models.write_rows(tmp_path / f"{name}.jsonl", rows)
    return load_files("text", path, path)


def classifier(folder, out, auto=AutoModelForSequenceClassification, names=("neg", "pos"), **options):
    """A classifier with these class names, saved with its tokenizer."""
    head = (
        {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}
    )
    model = auto.from_pretrained(folder, **head, **options)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


def refused(*arguments, code=1):
    """The one line that says why a command is refused."""
    message = run(*arguments, code=code).stderr
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


def test_a_pruned_model_is_not_fine_tuned(folder, tmp_path):
    task = text_task(tmp_path)
    model = fastgate.prune(dense_model(folder, task), keep=[1])
    cut = fastgate.save(model, tmp_path / "cut", AutoTokenizer.from_pretrained(folder))
    with pytest.raises(CheckpointError, match=r"--model: got .*/cut, a checkpoint that fastgate pruned"):
        dense_model(cut, task)
    assert read_model(cut).config.num_hidden_layers == 3


def test_a_pruned_model_without_its_marks_is_not_whole(folder, tmp_path):
    """As transformers would load it: attention drawn anew."""
    task = text_task(tmp_path)
    classifier(folder, tmp_path / "c")
    weights = load_file(tmp_path / "c" / "model.safetensors")
    left = {k: v for k, v in weights.items() if "layer.1.attention.self" not in k}
    save_file(left, tmp_path / "c" / "model.safetensors", metadata={"format": "pt"})
    message = r"without 6 of its weights, such as bert\.encoder\.layer\.1\.attention\.self\.key\.bias"
    for load in (lambda path: dense_model(path, task), read_model):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "c")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("intermediate_size", 32, "without 9 of its weights"),
        ("num_hidden_layers", 2, "16 weights beyond its config.json, such as bert.encoder.layer.2."),
        ("num_hidden_layers", 4, "without 16 of its weights, such as bert.encoder.layer.3."),
        ("max_position_embeddings", 99, "without 1 of its weights"),
        ("hidden_size", -3, "damaged"),
        ("num_hidden_layers", "three", "damaged"),
        ("model_type", "no_such", "damaged"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(folder, tmp_path, key, value, message):
    classifier(folder, tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, key: value}))
    for load in (lambda path: dense_model(path, text_task(tmp_path)), read_model):
        with pytest.raises(FastgateError) as caught:
            load(tmp_path / "c")
        assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x00" * 50, "half", None])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_and_missing_files_are_refused(folder, tmp_path, name, content):
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if content == "half" else content or b"")
    if content is None:
        path.unlink()
        if name == "tokenizer.json":
            (folder / "vocab.txt").unlink()
    load = load_tokenizer if name == "tokenizer.json" else lambda path: dense_model(path, text_task(tmp_path))
    with pytest.raises((ArgumentError, CheckpointError)) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    if name != "tokenizer.json":
        with pytest.raises((ArgumentError, CheckpointError)):
            read_model(folder)


@pytest.mark.parametrize(
    "command, option",
    [("explain", "PATH"), ("evaluate", "PATH"), ("finetune", "--model"), ("bench", "--model")],
)
def test_a_name_that_the_hub_does_not_give_is_told_by_its_option(
    folder, tmp_path, monkeypatch, command, option
):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect\nto the hub")

    for kind in ("AutoConfig", "AutoTokenizer"):
        monkeypatch.setattr(f"transformers.{kind}.from_pretrained", unreachable)
    rows = tiny_models.write_rows(
        tmp_path / "rows.jsonl", [{"text": "good", "label": i % 2} for i in range(8)]
    )
    for split in ("train", "validation"):
        tiny_models.write_rows(
            tmp_path / "sst2" / f"{split}.jsonl", [{"sentence": "a", "label": i % 2} for i in (0, 1)]
        )
    own = ["--task-type", "text", "--validation", rows]
    more = {
        "explain": [], "evaluate": own, "finetune": [*own, "--train", rows, "--out", tmp_path / "out"],
        "bench": ["--task", "sst2", "--data-dir", tmp_path],
    }[command]  # fmt: skip
    named = ["some-bert"] if option == "PATH" else ["--model", "some-bert"]
    assert f"{option}: got some-bert (We couldn't connect to the hub)" in refused(command, *named, *more)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_a_model_tuned_on_another_problem_starts_a_classifier_and_is_scored_as_none(
    folder, tmp_path, problem
):
    source = classifier(folder, tmp_path / "tuned", problem_type=problem)
    task = text_task(tmp_path)
    model = dense_model(source, task).train()
    ids, labels = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([0, 1])
    output = model(input_ids=ids, labels=labels)
    assert float(output.loss) == pytest.approx(
        float(torch.nn.functional.cross_entropy(output.logits, labels))
    )
    rows = tiny_models.write_rows(tmp_path / "tags.jsonl", [{"tokens": ["a", "b"], "tags": ["x", "y"]}])
    assert dense_model(source, load_files("tokens", rows, rows)).config.problem_type is None
    data = ["--task-type", "text", "--validation", tmp_path / "rows.jsonl"]
    assert f"problem_type in its config.json is {problem}" in refused("evaluate", source, *data)


def test_a_model_that_may_not_be_read_is_told_by_its_option(folder, tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("fastgate.training.model.Path.is_file", forbidden)
    assert "PATH: got model (Permission denied)" in refused("explain", "model")


def test_the_folder_of_a_run_is_answered_with_the_models_in_it(folder, tmp_path):
    run_folder = tmp_path / "run"
    for part in ("dense", "pruned"):
        classifier(folder, run_folder / part)
    rows = tiny_models.write_rows(tmp_path / "rows.jsonl", [{"text": "good", "label": i} for i in (0, 1)])
    data = ["--task-type", "text", "--validation", rows]
    for command in (["explain", run_folder], ["evaluate", run_folder, *data]):
        message = refused(*command)
        assert "PATH: got" in message and f"name the model in it: {run_folder / 'pruned'}" in message
    message = refused("finetune", "--model", run_folder, *data, "--train", rows, "--out", tmp_path / "new")
    assert f"name the model in it: {run_folder / 'dense'}" in message and "--model: got" in message
    shutil.rmtree(run_folder)
    for step in (9, 10):
        classifier(folder, run_folder / f"checkpoint-{step}")
    assert f"{run_folder / 'checkpoint-10'}" in refused("explain", run_folder)
    shutil.rmtree(run_folder)
    run_folder.mkdir()
    assert "an empty folder" in refused("explain", run_folder)
    assert "rows.jsonl, a file" in refused("explain", rows)
    assert "no such folder" in refused("explain", tmp_path / "nothing")


def test_a_model_without_a_tokenizer_is_refused(folder, tmp_path):
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(
        ArgumentError, match=r"tokenizer of .*: files: got none, wanted tokenizer.json or vocab.txt"
    ):
        load_tokenizer(folder)
    tiny_models.roberta_folder(tmp_path / "r")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "r" / name).unlink()
    with pytest.raises(ArgumentError, match=r"files: got none"):
        load_tokenizer(tmp_path / "r")


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ArgumentError, match=r"got ids up to 87, wanted ids below 87"):
        load_tokenizer(folder)
    tokenizer = tiny_models.tokenizer(tmp_path / "words")
    texts = ["\u4f60\u597d \u4e16\u754c", "\u518d\u89c1 \u4e16\u754c"]
    with pytest.raises(DataError, match=r"tokenizer: got 100% unknown tokens in the rows of train"):
        text_task(tmp_path, texts).tokenize(tokenizer, 16)
    task = text_task(tmp_path, ["good film 1 2 3", "bad film 1"])
    task.tokenize(tokenizer, 16)
    assert task.counts["unknown"] == {"train": 0.5, "evaluation": 0.5}
    assert task.notes == [
        f"50% of the tokens of {s} are unknown to the tokenizer" for s in ("train", "evaluation")
    ]
    tokenizer.pad_token = None
    with pytest.raises(DataError, match="tokenizer: got no padding token"):
        task.tokenize(tokenizer, 16)


def test_cut_rows_are_counted(tmp_path):
    tokenizer = tiny_models.tokenizer(tmp_path / "words")
    task = text_task(tmp_path, ["good " * n for n in (1, 6, 7, 20)])
    task.tokenize(tokenizer, 8)
    assert task.counts["max_length"] == 8 and task.counts["rows"] == {"train": 4, "evaluation": 4}
    assert task.counts["truncated"] == {"train": 2, "evaluation": 2}
    assert task.notes[0] == "2 of 4 rows of train were longer than 8 tokens and truncated"
    task.tokenize(tokenizer, 22)
    assert task.notes == [] and task.counts["truncated"] == {"train": 0, "evaluation": 0}
    windows = task.tokenize(tokenizer, 8, stride=2)
    assert len(windows["train"]) == 9 and task.notes == [] and task.counts["rows"]["train"] == 4

    pairs = [{"text": "good " * n, "text_pair": "bad " * n, "label": n % 2} for n in (1, 2, 3, 9)]
    path = tiny_models.write_rows(tmp_path / "pairs.jsonl", pairs)
    task = load_files("pair", path, path)
    task.tokenize(tokenizer, 7)
    assert task.counts["truncated"]["train"] == 2

    rows = [{"tokens": ["good"] * n + ["\u200b"], "tags": ["A"] * n + ["B"]} for n in (2, 5, 9)]
    path = tiny_models.write_rows(tmp_path / "tokens.jsonl", rows)
    task = load_files("tokens", path, path)
    labels = task.tokenize(tokenizer, 7)["train"]["labels"][:]
    scored = sum(label != -100 for row in labels for label in row)
    assert task.counts["truncated"]["train"] >= 1
    assert task.counts["unscored_words"]["train"] == sum(len(row["tags"]) for row in rows) - scored > 0


def test_a_slow_tokenizer_counts_cut_rows_too(tmp_path):
    fast = tiny_models.tokenizer(tmp_path / "words")

    class Slow:
        """Calls as tokenizers without Rust answer them."""

        def __getattr__(self, name):
            return getattr(fast, name)

        def __call__(self, *texts, **options):
            encoding = fast(*texts, **options)
            return type(encoding)(dict(encoding))  # without encodings

    task = text_task(tmp_path, ["good " * n for n in (1, 6, 7, 20)])
    task.tokenize(Slow(), 8)
    assert task.counts["truncated"]["train"] == 2


@pytest.mark.parametrize("length", [0, 1, 2, -4])
def test_a_row_has_room_for_a_token(tmp_path, length):
    with pytest.raises(DataError, match=f"--max-length: got {length}, wanted 3 or more"):
        text_task(tmp_path).tokenize(tiny_models.tokenizer(tmp_path / "words"), length)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert", "fastgate_xlm_roberta", "bert"])
@pytest.mark.parametrize("pad", [0, 1, 5])
def test_positions_are_counted_from_the_padding_id(kind, pad):
    config = RobertaConfig(max_position_embeddings=40, pad_token_id=pad)
    config.model_type = kind
    longest = 40 if kind == "bert" else 39 - pad
    assert longest_row(config) == longest


@pytest.mark.parametrize("pad", [0, 1, 5])
def test_a_roberta_takes_rows_of_its_longest_length(tmp_path, pad):
    from transformers import RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, pad_token_id=pad,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    length = longest_row(config)
    model(input_ids=torch.full((1, length), 20))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, length + 1), 20))


def scored(model, task, rows=None, tokenizer=None, tmp_path=None, length=16):
    tokenizer = tokenizer or tiny_models.tokenizer(tmp_path / "words")
    rows = rows or task.tokenize(tokenizer, length)["evaluation"]
    return score(model, task, rows, collator_of(task, tokenizer))


def test_a_row_longer_than_the_model_takes_is_not_scored(folder, tmp_path):
    model = read_model(classifier(folder, tmp_path / "c"))
    short = text_task(tmp_path)
    assert scored(model, short, tmp_path=tmp_path, length=128)["accuracy"] in (0.0, 0.5, 1.0)
    task = text_task(tmp_path, ["good " * 80, "bad"], name="long")
    with pytest.raises(ArgumentError, match="--max-length: got a row of 82 tokens, wanted at most 64"):
        scored(model, task, tmp_path=tmp_path, length=128)


def test_a_model_is_scored_on_its_own_kind_of_task_only(folder, tmp_path):
    models = {
        "text": classifier(folder, tmp_path / "text"),
        "regression": classifier(folder, tmp_path / "reg", names=(), num_labels=1),
        "tokens": classifier(folder, tmp_path / "tok", AutoModelForTokenClassification),
        "mlm": classifier(folder, tmp_path / "mlm", AutoModelForMaskedLM, names=()),
    }
    rows = {
        "text": [{"text": "good", "label": label} for label in ("neg", "pos")],
        "regression": [{"text": "good", "label": i} for i in (1.5, 2, 3)],
        "tokens": [{"tokens": ["good", "bad"], "tags": ["neg", "pos"]}],
    }
    for kind, kind_rows in rows.items():
        path = tiny_models.write_rows(tmp_path / f"{kind}.jsonl", kind_rows)
        task = load_files(kind, path, path)
        for made_for, model_path in models.items():
            model = AutoModelForMaskedLM if made_for == "mlm" else None
            model = model.from_pretrained(model_path) if model else read_model(model_path)
            if made_for == kind:
                assert class_names(model, kind) == ([] if kind == "regression" else ["neg", "pos"])
                check_fits(model, task)
                assert scored(model, task, tmp_path=tmp_path)
                continue
            name = type(model).__name__
            for call in (
                lambda m=model, t=task: check_fits(m, t),
                lambda m=model, t=task: scored(m, t, tmp_path=tmp_path),
            ):
                with pytest.raises(DataError, match=f"model: got {name} with .* wanted a model for {kind}"):
                    call()
            if made_for != "mlm":
                message = refused("evaluate", model_path, "--task-type", kind, "--validation", path)
                assert f"got {name}" in message


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "names, labels, accuracy",
    [
        ((), [0, 1], True),
        (("neg", "pos"), [0, 1], True),
        (("neg", "pos"), ["pos", "neg"], True),
        (("pos", "neg"), ["pos", "neg"], True),  # in the order of the ids, not of the alphabet
        (("neg", "pos"), ["bad", "good"], "got 'bad', wanted a known label (neg, pos)"),
        (("neg", "pos"), [1, 2], "got '2', wanted a known label (0 for neg, 1 for pos)"),
    ],
)
def test_evaluate_takes_ids_and_names_in_the_models_order(folder, tmp_path, names, labels, accuracy, train):
    path = classifier(folder, tmp_path / "c", names=names)
    rows = [{"text": text, "label": labels[i % 2]} for i, text in enumerate(["good film", "bad", "a story"])]
    file = tiny_models.write_rows(tmp_path / "rows.jsonl", rows)
    options = ["--train", file] if train else []
    command = ["evaluate", path, "--task-type", "text", "--validation", file, *options, "--json"]
    if isinstance(accuracy, str):
        assert accuracy in refused(*command)
        return
    got = json.loads(run(*command).stdout)["scores"]["accuracy"]
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path).eval(), load_tokenizer(path)
    with torch.no_grad():
        predicted = [int(model(**tokenizer(r["text"], return_tensors="pt")).logits.argmax()) for r in rows]
    gold = [r["label"] if isinstance(r["label"], int) else names.index(r["label"]) for r in rows]
    assert got == pytest.approx(np.mean(np.array(predicted) == gold))


def test_class_names_come_in_the_order_of_the_ids(folder, tmp_path):
    model = read_model(classifier(folder, tmp_path / "c"))
    model.config.id2label = {1: "pos", 0: "neg"}
    assert class_names(model, "text") == ["neg", "pos"]
    with pytest.raises(DataError, match="--task-type: got 'sentence', wanted one of text, pair"):
        class_names(model, "sentence")
    task = text_task(tmp_path, labels=("a", "b"))
    with pytest.raises(DataError, match="labels neg, pos, wanted a, b, in this order"):
        check_fits(model, task)
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    check_fits(model, task)


class Constant(torch.nn.Module):
    """The same logits for every row."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids, **rest):
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), -1))


def test_undefined_scores_are_said_and_nan_is_refused(tmp_path):
    with pytest.warns(
        RuntimeWarning, match="Matthews correlation is undefined .* the predictions are of one class"
    ):
        scores = scored(Constant(1.0, 0.0), text_task(tmp_path), tmp_path=tmp_path)
    assert scores == {"accuracy": 0.5, "f1": 0.0, "matthews": 0.0}
    with pytest.raises(ArgumentError, match="NaN in 2 of 2 outputs of Constant"):
        scored(Constant(float("nan"), 0.0), text_task(tmp_path), tmp_path=tmp_path)
    with pytest.warns(RuntimeWarning, match="the gold labels are of one class"):
        metrics.classification(np.eye(2), np.array([1, 1]), ("a", "b"))
    with pytest.warns(RuntimeWarning, match="correlation is undefined .* the gold numbers are all equal"):
        scores = metrics.regression(np.array([1.0, 2.0]), np.array([3.0, 3.0]))
    assert scores == {"spearman": 0.0, "pearson": 0.0, "mse": 2.5}
    with pytest.warns(RuntimeWarning, match="no entity in the gold tags"):
        metrics.tokens(np.zeros((1, 2, 2)), np.array([[0, 0]]), ("O", "B-x"))
    task = text_task(tmp_path)
    rows = task.tokenize(tiny_models.tokenizer(tmp_path / "words"), 8)["evaluation"]
    with pytest.raises(DataError, match="rows to score: got none"):
        score(Constant(1.0, 0.0), task, rows.select([]), None)
