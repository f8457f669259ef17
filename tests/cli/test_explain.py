"""`fastgate explain` for given lengths and for those of a task; commands whose reader has gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from helpers import subprocesses, tiny_models
from helpers.commands import refused, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    tiny_models.model_folder(folder / "model")
    tiny_models.sentiment_folder(folder / "data")
    return folder


def explained(*arguments):
    return json.loads(run("explain", *arguments, "--json").stdout)


def test_lengths_are_chosen(world):
    few, one = (
        explained(world / "model", "--lengths", "8, 16,32"),
        explained(world / "model", "--lengths", "40"),
    )
    assert few["lengths"] == [8, 16, 32] and few["unpadded_rows"] == 56
    assert one["lengths"] == [40] and one["unpadded_rows"] == 40
    shown = run("explain", world / "model", "--lengths", "8,16,32").stdout
    assert shown.startswith("batch: 3 sequences of 8, 16, 32 tokens\n") and "--task" not in shown
    shown = run("explain", world / "model").stdout
    assert "8 sequences of 32 tokens" in shown and "Other lengths: --lengths 8,16,32, or --task" in shown


def test_lengths_of_a_task(world):
    """Each is that of a row with its two special tokens."""
    splits = [world / "data" / "sst2" / f"{name}.jsonl" for name in ("validation", "test")]
    rows = [json.loads(line) for path in splits for line in path.read_text().splitlines()]
    data = ["--task", "sst2", "--data-dir", world / "data"]
    found = explained(world / "model", *data, "--max-length", 64)["lengths"]
    assert sorted(found) == sorted(len(row["sentence"].split()) + 2 for row in rows)
    cut = explained(world / "model", *data, "--max-length", 6)["lengths"]
    assert sorted(cut) == sorted(min(length, 6) for length in found)
    shown = run("explain", world / "model", *data, "--max-length", 64).stdout
    assert shown.startswith("sst2: 96 evaluation rows, cut to 64 tokens\nbatch: 96 sequences of ")
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "8,x"], "explain: --lengths: got '8,x', wanted numbers of tokens"),
        (["--lengths", ","], "explain: --lengths: got ','"),
        (["--lengths", "-3"], "explain: --lengths: got '-3'"),
        (["--lengths", "0"], "explain: lengths: got [0]"),
        (["--lengths", "8,65"], "got a sequence of 65 tokens, wanted at most 64, the model's position table"),
        (["--lengths", "8", "--task", "sst2"], "got --lengths and --task, wanted one of them"),
        (["--data-dir", "."], "explain: --data-dir: got it without --task"),
        (["--task", "sst2", "--data-dir", "DATA", "--max-length", "65"], "wanted 3 to 64 tokens"),
        (["--task", "sst3"], "one of sst2, cola"),
    ],
)
def test_lengths_that_cannot_be(world, options, message):
    options = [str(world / "data") if option == "DATA" else option for option in options]
    assert message in refused("explain", world / "model", *options)


@pytest.mark.parametrize("command", ["fastgate.env", "fastgate info"])
@pytest.mark.parametrize("reader", ["true", "head -1"])
def test_a_reader_that_has_gone_is_no_fault(command, reader):
    environment = {**os.environ, "PYTHONPATH": subprocesses.PACKAGE_PARENT}
    done = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -m {command} | {reader}"],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.stderr == "" and done.stdout in ("", "versions\n")
