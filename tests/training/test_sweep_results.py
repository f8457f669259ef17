"""The file of results: a line cut off, another file in its place, places that cannot be written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.commands import call, refused
from helpers.sweep_commands import command_of, make_world

from fastgate.errors import ArgumentError, DataError
from fastgate.training import sweep as sweeps
from fastgate.training.sweep_results import append_line, check_results, read_lines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("sweep"))


def line_of(number):
    return {"settings": {"task": "sst2", "seed": number}, "score": 0.5}


def test_a_line_cut_off_anywhere_is_mended_and_no_other_is_touched(tmp_path):
    out = tmp_path / "tasks.jsonl"
    first, second = (json.dumps(line_of(i)) + "\n" for i in range(2))
    for cut in range(len(second) + 1):
        out.write_text(first + second[:cut])
        append_line(out, line_of(1))
        append_line(out, line_of(2))
        text = out.read_text()
        assert text.startswith(first) and text.endswith("\n") and text.count("\n") == 3
        assert [line["settings"]["seed"] for line in read_lines(out)] == [0, 1, 2], cut


def test_a_run_is_written_once(tmp_path):
    for _ in range(3):
        append_line(tmp_path / "new" / "tasks.jsonl", line_of(1))
    assert len(read_lines(tmp_path / "new" / "tasks.jsonl")) == 1


def test_another_file_is_no_place_for_results(world, tmp_path):
    command = command_of(world, tmp_path)
    for content in (
        b"my notes\nmore",
        b"\xff\xfe\x00",
        b"[1]\n",
        b'{"a": 1}\n',
        b"7\n",
        b"null x\n",
        b'"a"\n',
    ):
        (tmp_path / "tasks.jsonl").write_bytes(content)
        message = refused(*command)
        assert "tasks.jsonl" in message
        assert (tmp_path / "tasks.jsonl").read_bytes() == content
        if content != b"[1]\n":
            assert "tasks.jsonl" in refused("report", tmp_path / "tasks.jsonl", "--out", tmp_path / "r")
    assert not (tmp_path / "work").exists() and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "content", [None, b"", b"\x00\x01", b"{}", b"[]", b'{"settings": {}}', b'{"settings": {"max_length": 1}}']
)
def test_report_on_another_file_is_refused(tmp_path, content):
    path = tmp_path / "lines.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refused("report", path, "--out", tmp_path / "report")
    assert str(tmp_path) in refused("report", tmp_path, "--out", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_report_checks_its_options_first(world, tmp_path):
    done = command_of(world, tmp_path)
    call(*done)
    lines = tmp_path / "tasks.jsonl"
    assert len(read_lines(lines)) == 2
    check_results(lines)
    assert "--dtype" in refused("report", lines, "--dtype", "half")
    assert "--out" in refused("report", lines, "--out", lines)
    assert "--out" in refused("report", lines, "--out", lines / "in")
    assert "nothing.yaml" in refused("report", lines, "--recipe", world / "nothing.yaml")
    (tmp_path / "speeds.json").write_text("[")
    assert "speeds.json" in refused("report", lines, "--out", tmp_path / "report")
    (tmp_path / "speeds.json").unlink()
    call("report", lines, "--out", tmp_path / "report[x]")
    assert (tmp_path / "report[x]" / "report.md").is_file()


@pytest.mark.parametrize(
    "option, path", [("--out", "FILE/in"), ("--work", "FILE"), ("--work", "FILE/in"), ("--out", ".")]
)
def test_places_that_cannot_be_written_are_found_first(world, tmp_path, option, path):
    (tmp_path / "file").write_text("")
    message = refused(*command_of(world, tmp_path), option, path.replace("FILE", str(tmp_path / "file")))
    assert option in message


def test_results_that_cannot_be_read_or_written_are_found_first(tmp_path, monkeypatch):
    out = tmp_path / "tasks.jsonl"
    out.touch()

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path) != out)
        with pytest.raises(ArgumentError, match=r"--out: got .*, which cannot be written to"):
            sweeps.check_files(out, tmp_path / "work")
    with monkeypatch.context() as patch:
        patch.setattr(sweeps.Path, "is_file", forbidden)
        with pytest.raises(DataError, match="Permission denied"):
            read_lines(out)
    assert not (tmp_path / "work").exists()


def test_the_list_of_what_is_left_writes_nothing(world, tmp_path):
    listed = call(*command_of(world, tmp_path, "--left")).stdout.splitlines()
    assert len(listed) == 2 and all(json.loads(line)["task"] == "sst2" for line in listed)
    assert not (tmp_path / "work").exists() and not (tmp_path / "tasks.jsonl").exists()


def test_a_file_of_results_that_is_no_utf8_raises(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(DataError, match="results"):
        read_lines(tmp_path / "a")
