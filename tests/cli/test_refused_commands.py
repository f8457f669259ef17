"""Options, folders and models that a command cannot work with: one line says so before it writes anything."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers import tiny_models
from helpers.commands import call, refused
from helpers.finetune_commands import make_world, options
from typer.testing import CliRunner

from fastgate.cli.main import app

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("refused"))


NUMBERS = {
    "--epochs": (-1, 0, "nan", "inf", "x"),
    "--prune-epochs": (-1, 0, "nan", "-inf"),
    "--lr": (-1, 0, "nan", "inf", 3),
    "--batch-size": (-1, 0, 2.5),
    "--max-length": (-1, 0, 1, 2),
    "--stride": (-1,),
    "--seed": (-1, 2**32),
    "--max-train-rows": (0, -1),
    "--max-eval-rows": (0, -1),
    "--target-sparsity": (0, 1, 2, -1, "nan"),
    "--target-speedup": (0, 1, 0.5, "nan", "inf"),
    "--max-drop": (0, 1, -0.1, "nan"),
}


@pytest.mark.parametrize("option, value", [(o, v) for o, values in NUMBERS.items() for v in values])
def test_a_number_out_of_its_range_is_wrong_usage_of_that_option(world, tmp_path, option, value):
    message = refused(*options(world, option, value), "--out", tmp_path / "new", code=2)
    assert f"'{option}'" in message and "finetune --help" in message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "command, option, value",
    [
        ("evaluate", "--batch-size", 0), ("evaluate", "--max-length", 0), ("evaluate", "--max-eval-rows", 0),
        ("evaluate", "--stride", -1), ("sweep", "--workers", 0), ("sweep", "--workers", 100_000),
        ("bench", "--batches", 0), ("bench", "--threads", 0), ("bench", "--batch-size", -1),
        ("demo", "--seed", -1),
    ],
)  # fmt: skip
def test_every_command_has_ranges(world, tmp_path, command, option, value):
    needed = {
        "evaluate": [world / "out" / "dense"],
        "sweep": [world / "file"],
        "bench": ["--model", world / "model", "--task", "sst2"],
        "demo": ["--out", tmp_path / "demo"],
    }
    assert f"'{option}'" in refused(command, *needed[command], option, value, code=2)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--max-length", 65], "--max-length: got 65, wanted 3 to 64 tokens"),
        (["--max-length", 100_000], "--max-length: got 100000"),
        (["--stride", 22], "--stride: got 22"),
        (["--prune-epochs", 0.2], "--prune-epochs: got 0.2, which is 2 optimizer steps of 8 rows, wanted 3"),
        (["--batch-size", 64], "--prune-epochs: got 2, which is 2 optimizer steps of 64 rows"),
        (["--max-train-rows", 8], "--prune-epochs: got 2, which is 2 optimizer steps"),
        (["--target-speedup", 50], "--target-speedup: got 50, wanted at most "),
        (["--target-sparsity", 0.1], "--target-sparsity: got 0.1, which is 0 of 3 attention sublayers"),
        (["--max-drop", 0.1, "--max-train-rows", 10], "10 training rows"),
        (["--pooling", "max"], "--pooling: got 'max'"),
        (["--evaluate-on", ","], "--evaluate-on: got ','"),
        (["--columns", "sentence"], "--columns: got it with --task"),
        (["--label-column", ""], "--label-column: got ''"),
        (["--train", "x.jsonl"], "--train: got it with --task"),
        (["--task-type", "text"], "--task, --task-type"),
    ],
)
def test_what_cannot_work_is_found_before_the_folder_is_claimed(world, tmp_path, arguments, expected):
    assert expected in refused(*options(world, *arguments), "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "out", ["FILE", "FILE/in", "FILE/in/it", "/dev/null/in", "/proc/none/in", "x" * 300, "DATA", "."]
)
def test_a_folder_that_cannot_be_made_is_found_before_training(world, monkeypatch, out):
    monkeypatch.setattr("fastgate.training.phases.TaskTrainer.dense", lambda *_: pytest.fail("it trains"))
    out = out.replace("FILE", str(world / "file")).replace("DATA", str(world / "data"))
    message = refused(*options(world), "--out", out)
    assert "--out" in message or "x" * 300 in message


@pytest.mark.parametrize("command", ["explain", "evaluate"])
def test_the_folder_of_a_run_names_the_models_in_it(world, command):
    data = [] if command == "explain" else ["--task", "sst2", "--data-dir", world / "data"]
    assert str(world / "out" / "pruned") in refused(command, world / "out", *data)
    for place in ("empty", "file", "nothing", "data"):
        assert str(world / place) in refused(command, world / place, *data)
    assert str(world / "out" / "dense") in refused(
        *options(world, "--model", world / "out"), "--out", world / "new"
    )


@pytest.mark.parametrize("phase", ["dense", "pruned"])
@pytest.mark.parametrize("damage", ["cut", "zeros", "header", "text", "config", "list"])
def test_a_damaged_model_is_told_in_one_line(world, tmp_path, phase, damage):
    folder = shutil.copytree(world / "out" / phase, tmp_path / "model")
    weights, config = folder / "model.safetensors", folder / "config.json"
    content = weights.read_bytes()
    if damage == "config":
        config.write_text(config.read_text()[:40])
    elif damage == "list":
        config.write_text("[1, 2]")
    else:
        weights.write_bytes(
            {
                "cut": content[:-100], "zeros": bytes(len(content)), "header": b"\xff" * 8 + content[8:],
                "text": b"no weights",
            }[damage]
        )  # fmt: skip
    assert str(folder) in refused("explain", folder)
    assert str(folder) in refused("evaluate", folder, "--task", "sst2", "--data-dir", world / "data")
    refused(*options(world, "--model", folder), "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_is_evaluated_only_on_a_task_its_head_is_for(world, tmp_path):
    numbers = tiny_models.write_rows(
        tmp_path / "numbers.jsonl", [{"text": "good film", "label": i / 4} for i in range(8)]
    )
    tags = tiny_models.write_rows(tmp_path / "tags.jsonl", [{"tokens": ["she"], "tags": ["O"]}] * 8)
    long = tiny_models.write_rows(
        tmp_path / "long.jsonl", [{"text": "good film " * 60, "label": "negative"}] * 3
    )
    dense = world / "out" / "dense"
    refused("evaluate", dense, "--task-type", "regression", "--validation", numbers)
    refused("evaluate", dense, "--task-type", "tokens", "--validation", tags)
    refused("evaluate", world / "model", "--task", "sst2", "--data-dir", world / "data")
    own = ["--task-type", "text", "--validation", long]
    assert "--max-length" in refused("evaluate", dense, *own)
    assert (
        "3 of 3 rows of evaluation were longer than 32 tokens"
        in call("evaluate", dense, *own, "--max-length", 32).stderr
    )


def test_what_is_cut_off_the_rows_is_said_and_kept(world, tmp_path):
    message = call(*options(world, "--max-length", 6), "--out", tmp_path / "out").stderr
    counts = json.loads((tmp_path / "out" / "result.json").read_text())["input"]
    assert counts["max_length"] == 6 and counts["truncated"]["train"] > 0
    assert f"{counts['truncated']['train']} of 64 rows of train were longer than 6 tokens" in message


def test_a_choice_that_was_not_learned_is_said(world, capsys):
    from fastgate.cli.finetune import print_result

    result = json.loads((world / "out" / "result.json").read_text())
    for separated, noted in ((True, False), (False, True)):
        result["pruned"] |= {"separated": separated, "margin": 0.012}
        print_result(result, world / "out")
        assert ("did not tell the layers apart (margin 0.012)" in capsys.readouterr().err) == noted


def test_a_demo_replaces_a_demo_and_nothing_else(world):
    before = sorted(path.name for path in (world / "out").iterdir())
    message = refused("demo", "--out", world / "out", "--task", "sst2", "--data-dir", world / "data")
    assert "holds a run of `fastgate finetune`" in message
    assert before == sorted(path.name for path in (world / "out").iterdir())
    assert "not empty" in refused("demo", "--out", world / "data")
    assert "--data-dir" in refused("demo", "--out", world / "demo", "--data-dir", world / "data")
    assert "demo: --out: got" in refused("demo", "--out", world / "file" / "in")


def test_wrong_usage_of_the_program_is_told_in_one_line():
    for arguments in (["--nothing"], ["nothing"], ["info", "more"], ["explain"], ["info", "--jsn"]):
        assert "--help" in refused(*arguments, code=2)
    shown = CliRunner().invoke(app, [])
    assert "finetune" in shown.output and "Traceback" not in shown.output
