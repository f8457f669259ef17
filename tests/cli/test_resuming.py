"""Ctrl-C, a signal and --resume: what a stopped run says, takes up again, and lets one change."""

from __future__ import annotations

import json
import shlex
import shutil
import signal

import pytest
import torch
from helpers import subprocesses
from helpers.commands import call, refused
from helpers.finetune_commands import make_world, options
from safetensors.torch import load_file

from fastgate.cli.progress import Display
from fastgate.training import feasibility

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("resuming"))


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
    assert "got --target-sparsity 0.4, wanted --target-sparsity 0.67; its pruning has begun" in message
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


def test_ctrl_c_prints_the_command_that_resumes(world, tmp_path, monkeypatch):
    """Quoted for a shell, also for the second time, when --resume is there already."""
    out = tmp_path / "two  blanks and 'quotes'"
    command = [*options(world), "--out", out]
    for phase in ("dense", "prune"):
        with monkeypatch.context() as patch:
            Interrupting(patch, phase, 3, KeyboardInterrupt())
            message = call(*command, code=130).stderr
        program, *command = shlex.split(message.rpartition(" checkpoint with: ")[2])
        assert program == "fastgate" and command.count("--resume") == 1
        assert command[: len(options(world))] == [str(argument) for argument in options(world)]
    call(*command)
    result = json.loads((out / "result.json").read_text())
    assert result["settings"]["sparsity"] == 0.67 and len(result["pruned"]["kept"]) == 1


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
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: interrupted; continue from the last checkpoint with: fastgate finetune ")


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
