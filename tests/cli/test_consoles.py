"""Consoles that are not UTF-8, odd names, outputs that nobody reads, and faults of fastgate's own."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys

import pytest
from helpers import subprocesses, tiny_models
from helpers.commands import call, refused
from helpers.finetune_commands import make_world, options
from typer.testing import CliRunner

from fastgate.cli.main import app

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("consoles"))


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
    assert "error: KeyError: a bug in fastgate; please report it" in result.stderr
