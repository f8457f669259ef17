"""A sweep that is interrupted, killed, shared or given a hostile sweep file: nothing is lost or unsaid."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import subprocesses, tiny_models
from helpers.commands import call, refused

from fastgate.errors import ArgumentError, DataError, FastgateError
from fastgate.training import sweep as sweeps
from fastgate.training.sweep_config import MAX_RUNS, expand, read_sweep_config
from fastgate.training.sweep_results import append_line, check_results, read_lines

pytestmark = pytest.mark.slow

QUICK = {"dense_epochs": 1, "dense_lr": 1e-3, "epochs": 1, "lr": 1e-3, "max_length": 24, "batch_size": 16}
CODE = "import sys; from fastgate.cli.main import app; app(sys.argv[1:])"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep-faults")
    tiny_models.model_folder(folder / "model")
    tiny_models.sentiment_folder(folder / "data")
    return folder


def sweep_file(world, path, **changes):
    import yaml

    runs = [{"method": "dense"}, {"method": "fixed", "keep": [0]}]
    config = {"model": str(world / "model"), "tasks": ["sst2"], "seeds": [0], **QUICK, "runs": runs} | changes
    path.write_text(yaml.safe_dump(config))
    return path


def command_of(world, folder, *more, **changes):
    recipe = sweep_file(world, folder / "recipe.yaml", **changes)
    return [
        "sweep",
        recipe,
        "--data-dir",
        world / "data",
        "--out",
        folder / "tasks.jsonl",
        "--work",
        folder / "work",
        *more,
    ]


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


# -- processes


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
        assert "run the same command again to continue" in message
    call(*command)
    assert len(read_lines(tmp_path / "tasks.jsonl")) == 2


# -- the file of results


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
    assert (tmp_path / "report[x]" / "tables.md").is_file()


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


# -- sweep configs


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"max_length": 65}, "max_length: got 65, wanted 3 to 64"),
        ({"epochs": 0.2}, "epochs: got 0.2, which is 1 optimizer step of 16 rows"),
        ({"runs": [{"method": "learned", "speedup": 99}]}, "speedup: got 99, wanted at most"),
        ({"runs": [{"method": "random", "sparsity": 0.01}]}, "sparsity: got 0.01, which is 0 of 3"),
        ({"runs": [{"method": "fixed", "keep": [0, 7]}]}, "different layers from 0 to 2"),
        ({"runs": [{"method": "learned", "speedup": 1.5, "gates": "exact"}]}, "Sparsity with exact gates"),
        ({"runs": [{"method": "learned", "sparsity": 0.5, "warm": 0.9}]}, "warm"),
        ({"tasks": ["sst2", "mrpc"]}, "mrpc"),
        ({"model": "/nothing"}, "/nothing"),
        ({"evaluate_on": "nope"}, "nope"),
    ],
)
def test_a_sweep_is_checked_whole_before_anything_trains(world, tmp_path, monkeypatch, changes, expected):
    monkeypatch.setattr("fastgate.training.phases.TaskTrainer.dense", lambda *_: pytest.fail("it trains"))
    assert expected in call(*command_of(world, tmp_path, **changes), code=1).stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "key, value",
    [
        *(
            (key, value)
            for key in ("lr", "epochs", "dense_epochs", "dense_lr")
            for value in (0, -1, "x", None, {})
        ),
        *((key, value) for key in ("batch_size", "max_length") for value in (0, -1, 2.5, "8", True, None)),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("sparsity", 1),
        ("sparsity", "half"),
        ("speedup", 1),
        ("keep", 3),
        ("keep", ["a"]),
        ("keep", [-1]),
        ("keep", {}),
        ("method", 3),
        ("method", None),
        ("replacement", "glue"),
        ("replacement", 1),
        ("gates", "soft"),
        ("bf16", 1),
        ("bf16", "yes"),
        ("model", 7),
        ("model", {}),
        ("stride", -1),
        ("train_rows", 0),
        ("eval_rows", -2),
        ("evaluate_on", 3),
        ("dropout", 1),
        ("swap", 2),
        ("temperature", 0),
        ("hidden", -1),
        ("teacher", []),
        ("lr", [[1]]),
        ("pooling", 1),
        ("seed", 3),
        ("task", "sst2"),
        ("unknown", 1),
        (3, 4),
        (None, 1),
        ("replacement_lr", 0),
    ],
)
def test_a_value_that_a_key_cannot_have_is_refused_by_its_name(key, value):
    run = {"method": "learned", "sparsity": 0.5, key: value}
    for recipe in (
        {"tasks": ["sst2"], "runs": [run]},
        {"tasks": ["sst2"], "runs": [{"method": "learned"}], "sparsity": 0.5, key: value},
        {"tasks": ["sst2"], "runs": [{"method": "learned", "sparsity": 0.5}], "per_task": {"sst2": run}},
    ):
        if key in ("method", "sparsity") and recipe["runs"] != [run]:
            continue  # the run says it again
        if isinstance(value, list) and key == "teacher":
            continue
        with pytest.raises(ArgumentError, match=str(key)):
            expand(recipe)


@pytest.mark.parametrize(
    "recipe",
    [
        {"tasks": 5},
        {"tasks": {"sst2": 1}},
        {"tasks": [["sst2"]]},
        {"tasks": [None]},
        {"tasks": ["sst2"], "seeds": []},
        {"tasks": ["sst2"], "seeds": ["a"]},
        {"tasks": ["sst2"], "seeds": [1.5]},
        {"tasks": ["sst2"], "seeds": [-1]},
        {"tasks": ["sst2"], "seeds": [2**40]},
        {"tasks": ["sst2"], "seeds": {}},
        {"tasks": ["sst2"], "runs": 3},
        {"tasks": ["sst2"], "runs": ["dense"]},
        {"tasks": ["sst2"], "runs": {"method": "dense"}},
        {"tasks": ["sst2"], "runs": [None]},
        {"tasks": ["sst2"], "per_task": []},
        {"tasks": ["sst2"], "per_task": {"x": {}}},
        {"tasks": ["sst2"], "per_task": {"sst2": 3}},
        {"tasks": ["sst2"], "runs": [{"seeds": [1]}]},
    ],
)
def test_sweep_configs_of_the_wrong_shape_are_refused(recipe):
    with pytest.raises(FastgateError, match="sweep: "):
        expand({"runs": [{"method": "dense"}], **recipe})


def test_numbers_that_yaml_takes_for_texts_are_numbers(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("tasks: [sst2]\nlr: 5e-5\nruns: [{method: learned, sparsity: 0.5}]\n")
    assert read_sweep_config(path)[0].prune_lr == 5e-5


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)


@pytest.mark.parametrize(
    "content",
    [
        BOMB,
        BOMB.replace("a: &a", "tasks: &a"),
        f"tasks: [sst2]\nlr: {'[' * 5000}",
        "tasks: &a [*a]",
        "runs: &a\n  - *a\ntasks: [sst2]",
        "!!python/object/apply:os.system [touch owned]",
        "a: 2021-99-99",
        "a: " + "9" * 5000,
        "\x00",
        "\t- a",
        "? [a]\n: b\ntasks: [sst2]",
        "- 1",
        "",
        "7",
        "tasks: [sst2]\n" + "#" * 2**21,
        "tasks: [sst2]\nseeds: " + str(list(range(30000))) + "\nruns: [{method: dense}]",
        "tasks: [sst2]\nruns:\n- method: learned\n"
        + "".join(
            f"  {key}: [0.1, 0.2, 0.3, 0.4]\n"
            for key in ("sparsity", "logits", "hidden", "labels", "warm", "lr", "swap", "dropout")
        ),
    ],
)
def test_hostile_sweep_files_are_refused_at_once(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe[x].yaml"
    path.write_text(content)
    start = time.time()
    message = refused("sweep", path)
    assert time.time() - start < 20 and len(message) < 2000
    assert not (tmp_path / "owned").exists() and not (tmp_path / "sweep-work").exists()
    path.write_bytes(b"\xff\xfe")
    assert "recipe[x].yaml" in refused("sweep", path)
    for path in (tmp_path, tmp_path / "none.yaml"):
        assert f"sweep file: got {path}" in refused("sweep", path)


def test_as_many_runs_as_a_sweep_config_may_have():
    runs = [{"method": "dense"}]
    assert len(expand({"tasks": ["sst2"], "seeds": list(range(50)), "runs": runs})) == 50
    with pytest.raises(ArgumentError, match=f"{MAX_RUNS + 1} runs"):
        expand({"tasks": ["sst2"], "seeds": list(range(MAX_RUNS + 1)), "runs": runs})


def test_the_list_of_what_is_left_writes_nothing(world, tmp_path):
    listed = call(*command_of(world, tmp_path, "--left")).stdout.splitlines()
    assert len(listed) == 2 and all(json.loads(line)["task"] == "sst2" for line in listed)
    assert not (tmp_path / "work").exists() and not (tmp_path / "tasks.jsonl").exists()


def test_a_file_of_results_that_is_no_utf8_raises(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(DataError, match="results"):
        read_lines(tmp_path / "a")
