"""A sweep: what a recipe stands for, every method, cut-off sweeps that go on, processes side by side."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace

import pytest
from helpers import subprocesses, tiny_models
from helpers.commands import run

from fastgate.errors import ArgumentError, DataError
from fastgate.pruning import Distill, Sparsity, trainer
from fastgate.training import sweep as sweeps
from fastgate.training import workers
from fastgate.training.methods import config_of
from fastgate.training.sweep import left, read_lines
from fastgate.training.sweep_config import Settings, expand, read_recipe

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


def recipe_file(world, path, **changes):
    import yaml

    recipe = {
        "model": str(world / "model"),
        "tasks": ["sst2"],
        "seeds": [0],
        **QUICK,
        "runs": EVERY,
    } | changes
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_recipe_stands_for_its_runs():
    found = expand(
        {
            "tasks": ["sst2", "imdb"], "seeds": [0, 1], "epochs": 2, "hidden": [1, 10],
            "runs": [{"method": ["learned", "random"], "sparsity": [0.5, 0.67]}, {"method": "dense"}],
            "per_task": {"imdb": {"max_length": 256, "hidden": 5}},
        }
    )  # fmt: skip
    assert len(found) == len(set(found)) == 2 * (2 * 2 * 2 + 1) + 2 * (2 * 2 + 1)
    imdb = [one for one in found if one.task == "imdb"]
    assert {one.max_length for one in imdb} == {256} and {one.epochs for one in imdb} == {2, 3}
    assert {one.hidden for one in imdb} == {5, None}  # a dense run has nothing of a pruning
    assert len({one.dense for one in found}) == 4 and len({one.name for one in found}) == len(found)
    assert expand({"tasks": "sst2", "runs": [{"method": "fixed", "keep": [1, 4]}]})[0].keep == (1, 4)


@pytest.mark.parametrize(
    "recipe, message",
    [
        ({}, "tasks: got none"),
        ({"tasks": ["sst3"], "runs": [{"method": "dense"}]}, "tasks: got 'sst3', wanted one of sst2"),
        ({"tasks": ["sst2"], "epoch": 2}, "recipe: got epoch, wanted .*epochs"),
        ({"tasks": ["sst2"], "runs": [{"method": "magic"}]}, "method: got 'magic', wanted one of dense"),
        (
            {"tasks": ["sst2"], "runs": [{"method": "learned"}]},
            "target: got none, wanted one of sparsity, speedup",
        ),
        ({"tasks": ["sst2"], "runs": [{"method": "random", "sparsity": 2}]}, "sparsity: got 2, wanted a"),
        ({"tasks": ["sst2"], "runs": [{"method": "random", "speedup": 2}]}, "target: got speedup 2"),
        ({"tasks": ["sst2"], "runs": [{"method": "fixed"}]}, "keep: got none"),
        ({"tasks": ["sst2"], "runs": [{"method": "dense", "pooling": "max"}]}, "pooling: got 'max', wanted"),
        (
            {"tasks": ["wnut17"], "runs": [{"method": "dense", "pooling": "mean"}]},
            "pooling: got mean for wnut17",
        ),
        ({"tasks": ["sst2"], "runs": [{"method": "dense", "teacher": "me"}]}, "teacher: got 'me', wanted"),
    ],
)
def test_recipes_that_no_run_can_have_are_refused(recipe, message):
    with pytest.raises(ArgumentError, match=message):
        expand(recipe)


@pytest.mark.parametrize(
    "text, message", [("a: [", "mend the file"), ("- a", "a list"), (None, "No such file")]
)
def test_files_that_are_no_recipe_are_refused(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_recipe(path)


def test_the_settings_reach_the_pruner():
    plain = config_of(Settings(task="sst2", sparsity=0.5, seed=3), Sparsity(0.5))
    assert plain.seed == 3 and plain.distill == Distill()
    tagging = Settings(task="wnut17", sparsity=0.5)
    assert config_of(tagging, Sparsity(0.5)).distill == Distill.for_tokens() != Distill()
    bolder = config_of(replace(tagging, swap=0.2), Sparsity(0.5)).distill
    assert bolder == replace(Distill.for_tokens(), swap=0.2)
    given = Settings(
        task="sst2", hidden=10, temperature=4, labels=1, dropout=0.1, swap=0.3, harden=0.4, gate_lr=0.1,
        replacement="affine", replacement_lr=3,
    )  # fmt: skip
    found = config_of(given, Sparsity(0.5))
    assert found.distill == Distill(hidden=10, temperature=4, labels=1, dropout=0.1, swap=0.3)
    assert found.replacement_lr == 3
    assert (found.harden, found.gate_lr, found.replacement) == (0.4, 0.1, "affine")
    assert config_of(Settings(task="sst2", hidden=0, logits=0), Sparsity(0.5)).distill is None


def test_every_method_leaves_a_line(world, tmp_path):
    recipe = recipe_file(world, tmp_path / "recipe.yaml")
    options = ["--data-dir", world / "data", "--out", tmp_path / "tasks.jsonl", "--work", tmp_path / "work"]
    listed = run("sweep", recipe, *options, "--left").output.splitlines()
    assert len(listed) == 10
    said = run("sweep", recipe, *options).output
    lines = read_lines(tmp_path / "tasks.jsonl")
    assert len(lines) == 10 and len(re.findall(r"sst2 seed 0 \w+ kept", said)) == 10
    within = next(line for line in lines if line["settings"]["max_drop"])
    assert len(within["kept"]) == 1 and set(within["attempts"]) == {"1", "2"} and within["rows"] < 48
    lines.remove(within)
    by_method = {line["method"]: line for line in lines if line["settings"]["speedup"] is None}
    for method in ("learned", "random", "top_drop", "every_other", "greedy"):
        assert len(by_method[method]["kept"]) == 1 and by_method[method]["layers"] == 3
    assert by_method["top_drop"]["kept"] == [0] and by_method["fixed"]["kept"] == [0, 2]
    assert by_method["dense"]["kept"] == by_method["dense_longer"]["kept"] == [0, 1, 2]
    dense = by_method["dense"]
    assert dense["score"] == dense["dense_score"] and dense["train_seconds"] == 0.0
    assert [by_method[m]["replacement"] for m in ("learned", "fixed", "dense")] == ["shift", "affine", None]
    assert {line["replacement"] for line in lines if line["settings"]["speedup"]} == {"shift"}
    for line in lines:
        assert line["task"] == "sst2" and line["metric"] == "accuracy" and 0.0 <= line["score"] <= 1.0
        assert line["dense_score"] == dense["score"] and line["model"] == "model" and line["scored"] == 96
        assert line["environment"]["torch"] and (line["train_seconds"] > 0) == (line["method"] != "dense")
        assert str(world) not in json.dumps(line)
    assert by_method["learned"]["gates"][0]["open"]
    assert run("sweep", recipe, *options, "--left").output == ""
    before = (tmp_path / "tasks.jsonl").read_bytes()
    run("sweep", recipe, *options)
    assert (tmp_path / "tasks.jsonl").read_bytes() == before
    folders = {path.name for path in (tmp_path / "work").iterdir() if path.is_dir()}
    assert folders == {one.dense for one in read_recipe(recipe)} and len(folders) == 2
    assert {path.name for folder in folders for path in (tmp_path / "work" / folder).iterdir()} == {"dense"}


def test_whom_a_distillation_listens_to(world, tmp_path, monkeypatch):
    heard = []

    class Watched(trainer.Pruner):
        def __init__(self, model, config, total_steps, teacher=None):
            heard.append(teacher is not None)
            super().__init__(model, config, total_steps, teacher)

    monkeypatch.setattr(trainer, "Pruner", Watched)
    runs = [{"method": "learned", "sparsity": 0.67, "teacher": ["dense", "self"]}]
    out = tmp_path / "tasks.jsonl"
    run(
        "sweep", recipe_file(world, tmp_path / "recipe.yaml", runs=runs), "--data-dir", world / "data",
        "--out", out, "--work", tmp_path / "work",
    )  # fmt: skip
    lines = read_lines(out)
    assert heard == [True, False] and [line["settings"].get("teacher") for line in lines] == [None, "self"]
    assert all(line["teacher_seconds"] > 0.0 for line in lines)


def test_runs_that_pool_otherwise_start_from_another_dense_model(world, tmp_path):
    recipe = recipe_file(
        world, tmp_path / "recipe.yaml", runs=[{"method": "dense", "pooling": ["first", "mean"]}, EVERY[4]],
        per_task={"sst2": {"pooling": "mean"}},
    )  # fmt: skip
    out, work = tmp_path / "tasks.jsonl", tmp_path / "work"
    run("sweep", recipe, "--data-dir", world / "data", "--out", out, "--work", work)
    lines = read_lines(out)
    found = {(line["method"], line["settings"].get("pooling")): line for line in lines}
    assert set(found) == {("dense", None), ("dense", "mean"), ("fixed", "mean")}
    assert found["fixed", "mean"]["dense_score"] == found["dense", "mean"]["score"]
    configs = [json.loads(path.read_text()) for path in work.glob("*/dense/config.json")]
    assert sorted(config.get("fastgate_pooling", "first") for config in configs) == ["first", "mean"]
    assert left(read_recipe(recipe), out) == []


def test_names_and_lines_are_those_from_before_there_was_a_choice():
    first = Settings(task="sst2", sparsity=0.5)
    other = Settings(task="mrpc", method="fixed", keep=(1, 4), seed=2, hidden=10)
    assert (first.name, first.dense) == ("learned-5f49b30c145e", "sst2-0-62c2d660")
    assert (other.name, other.dense) == ("fixed-64ee4472987f", "mrpc-2-6d944986")
    assert not {"pooling", "bf16", "replacement_lr"} & set(first.identity)
    mean = Settings(task="sst2", sparsity=0.5, pooling="mean")
    assert mean.name != first.name and mean.dense != first.dense and mean.identity["pooling"] == "mean"
    rounded = Settings(task="sst2", sparsity=0.5, bf16=True)
    assert rounded.name != first.name and rounded.dense != first.dense and rounded.identity["bf16"]


SWEEP = """
import sys
from fastgate.cli.main import app
app(sys.argv[1:])
"""


def test_a_killed_sweep_goes_on_without_a_lost_or_doubled_run(world, tmp_path):
    recipe = recipe_file(
        world, tmp_path / "recipe.yaml", tasks=["sst2", "wnut17"], runs=[*EVERY[:2], EVERY[4]], seeds=[0, 1]
    )
    out = tmp_path / "tasks.jsonl"
    command = ["sweep", recipe, "--data-dir", world / "data", "--out", out, "--work", tmp_path / "work"]
    wanted = [json.dumps(one.identity, sort_keys=True) for one in read_recipe(recipe)]
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
    found = [json.dumps(line["settings"], sort_keys=True) for line in read_lines(out)]
    assert sorted(found) == sorted(wanted)


def test_processes_side_by_side_double_nothing(world, tmp_path, monkeypatch):
    recipe = recipe_file(world, tmp_path / "recipe.yaml", runs=EVERY[:1], seeds=[0, 1, 2, 3])
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
    assert call == other[0] and call[:4] == [sys.executable, "-m", "fastgate.cli.main", "sweep"]
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
    monkeypatch.setattr(sweeps, "_run_group", lambda chosen, *rest: done.extend(chosen))
    process = subprocesses.start(HOLD, tmp_path / f"{runs[0].dense}.lock")
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
    one = Settings(task="sst2", model=str(tmp_path / "a" / "model"))
    out = tmp_path / "tasks.jsonl"
    out.write_text(json.dumps({"settings": one.identity}) + "\n")
    assert left([one], out) == []
    other = Settings(task="sst2", model="bert-base-uncased")
    assert left([one, other, Settings(task="sst2", lr=1e-3)], out) == [other, Settings(task="sst2", lr=1e-3)]
