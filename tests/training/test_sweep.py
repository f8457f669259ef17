"""A sweep: the runs of a sweep config, every method, resuming after a kill, several processes."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import subprocesses, tiny_models
from helpers.commands import run

from fastgate.errors import ArgumentError, DataError
from fastgate.pruning import Distill, Fixed, Sparsity, trainer
from fastgate.training import sweep as sweeps
from fastgate.training import workers
from fastgate.training.sweep import runs_left
from fastgate.training.sweep_config import SweepRun, expand, make_run, read_sweep_config
from fastgate.training.sweep_results import read_lines

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[2] / "bench"
QUICK = {
    "dense_epochs": 1, "dense_lr": 1e-3, "epochs": 1, "lr": 1e-3, "max_length": 24, "batch_size": 16,
}  # fmt: skip
EVERY = [
    {"method": "dense"},
    {"method": "dense_longer"},
    {"method": ["learned", "random", "top_drop", "every_other", "greedy"], "sparsity": 0.67},
    {"method": "learned", "speedup": 1.2, "hidden": 0, "logits": 0},
    {"method": "fixed", "keep": [0, 2], "replacement": "affine", "hidden": 3},
    {"method": "learned", "max_drop": 0.9},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model and two tasks in files."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny_models.model_folder(folder / "model")
    words, tags = ["she", "went", "to", "paris"], ["O", "O", "O", "B-location"]
    tagged = [{"tokens": words[: 1 + i % 4], "ner_tags": tags[: 1 + i % 4]} for i in range(48)]
    tiny_models.sentiment_folder(folder / "data")
    for split in ("train", "validation", "test"):
        tiny_models.write_rows(folder / "data" / "wnut17" / f"{split}.jsonl", tagged)
    return folder


def sweep_file(world, path, **changes):
    import yaml

    config = {
        "model": str(world / "model"),
        "tasks": ["sst2"],
        "seeds": [0],
        **QUICK,
        "runs": EVERY,
    } | changes
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_sweep_config_stands_for_its_runs():
    runs = expand(
        {
            "tasks": ["sst2", "imdb"], "seeds": [0, 1], "epochs": 2, "hidden": [1, 10],
            "runs": [{"method": ["learned", "random"], "sparsity": [0.5, 0.67]}, {"method": "dense"}],
            "per_task": {"imdb": {"max_length": 256, "hidden": 5}},
        }
    )  # fmt: skip
    assert len(runs) == len(set(runs)) == 2 * (2 * 2 * 2 + 1) + 2 * (2 * 2 + 1)
    imdb = [run for run in runs if run.task == "imdb"]
    assert {run.max_length for run in imdb} == {256} and {run.prune_epochs for run in imdb} == {2, 3}
    assert {run.pruning.hidden for run in imdb} == {5, None}  # a dense run has nothing of a pruning
    assert len({run.dense_name for run in runs}) == 4 and len({run.name for run in runs}) == len(runs)
    fixed = expand({"tasks": "sst2", "runs": [{"method": "fixed", "keep": [1, 4]}]})[0]
    assert fixed.target == Fixed((1, 4)) and fixed.identity["keep"] == [1, 4]


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "tasks: got none"),
        ({"tasks": ["sst3"], "runs": [{"method": "dense"}]}, "tasks: got 'sst3', wanted one of sst2"),
        ({"tasks": ["sst2"], "epoch": 2}, "sweep file: got epoch, wanted .*epochs"),
        ({"tasks": ["sst2"], "runs": [{"method": "magic"}]}, "method: got 'magic', wanted one of dense"),
        (
            {"tasks": ["sst2"], "runs": [{"method": "learned"}]},
            "target: got none, wanted one of sparsity, speedup",
        ),
        ({"tasks": ["sst2"], "runs": [{"method": "random", "sparsity": 2}]}, "sparsity: got 2, wanted a"),
        ({"tasks": ["sst2"], "runs": [{"method": "random", "speedup": 2}]}, "target: got speedup 2"),
        ({"tasks": ["sst2"], "runs": [{"method": "fixed"}]}, "keep: got none"),
        (
            {"tasks": ["sst2"], "runs": [{"method": "learned", "sparsity": 0.5, "max_drop": 0.1}]},
            "target: got sparsity 0.5, max_drop 0.1, wanted one of sparsity, speedup, max_drop",
        ),
        (
            {"tasks": ["sst2"], "sparsity": 0.5, "runs": [{"method": "fixed", "keep": [1]}]},
            "target: got sparsity 0.5, keep .*, wanted one of keep; .* null for the others",
        ),
        ({"tasks": ["sst2"], "runs": [{"method": "dense", "pooling": "max"}]}, "pooling: got 'max', wanted"),
        (
            {"tasks": ["wnut17"], "runs": [{"method": "dense", "pooling": "mean"}]},
            "pooling: got mean for wnut17",
        ),
        ({"tasks": ["sst2"], "runs": [{"method": "dense", "teacher": "me"}]}, "teacher: got 'me', wanted"),
    ],
)
def test_settings_that_no_run_can_have_are_refused(config, message):
    with pytest.raises(ArgumentError, match=message):
        expand(config)


@pytest.mark.parametrize(
    "text, message", [("a: [", "correct the file"), ("- a", "a list"), (None, "No such file")]
)
def test_files_that_are_no_sweep_config_are_refused(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_sweep_config(path)


def test_the_settings_reach_the_pruner():
    plain = pruning_of(sparsity=0.5, seed=3)
    assert plain.seed == 3 and plain.distill == Distill()
    assert pruning_of("tokens").distill == Distill.for_tokens() != Distill()
    assert pruning_of("tokens", swap=0.2).distill == replace(Distill.for_tokens(), swap=0.2)
    changed = pruning_of(
        hidden=10, temperature=4, labels=1, dropout=0.1, swap=0.3, harden=0.4, gate_lr=0.1,
        replacement="affine", replacement_lr=3,
    )  # fmt: skip
    assert changed.distill == Distill(hidden=10, temperature=4, labels=1, dropout=0.1, swap=0.3)
    assert changed.replacement_lr == 3
    assert (changed.harden, changed.gate_lr, changed.replacement) == (0.4, 0.1, "affine")
    assert pruning_of(hidden=0, logits=0).distill is None


def pruning_of(kind="text", sparsity=0.67, **settings):
    """The PruningConfig of a run with these settings."""
    run = make_run({"task": "sst2", "sparsity": sparsity, **settings})
    return run.pruning_config(kind, run.target)


class Swept:
    """A sweep of every method that has ended, with what it printed and wrote."""

    def __init__(self, world, folder):
        self.config, self.folder = sweep_file(world, folder / "sweep.yaml"), folder
        self.command = [
            "sweep", self.config, "--data-dir", world / "data", "--out", folder / "tasks.jsonl",
            "--work", folder / "work",
        ]  # fmt: skip
        self.listed = run(*self.command, "--left").output.splitlines()
        self.printed = run(*self.command).output
        self.lines = read_lines(folder / "tasks.jsonl")

    def line(self, method, key="sparsity"):
        """The line of the only run of a method with a target under that key, None for no target."""
        (line,) = [
            line
            for line in self.lines
            if line["method"] == method and (key is None or line["settings"][key] is not None)
        ]
        return line


@pytest.fixture(scope="module")
def swept(world, tmp_path_factory):
    return Swept(world, tmp_path_factory.mktemp("swept"))


def test_every_run_is_listed_printed_and_written(swept, world):
    assert len(swept.listed) == len(swept.lines) == 10
    assert len(re.findall(r"sst2 seed 0 \w+ kept", swept.printed)) == 10
    assert [json.loads(text) for text in swept.listed] == [line["settings"] for line in swept.lines]
    for line in swept.lines:
        assert str(world) not in json.dumps(line)


@pytest.mark.parametrize("method", ["learned", "random", "top_drop", "every_other", "greedy"])
def test_every_method_removes_the_share_it_was_told(swept, method):
    line = swept.line(method)
    assert len(line["kept"]) == 1 and line["layers"] == 3 and line["target"] == 0.67
    assert method != "top_drop" or line["kept"] == [0]


def test_methods_without_a_share_keep_what_they_say(swept):
    assert swept.line("fixed", key="keep")["kept"] == [0, 2]
    assert swept.line("dense", key=None)["kept"] == swept.line("dense_longer", key=None)["kept"] == [0, 1, 2]


def test_a_budget_is_searched_for_on_rows_held_out(swept):
    line = swept.line("learned", key="max_drop")
    assert len(line["kept"]) == 1 and set(line["attempts"]) == {"1", "2"} and line["rows"] < 48
    assert all("attempts" not in other for other in swept.lines if other is not line)


def test_lines_name_the_replacement(swept):
    assert (
        swept.line("learned")["replacement"] == swept.line("learned", key="speedup")["replacement"] == "shift"
    )
    assert swept.line("fixed", key="keep")["replacement"] == "affine"
    assert swept.line("dense", key=None)["replacement"] is None


def test_lines_hold_scores_times_and_the_environment(swept):
    dense = swept.line("dense", key=None)
    assert dense["score"] == dense["dense_score"] and dense["train_seconds"] == 0.0
    budget = swept.line("learned", key="max_drop")  # its dense model was trained on fewer rows
    for line in swept.lines:
        assert line["task"] == "sst2" and line["metric"] == "accuracy" and 0.0 <= line["score"] <= 1.0
        assert line["model"] == "model" and line["scored"] == 96
        assert line is budget or line["dense_score"] == dense["score"]
        assert line["environment"]["torch"] and (line["train_seconds"] > 0) == (line["method"] != "dense")
    assert swept.line("learned")["gates"][0]["open"]


def test_a_finished_sweep_does_nothing_when_it_is_called_again(swept):
    assert run(*swept.command, "--left").output == ""
    before = (swept.folder / "tasks.jsonl").read_bytes()
    run(*swept.command)
    assert (swept.folder / "tasks.jsonl").read_bytes() == before


def test_only_the_dense_models_stay_in_the_work_folder(swept):
    work = swept.folder / "work"
    folders = {path.name for path in work.iterdir() if path.is_dir()}
    assert folders == {run.dense_name for run in read_sweep_config(swept.config)} and len(folders) == 2
    assert {path.name for folder in folders for path in (work / folder).iterdir()} == {"dense"}


def test_the_teacher_is_the_dense_model_or_the_student(world, tmp_path, monkeypatch):
    with_teacher = []

    class Watched(trainer.Pruner):
        def __init__(self, model, config, total_steps, teacher=None):
            with_teacher.append(teacher is not None)
            super().__init__(model, config, total_steps, teacher)

    monkeypatch.setattr(trainer, "Pruner", Watched)
    runs = [{"method": "learned", "sparsity": 0.67, "teacher": ["dense", "self"]}]
    out = tmp_path / "tasks.jsonl"
    run(
        "sweep", sweep_file(world, tmp_path / "recipe.yaml", runs=runs), "--data-dir", world / "data",
        "--out", out, "--work", tmp_path / "work",
    )  # fmt: skip
    lines = read_lines(out)
    assert with_teacher == [True, False] and [line["settings"].get("teacher") for line in lines] == [
        None,
        "self",
    ]
    assert all(line["teacher_seconds"] > 0.0 for line in lines)


def test_runs_that_pool_otherwise_start_from_another_dense_model(world, tmp_path):
    recipe = sweep_file(
        world, tmp_path / "recipe.yaml", runs=[{"method": "dense", "pooling": ["first", "mean"]}, EVERY[4]],
        per_task={"sst2": {"pooling": "mean"}},
    )  # fmt: skip
    out, work = tmp_path / "tasks.jsonl", tmp_path / "work"
    run("sweep", recipe, "--data-dir", world / "data", "--out", out, "--work", work)
    lines = read_lines(out)
    by_pooling = {(line["method"], line["settings"].get("pooling")): line for line in lines}
    assert set(by_pooling) == {("dense", None), ("dense", "mean"), ("fixed", "mean")}
    assert by_pooling["fixed", "mean"]["dense_score"] == by_pooling["dense", "mean"]["score"]
    configs = [json.loads(path.read_text()) for path in work.glob("*/dense/config.json")]
    assert sorted(config.get("fastgate_pooling", "first") for config in configs) == ["first", "mean"]
    assert runs_left(read_sweep_config(recipe), out) == []


def test_names_and_lines_are_those_from_before_there_was_a_choice():
    first = make_run({"task": "sst2", "sparsity": 0.5})
    other = make_run({"task": "mrpc", "method": "fixed", "keep": [1, 4], "seed": 2, "hidden": 10})
    assert (first.name, first.dense_name) == ("learned-5f49b30c145e", "sst2-0-62c2d660")
    assert (other.name, other.dense_name) == ("fixed-64ee4472987f", "mrpc-2-6d944986")
    assert not {"pooling", "bf16", "replacement_lr"} & set(first.identity)
    for key, value in (("pooling", "mean"), ("bf16", True)):
        changed = make_run({"task": "sst2", "sparsity": 0.5, key: value})
        assert changed.name != first.name and changed.dense_name != first.dense_name
        assert changed.identity[key] == value


def test_lines_of_the_results_in_the_repository_are_those_of_its_sweep_files():
    """With another key or value a sweep would do finished runs again."""
    finished = [line["settings"] for line in read_lines(BENCH / "results" / "tasks.jsonl")]
    files = ("tasks.yaml", "tasks_controls.yaml", "tasks_speed.yaml")
    runs = [one for name in files for one in read_sweep_config(BENCH / "sweeps" / name)]
    written = {json.dumps(settings, sort_keys=True) for settings in finished}
    assert len(written & {json.dumps(one.identity, sort_keys=True) for one in runs}) >= 100


SWEEP = """
import sys
from fastgate.cli.main import app
app(sys.argv[1:])
"""


def test_a_killed_sweep_goes_on_without_a_lost_or_doubled_run(world, tmp_path):
    recipe = sweep_file(
        world, tmp_path / "recipe.yaml", tasks=["sst2", "wnut17"], runs=[*EVERY[:2], EVERY[4]], seeds=[0, 1]
    )
    out = tmp_path / "tasks.jsonl"
    command = ["sweep", recipe, "--data-dir", world / "data", "--out", out, "--work", tmp_path / "work"]
    wanted = [json.dumps(run.identity, sort_keys=True) for run in read_sweep_config(recipe)]
    assert len(wanted) == 12
    kills = 0
    for moment in (0, 1, 4, 8):
        process = subprocesses.start(SWEEP, *command)
        deadline = time.time() + 120
        while len(read_lines(out)) <= moment and process.poll() is None and time.time() < deadline:
            time.sleep(0.02)
        kills += process.poll() is None
        process.kill()
        process.communicate()
        if moment == 4:  # a kill in the middle of a line
            out.write_text(out.read_text() + '{"task": "ss')
    assert kills >= 3
    subprocesses.finish(subprocesses.start(SWEEP, *command))
    written = [json.dumps(line["settings"], sort_keys=True) for line in read_lines(out)]
    assert sorted(written) == sorted(wanted)


def test_processes_side_by_side_double_nothing(world, tmp_path, monkeypatch):
    recipe = sweep_file(world, tmp_path / "recipe.yaml", runs=EVERY[:1], seeds=[0, 1, 2, 3])
    out = tmp_path / "tasks.jsonl"
    command = ["sweep", recipe, "--data-dir", world / "data", "--out", out, "--work", tmp_path / "work"]
    started = [subprocesses.start(SWEEP, *command) for _ in range(2)]
    for process in started:
        _, errors = process.communicate(timeout=300)
        held = process.returncode == 1 and "another process holds" in errors  # the other was not yet done
        assert process.returncode == 0 or held, errors
    subprocesses.finish(subprocesses.start(SWEEP, *command))  # what one left to the other is done
    assert sorted(line["seed"] for line in read_lines(out)) == [0, 1, 2, 3]
    seen = []
    monkeypatch.setattr(
        workers.subprocess, "Popen", lambda call, env, stdin: seen.append((call, env)) or Done()
    )
    (tmp_path / "tasks.jsonl").unlink()
    run("sweep", recipe, *command[2:], "--workers", 2, code=1)  # as they do nothing
    (call, env), other = seen
    assert call == other[0] and call[:4] == [sys.executable, "-m", "fastgate", "sweep"]
    assert "--workers" not in call and int(env["OMP_NUM_THREADS"]) >= 1


HOLD = """
import signal, sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    signal.pause()
"""


def test_a_group_that_is_held_is_left_to_its_process_until_that_ends(tmp_path, monkeypatch):
    runs = expand({"tasks": ["sst2"], "seeds": [0, 1], "runs": [{"method": "dense"}]})
    done = []
    monkeypatch.setattr(sweeps, "do_group", lambda group, *rest: done.extend(group))
    process = subprocesses.start(HOLD, tmp_path / f"{runs[0].dense_name}.lock")
    assert process.stdout.readline() == "held\n"
    sweeps.sweep(runs, None, tmp_path / "tasks.jsonl", tmp_path)
    process.kill()
    process.communicate()
    assert done == runs[1:]
    sweeps.sweep(runs, None, tmp_path / "tasks.jsonl", tmp_path)
    assert sorted(done[1:], key=runs.index) == runs


class Done:
    stdin = None

    def wait(self, timeout=None):
        return 0

    def poll(self):
        return 0


def test_another_model_or_setting_is_another_run(tmp_path):
    finished = SweepRun(task="sst2", model=str(tmp_path / "a" / "model"), target=Sparsity(0.5))
    out = tmp_path / "tasks.jsonl"
    out.write_text(json.dumps({"settings": finished.identity}) + "\n")
    assert runs_left([finished], out) == []
    others = [
        replace(finished, model="bert-base-uncased"),
        replace(finished, prune_lr=1e-3),
        replace(finished, target=Sparsity(0.4)),
    ]
    assert runs_left([finished, *others], out) == others
