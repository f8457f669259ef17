"""A full disk is told in one line, whoever writes, and the run resumes later."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import call
from helpers.finetune_commands import make_world, options
from safetensors.torch import load_file, save_file

from fastgate.training.disk import full_disk_as_oserror, write_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("full-disk"))


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
