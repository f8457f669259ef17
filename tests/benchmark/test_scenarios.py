"""The sweep: which runs and choices of layers there are, a cut-off sweep going on, its tables and plots."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_models

from fastgate.benchmark import compare, equivalence, model_variants

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the sweep is the CPU's")
NAMES = ("scenarios", "scenario_table", "scenario_plots")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The modules of the sweep, with a size `tiny`, two tasks in files, one baseline and short turns."""
    monkeypatch.syspath_prepend(str(BENCH / "models"))
    import scenario_plots
    import scenario_table
    import scenarios

    folder = tiny_models.model_folder(tmp_path / "model")
    for split in ("train", "validation", "test"):
        tiny_models.write_rows(tmp_path / "data" / "sst2" / f"{split}.jsonl", tiny_models.sentiment(40))
        words, tags = ["she", "went", "to", "paris"], ["O", "O", "O", "B-location"]
        tagged = [{"tokens": words[: 1 + i % 4], "ner_tags": tags[: 1 + i % 4]} for i in range(40)]
        tiny_models.write_rows(tmp_path / "data" / "wnut17" / f"{split}.jsonl", tagged)
    monkeypatch.setitem(model_variants._SHAPES, "tiny", (32, 6, 4, 64))
    monkeypatch.setattr(model_variants, "demo_model_path", lambda: folder)
    monkeypatch.setattr(compare, "SECONDS", 0.0)
    monkeypatch.setattr(scenarios, "BASELINES", ("sdpa", "onnxruntime"))
    monkeypatch.setattr(scenarios, "BATCHES", {1: 3, 8: 2, 32: 1})
    monkeypatch.setattr("fastgate.benchmark.baselines.importlib.util.find_spec", lambda package: None)
    modules = {"scenarios": scenarios, "table": scenario_table, "plots": scenario_plots}
    yield SimpleNamespace(**modules, data=tmp_path / "data", out=tmp_path / "out.jsonl")
    for name in NAMES:
        sys.modules.pop(name, None)


def test_the_runs_are_different_and_cover_what_is_claimed(bench):
    runs = bench.scenarios.planned_runs()
    assert len(set(runs)) == len(runs)
    assert {run.task for run in runs} == {"sst2", "imdb", "wnut17"}
    assert {run.batch_size for run in runs} == {1, 8, 32, 128}
    assert {(run.model, run.dtype) for run in runs} == {
        (model, dtype) for model in ("minilm", "bert-base", "bert-large") for dtype in ("float32", "bfloat16")
    }
    assert runs[0] == bench.scenarios.Scenario("bert-base", "float32", "sst2", "data", 32)


def test_kept_layers_lie_low_spread_and_high(bench):
    base = {name: kept for name, (_, kept) in bench.scenarios.choices("bert-base").items()}
    assert base["all"] is None and base["83% low"] == [0, 1] and base["75% spread"] == [0, 4, 8]
    assert base["67% spread"] == [0, 3, 6, 9] and base["83% high"] == [10, 11]
    assert base["50% low"] == [0, 1, 2, 3, 4, 5] and len(base) == 11
    small = [kept for _, kept in bench.scenarios.choices("minilm").values()]
    assert [0] in small and [5] in small and len(small) == 9
    assert list(bench.scenarios.choices("bert-large")) == ["all", "67% spread", "83% low"]


def test_a_sweep_goes_on_where_it_was_and_is_shown(bench, monkeypatch, capsys):
    Scenario = bench.scenarios.Scenario
    runs = [
        Scenario("tiny", "float32", "sst2", order, size) for order in ("data", "length") for size in (1, 32)
    ]
    runs += [Scenario("tiny", "bfloat16", "wnut17", "data", 8)]
    monkeypatch.setattr(bench.scenarios, "planned_runs", lambda: runs)
    options = ["scenarios.py", "--data-dir", str(bench.data), "--out", str(bench.out), "--threads", "1"]

    def sweep(*more):
        """The children's part, here: `main` would start a process for each group."""
        monkeypatch.setattr(sys, "argv", [*options, *more])
        return bench.scenarios.main()

    def listed():
        capsys.readouterr()
        assert sweep("--list") == 0
        return capsys.readouterr().out.splitlines()

    assert len(listed()) == 5
    assert sweep("--group", "tiny float32 text", "--only", "length") == 0
    assert len(bench.table.read(bench.out)) == 2 and len(listed()) == 3
    assert sweep("--group", "tiny float32 text") == 0 and sweep("--group", "tiny bfloat16 tokens") == 0
    assert listed() == []
    lines = bench.table.read(bench.out)
    assert len(lines) == 5
    first = lines[0]
    assert first["settings"]["order"] == "length" and first["settings"]["batches"] == 3
    assert [v["name"] for v in first["fastgate"]] == ["all", "67% spread", "83% low"]
    assert first["fastgate"][1]["kept"] == [0, 3] and first["fastgate"][0]["speedup"]["sdpa"] > 0
    assert set(first["baselines"]) == {"sdpa"} and "fastgate[baselines]" in first["absent"]["onnxruntime"]
    assert lines[-1]["settings"]["dtype"] == "bfloat16" and torch.get_num_threads() == 1

    shown = bench.table.tables(lines)
    assert "## tiny, float32" in shown and "## tiny, bfloat16" in shown
    assert "onnxruntime was not timed: no package" in shown and "| sst2, sorted, 32 |" in shown
    assert "50% spread: 0, 2, 4" in shown and shown.count("## tiny, float32") == 1
    elsewhere = copy.deepcopy(first)
    elsewhere["settings"]["environment"]["processor"] = "another"
    apart = bench.table.tables([*lines, elsewhere])
    assert apart.count("## tiny, float32") == 2 and "threads, another, torch" in apart
    assert len({bench.plots.scenario_of(run) for run in [*lines, elsewhere]}) == 5
    monkeypatch.setattr(sys, "argv", ["plots", str(bench.out), str(bench.out.parent)])
    bench.plots.main()
    for name in ("speed", "floor"):
        assert "</svg>" in (bench.out.parent / f"{name}.svg").read_text()


def test_what_misses_an_aim_is_named(bench):
    ours = {"name": "all", "speedup": {"sdpa": 2.0, "openvino": 0.9}, "lower_bound_share": 0.8}
    settings = {"model": "m", "dtype": "float32", "task": "sst2", "order": "data", "batch_size": 8}
    run = {"settings": settings, "baselines": {"sdpa": {}, "openvino": {}}, "fastgate": [ours]}
    assert bench.table.worst([run]) == [
        "m float32 sst2, data order, 8: all: 0.90x openvino",
        "m float32 sst2, data order, 8: all: 80% of the lower bound",
    ]


def test_no_run_is_started_after_the_deadline(bench, monkeypatch):
    run = bench.scenarios.Scenario("tiny", "float32", "sst2", "data", 8)
    assert bench.scenarios.run_group([run], bench.data, bench.out, 1, time.time() - 1)
    assert not bench.out.exists()


def test_outputs_that_differ_leave_no_line(bench, monkeypatch, capsys):
    monkeypatch.setattr(equivalence, "TOLERANCES", {torch.float32: -1.0})
    run = bench.scenarios.Scenario("tiny", "float32", "sst2", "data", 8)
    assert not bench.scenarios.run_group([run], bench.data, bench.out, 1, time.time() + 60)
    assert not bench.out.exists() and "no figure is given" in capsys.readouterr().err
