"""Sweep configs: checked whole before anything trains; wrong values, wrong shapes and hostile files."""

from __future__ import annotations

import time

import pytest
from helpers.commands import call, refused
from helpers.sweep_commands import command_of, make_world

from fastgate.errors import ArgumentError, FastgateError
from fastgate.training.sweep_config import MAX_RUNS, expand, read_sweep_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("sweep"))


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
