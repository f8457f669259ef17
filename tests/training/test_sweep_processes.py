"""The processes of a sweep: interrupted, killed or kept waiting, nothing is lost or unsaid."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import subprocesses
from helpers.commands import call
from helpers.sweep_commands import command_of, make_world

from fastgate.training import sweep as sweeps
from fastgate.training.sweep_config import read_sweep_config
from fastgate.training.sweep_results import read_lines

pytestmark = pytest.mark.slow

CODE = "import sys; from fastgate.cli.main import app; app(sys.argv[1:])"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("sweep"))


def processes_of(folder):
    """Ids of the processes whose command names this folder."""
    ids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                ids.append(int(path.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return ids


def wait_until(true, seconds=120):
    deadline = time.time() + seconds
    while not true() and time.time() < deadline:
        time.sleep(0.1)
    assert true()


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent_and_the_sweep_resumes(world, tmp_path, end):
    """SIGTERM ends the parent at once, as SIGKILL does: it does nothing any more that could end a worker."""
    command = command_of(world, tmp_path, "--workers", 2, seeds=[0, 1], dense_epochs=400)
    parent = subprocesses.start(CODE, *command)
    try:
        wait_until(lambda: len(list((tmp_path / "work").glob("*/*/dense/checkpoint-*"))) >= 2)
        assert len(processes_of(tmp_path)) == 3  # the parent and two workers
        parent.send_signal(end)
        parent.wait(timeout=30)
        wait_until(lambda: not processes_of(tmp_path), seconds=15)
    finally:
        for process in processes_of(tmp_path):
            os.kill(process, signal.SIGKILL)
        _, errors = parent.communicate()
    if end == signal.SIGINT:
        assert parent.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
        assert errors.count("error:") == 1
    else:
        assert parent.returncode == -end
    # No lock is left and what was trained is used.
    checkpoints = sorted((tmp_path / "work").glob("*/*/dense/checkpoint-*"))
    assert checkpoints
    for run in read_sweep_config(tmp_path / "recipe.yaml"):
        with sweeps._lock(tmp_path / "work", run.dense_name).acquire(timeout=0):
            pass


HOLD = """
import signal, sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_what_another_process_holds_is_said_and_is_no_success(world, tmp_path, workers):
    command = command_of(world, tmp_path, "--workers", workers, seeds=[0, 1])
    runs = read_sweep_config(tmp_path / "recipe.yaml")
    (tmp_path / "work").mkdir()
    lock = tmp_path / "work" / f"{runs[0].dense_name}.lock"
    holder = subprocesses.start(HOLD, lock)
    assert holder.stdout.readline() == "held\n"
    result = call(*command, code=1)
    assert f"another process holds {lock}" in result.stderr
    assert "2 of 4 runs are left" in result.stderr
    assert {line["seed"] for line in read_lines(tmp_path / "tasks.jsonl")} == {1}
    holder.kill()
    holder.communicate()
    printed = call(*command, "--workers", 1).output
    assert len(read_lines(tmp_path / "tasks.jsonl")) == 4
    assert "4 runs, 2 of them in" in printed
    assert "4 of them in" in call(*command).output  # nothing left is a success, and is said


def test_a_worker_that_is_killed_is_no_success(world, tmp_path, monkeypatch):
    command = command_of(world, tmp_path, "--workers", 2, seeds=[0, 1])
    monkeypatch.setattr("fastgate.training.workers.run_workers", lambda *_: [-9, 0])
    message = call(*command, code=1).stderr
    assert "4 of 4 runs are left, 1 of 2 workers ended early" in message
    assert "its process ended too early" in message


def test_progress_is_printed_without_a_terminal(world, tmp_path):
    lines = call(*command_of(world, tmp_path)).stdout.splitlines()
    assert lines[0].startswith("2 runs, 0 of them in ") and "group 1 of 1" in lines[1]
    for part in (
        "dense fine-tune: step 3 of 3",
        "self-prune (recover): step 3 of 3",
        "sst2 seed 0 dense kept",
    ):
        assert any(part in line for line in lines), lines


def test_ctrl_c_in_a_sweep_says_how_to_continue(world, tmp_path, monkeypatch):
    command = command_of(world, tmp_path)

    def stop(*_, **__):
        raise KeyboardInterrupt

    for place in ("load_task", "do_group", "do_run", "append_line"):
        with monkeypatch.context() as patch:
            patch.setattr(sweeps, place, stop)
            message = call(*command, code=130).stderr
        assert message.endswith(f"continue with: {shlex.join(['fastgate', *map(str, command)])}\n")
    call(*command)
    assert len(read_lines(tmp_path / "tasks.jsonl")) == 2
