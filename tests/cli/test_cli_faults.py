"""What goes wrong around a command: wrong options, wrong folders, Ctrl-C, a full disk, odd consoles."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import subprocesses, tiny_models
from helpers.commands import call, refused
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fastgate
from fastgate.cli.main import app
from fastgate.cli.progress import Display
from fastgate.training import feasibility
from fastgate.training.disk import full_disk_as_oserror, write_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, the task sst2 in files, and one finished run on it."""
    folder = tmp_path_factory.mktemp("faults")
    tiny_models.model_folder(folder / "model")
    tiny_models.sentiment_folder(folder / "data", train=64, validation=32)
    (folder / "file").write_text("no folder")
    (folder / "empty").mkdir()
    call(*options(folder), "--out", folder / "out")
    return folder


def options(world, *more):
    return [
        "finetune", "--model", world / "model", "--task", "sst2", "--data-dir", world / "data", "--lr", 1e-3,
        "--epochs", 1, "--prune-epochs", 2, "--max-length", 24, "--batch-size", 8, *more,
    ]  # fmt: skip


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


# -- resuming a run


class Interrupting:
    """Stops a run at a step of a phase, as Ctrl-C would."""

    def __init__(self, monkeypatch, phase, step, error):
        listen = Display.__call__

        def stop(display, progress):
            listen(display, progress)
            if (progress.phase, progress.step) == (phase, step):
                raise error

        monkeypatch.setattr(Display, "__call__", stop)


@pytest.fixture(scope="module")
def stopped_once(world, tmp_path_factory):
    """The folder of a run that Ctrl-C stopped between its dense fine-tune and its pruning."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch:
        Interrupting(patch, "prune", 1, KeyboardInterrupt())
        message = call(*options(world), "--out", out, code=130).stderr
    assert "interrupted" in message and "--resume" in message
    return out


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped_once, tmp_path / "out")


@pytest.mark.parametrize(
    "changed",
    [["--target-sparsity", 0.4], ["--target-speedup", 1.5], ["--prune-epochs", 1, "--target-sparsity", 0.9]],
)
def test_a_run_whose_pruning_has_not_begun_resumes_with_another_target(world, stopped, changed):
    dense = (stopped / "dense" / "model.safetensors").stat().st_mtime_ns
    call(*options(world, *changed), "--out", stopped, "--resume")
    assert (stopped / "dense" / "model.safetensors").stat().st_mtime_ns == dense
    result, settings = (json.loads((stopped / f"{name}.json").read_text()) for name in ("result", "run"))
    assert settings.pop("rows_sha256") and result["settings"] == settings
    assert settings["sparsity"] == (changed[-1] if "sparsity" in changed[-2] else None)
    # From there on it is the run that it would have been from the start.
    call(*options(world, *changed), "--out", stopped.parent / "whole")
    a, b = (load_file(f / "pruned" / "model.safetensors") for f in (stopped, stopped.parent / "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "changed, named",
    [
        (["--seed", 1], "--seed"), (["--lr", 2e-3], "--lr"), (["--epochs", 2], "--epochs"),
        (["--batch-size", 4], "--batch-size"), (["--max-length", 20], "--max-length"),
        (["--bf16"], "--bf16"), (["--max-train-rows", 48], "--max-train-rows"),
        (["--max-drop", 0.1], "--max-drop"),
        (["--pooling", "mean"], "--pooling"), (["--max-eval-rows", 9], "--max-eval-rows"),
    ],
)  # fmt: skip
def test_what_shaped_the_dense_model_stays_as_it_was(world, stopped, changed, named):
    before = (stopped / "run.json").read_bytes()
    message = refused(*options(world, *changed), "--out", stopped, "--resume")
    assert f"{named} " in message and "dense" not in message.replace("dense model", "")
    assert (stopped / "run.json").read_bytes() == before


def test_rows_that_changed_are_refused(world, stopped, tmp_path):
    data = shutil.copytree(world / "data", tmp_path / "data")
    train = world / "data" / "sst2" / "train.jsonl"
    before = train.read_text()
    try:
        train.write_text(before.replace("good", "bad", 1))
        message = refused(*options(world), "--out", stopped, "--resume")
        assert "--resume: got other rows or another tokenizer" in message
    finally:
        train.write_text((data / "sst2" / "train.jsonl").read_text())
    call(*options(world), "--out", stopped, "--resume")


def test_a_target_stays_once_pruning_has_begun(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        Interrupting(patch, "prune", 5, KeyboardInterrupt())
        call(*options(world), "--out", out, code=130)
    message = refused(*options(world, "--target-sparsity", 0.4), "--out", out, "--resume")
    assert "got --target-sparsity 0.4, wanted --target-sparsity 0.8; its pruning has begun" in message
    call(*options(world), "--out", out, "--resume")
    assert "--target-sparsity 0.4" in refused(
        *options(world, "--target-sparsity", 0.4), "--out", out, "--resume"
    )


def test_a_target_found_out_of_reach_while_pruning_leaves_the_dense_model(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(feasibility, "highest_speedup", lambda *_: 1e9)
        message = call(*options(world, "--target-speedup", 50), "--out", out, code=1).stderr
    assert "--resume with another target" in message and (out / "dense" / "result.json").is_file()
    call(*options(world, "--target-speedup", 1.5), "--out", out, "--resume")
    assert len(json.loads((out / "result.json").read_text())["pruned"]["kept"]) < 3


@pytest.mark.parametrize("moment", ["load", "tokenize", "dense", "prune", "score"])
def test_ctrl_c_ends_in_one_line_at_any_moment(world, tmp_path, monkeypatch, moment):
    out = tmp_path / "out"

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment in ("dense", "prune"):
            Interrupting(patch, moment, 3, KeyboardInterrupt())
        else:
            places = {
                "load": "fastgate.data.load_task", "tokenize": "fastgate.data.task.Task.tokenize",
                "score": "fastgate.training.phases.score",
            }  # fmt: skip
            patch.setattr(places[moment], stop)
        message = call(*options(world), "--out", out, code=130).stderr
    written = moment not in ("load", "tokenize")
    assert ("--resume" in message) == written == out.exists()
    if not written:
        assert f"nothing was written to {out}" in message
        return
    call(*options(world), "--out", out, "--resume")
    kept = [json.loads((f / "result.json").read_text())["pruned"]["kept"] for f in (out, world / "out")]
    assert kept[0] == kept[1]


def test_a_signal_ends_a_process_with_130(world, tmp_path):
    out = tmp_path / "out"
    process = subprocesses.start(
        "import sys; from fastgate.cli.main import app; app(sys.argv[1:])",
        *options(world, "--epochs", 500),
        "--out",
        out,
    )
    for line in process.stdout:
        if "dense fine-tune" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors
    assert (
        errors.strip().splitlines()[-1].startswith("error: interrupted; run the same command with --resume")
    )


# -- a full disk


@pytest.fixture
def disk(tmp_path):
    """Make a disk of so many bytes, or give it another size."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = tmp_path / "disk"
    place.mkdir()
    sizes = []

    def resize(count):
        size = f"remount,size={count}" if sizes else f"size={count}"
        command = ["mount", "-t", "tmpfs", "-o", size, "none", place]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no mounting here")
        sizes.append(count)
        return place

    yield resize
    if sizes:
        subprocess.run(["umount", "-l", place], check=True)  # weights may be mapped still


@pytest.mark.parametrize("kilobytes", [4, 200, 1000])
def test_a_full_disk_is_told_in_one_line_and_the_run_resumes_later(world, disk, kilobytes):
    out = disk(kilobytes * 1024) / "out"
    message = call(*options(world), "--out", out, code=1).stderr
    assert "No space left on device" in message.splitlines()[-1]
    disk("64m")
    call(*options(world), "--out", out, "--resume")
    a, b = (load_file(f / "pruned" / "model.safetensors") for f in (out, world / "out"))
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("writer", ["text", "safetensors", "torch"])
def test_each_writers_error_for_a_full_disk_becomes_one(disk, writer):
    place = disk(64 * 1024)
    tensor = torch.zeros(100_000)
    write = {
        "text": lambda: (place / "a").write_text("x" * 400_000),
        "safetensors": lambda: save_file({"a": tensor}, place / "a"),
        "torch": lambda: torch.save(tensor, place / "a"),
    }[writer]
    with pytest.raises(OSError) as error, full_disk_as_oserror(place):
        write()
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(place)
    with pytest.raises(ValueError, match="another"), full_disk_as_oserror(place):
        raise ValueError("another")


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"old": 1})

    def fail(self, *_, **__):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError):
        write_json(tmp_path / "a.json", {"new": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"old": 1}


def test_a_folder_that_a_kill_left_before_its_first_file_is_taken(world, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".run.json.writing").write_text("{")
    call(*options(world), "--out", out)
    assert (out / "result.json").is_file()


def test_a_damaged_record_of_a_run_is_told(world, stopped):
    for content in ("", "{", "[]", "7", "\x00"):
        (stopped / "run.json").write_text(content)
        assert "run.json" in refused(*options(world), "--out", stopped, "--resume")


def test_a_demo_replaces_a_demo_and_nothing_else(world):
    before = sorted(path.name for path in (world / "out").iterdir())
    message = refused("demo", "--out", world / "out", "--task", "sst2", "--data-dir", world / "data")
    assert "holds a run of `fastgate finetune`" in message
    assert before == sorted(path.name for path in (world / "out").iterdir())
    assert "not empty" in refused("demo", "--out", world / "data")
    assert "--data-dir" in refused("demo", "--out", world / "demo", "--data-dir", world / "data")
    assert "demo: --out: got" in refused("demo", "--out", world / "file" / "in")


# -- what is out of reach


@pytest.mark.parametrize("kind, pooling", [("text", "mean"), ("pair", "first"), ("tokens", "first")])
def test_the_highest_speedup_is_the_one_that_pruning_counts(world, tmp_path, monkeypatch, kind, pooling):
    """Before training it is told from the lengths of the rows; the Pruner measures forwards."""
    from fastgate.pruning.objective import Objective

    many, label = range(24), [0, 1] * 12
    rows = {
        "text": [{"text": "good film " * (1 + i % 5), "label": label[i]} for i in many],
        "pair": [{"text": "good film", "text_pair": "bad " * (1 + i % 7), "label": label[i]} for i in many],
        "tokens": [{"tokens": ["she", "went"] * (1 + i % 4), "tags": ["x", "y"] * (1 + i % 4)} for i in many],
    }[kind]
    path = tiny_models.write_rows(tmp_path / "rows.jsonl", rows)
    told, counted = [], []
    highest, choose = feasibility.highest_speedup, Objective.choose
    monkeypatch.setattr(feasibility, "highest_speedup", lambda *a: told.append(highest(*a)) or told[-1])
    monkeypatch.setattr(
        Objective, "choose", lambda self, p, costs: counted.append(costs) or choose(self, p, costs)
    )
    call(
        "finetune", "--model", world / "model", "--task-type", kind, "--train", path, "--validation", path,
        "--target-speedup", 1.2, "--epochs", 1, "--prune-epochs", 3, "--batch-size", 24, "--max-length", 24,
        "--pooling", pooling, "--out", tmp_path / "out",
    )  # fmt: skip
    assert told == [pytest.approx(float(1 / counted[0].share(torch.zeros(3).double())), rel=1e-9)]


def test_roberta_has_positions_behind_that_of_its_padding(world, tmp_path):
    from transformers import RobertaConfig, RobertaModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=99, max_position_embeddings=40, pad_token_id=6, **sizes)
    model = fastgate.patch(RobertaModel(config))
    feasibility.check_length("finetune", "--max-length", 33, model)
    with pytest.raises(fastgate.errors.ArgumentError, match="--max-length: got 34, wanted 3 to 33"):
        feasibility.check_length("finetune", "--max-length", 34, model)


# -- consoles


@pytest.fixture(scope="module")
def odd(world, tmp_path_factory):
    """Folders and files with names that are markup, emoji codes, or not ASCII."""
    folder = tmp_path_factory.mktemp("odd[bold]") / "runs[" / "x] :smile: é"
    folder.parent.mkdir()
    shutil.copytree(world / "out", folder)
    return folder


@pytest.fixture(scope="module")
def odd_out(world, tmp_path_factory):
    """A finished run in a folder with an odd name: resuming it prints its result again."""
    out = tmp_path_factory.mktemp("a[b]") / "[/x] é ☃ :smile:"
    return shutil.copytree(world / "out", out)


def _shows_the_name(shown, encoding):
    snowman = "☃" if encoding == "utf-8" else "\\u2603"
    assert "[/x] " in shown and "a[b]" in shown and ":smile:" in shown and snowman in shown


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_a_name_is_printed_as_it_is_on_any_console(world, odd_out, monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors="strict"))
    monkeypatch.setenv("COLUMNS", "20")
    app([str(a) for a in (*options(world), "--out", odd_out, "--resume")], standalone_mode=False)
    sys.stdout.flush()
    _shows_the_name(written.getvalue().decode(encoding), encoding)


def test_a_process_whose_console_is_not_utf_8_prints_the_name(world, odd_out):
    environment = {
        **os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": subprocesses.PACKAGE_PARENT,
        "COLUMNS": "20", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "fastgate",
        *map(str, options(world)),
        "--resume",
        "--out",
        odd_out,
    ]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    _shows_the_name(done.stdout.decode("ascii"), "ascii")


def test_a_name_that_the_locale_cannot_spell_is_told(world, tmp_path):
    out = os.fsencode(str(tmp_path)) + b"/caf\xe9"
    environment = {
        **os.environ, "PYTHONPATH": subprocesses.PACKAGE_PARENT, "LC_ALL": "C", "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "fastgate", *map(str, options(world)), "--out", out]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    assert done.returncode == 2 and b"--out" in done.stderr and b"PYTHONUTF8=1" in done.stderr


def test_names_with_brackets_reach_the_screen(world, odd, tmp_path):
    rows = [
        {"text": row["sentence"], "label": ["negative", "positive"][row["label"]]}
        for row in tiny_models.sentiment(8)
    ]
    path = tiny_models.write_rows(tmp_path / "dev[seed=1][x].jsonl", rows)
    shown = call("evaluate", odd / "dense", "--task-type", "text", "--validation", path).stdout
    assert "dev[seed=1][x]: 8 rows" in shown
    message = refused("explain", odd.with_name("no[bold]thing"))
    assert "no[bold]thing" in message
    data = [
        "--task",
        "sst2",
        "--data-dir",
        world / "data",
        "--max-length",
        24,
        "--batches",
        1,
        "--against",
        "sdpa",
    ]
    assert "x] :smile: é" in call("bench", "--model", odd / "pruned", *data).stdout


@pytest.mark.parametrize("redirected", ["| head -c 1", "2>&- >&-", "> /dev/full"])
def test_an_output_that_nobody_reads_is_no_fault(world, redirected):
    command = f"'{sys.executable}' -m fastgate explain '{world / 'out' / 'pruned'}' {redirected}"
    environment = {**os.environ, "PYTHONPATH": subprocesses.PACKAGE_PARENT}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=120
    )
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 2, done.stderr


def test_a_fault_of_fastgate_keeps_its_traceback_and_says_whose_it_is(world, monkeypatch):
    def fail(*_, **__):
        raise KeyError("inner")

    monkeypatch.setattr("fastgate.training.evaluate.read_model", fail)
    result = CliRunner().invoke(app, ["explain", str(world / "out" / "pruned")])
    assert isinstance(result.exception, KeyError) and result.exit_code == 1
    assert "error: KeyError: a fault of fastgate's own; please report it" in result.stderr


def test_wrong_usage_of_the_program_is_told_in_one_line():
    for arguments in (["--nothing"], ["nothing"], ["info", "more"], ["explain"], ["info", "--jsn"]):
        assert "--help" in refused(*arguments, code=2)
    shown = CliRunner().invoke(app, [])
    assert "finetune" in shown.output and "Traceback" not in shown.output
