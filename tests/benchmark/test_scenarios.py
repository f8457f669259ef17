"""The sweep: which runs and choices of layers there are, a cut-off sweep going on, its tables and plots."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_models
from helpers.bfloat16 import NEEDS_BFLOAT16

from fastgate.benchmark import compare, equivalence, model_variants

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the sweep is the CPU's"),
]
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


@pytest.fixture
def sweep(bench, monkeypatch):
    """Runs two groups of tiny scenarios in this process, with more options."""
    Scenario = bench.scenarios.Scenario
    planned = [
        Scenario("tiny", "float32", "sst2", order, size) for order in ("data", "length") for size in (1, 32)
    ]
    planned += [Scenario("tiny", "bfloat16", "wnut17", "data", 8)]
    monkeypatch.setattr(bench.scenarios, "planned_runs", lambda: planned)
    options = ["scenarios.py", "--data-dir", str(bench.data), "--out", str(bench.out), "--threads", "1"]

    def sweep(*more):
        monkeypatch.setattr(sys, "argv", [*options, *more])
        return bench.scenarios.main()

    return sweep


def test_a_sweep_goes_on_where_it_was(bench, sweep, capsys):
    def left():
        capsys.readouterr()
        assert sweep("--list") == 0
        return len(capsys.readouterr().out.splitlines())

    assert left() == 5
    assert sweep("--group", "tiny float32 text", "--only", "length") == 0
    assert left() == 3 and len(bench.table.read(bench.out)) == 2
    assert sweep("--group", "tiny float32 text") == 0
    assert left() == 1 and len(bench.table.read(bench.out)) == 4


@NEEDS_BFLOAT16
def test_a_line_says_what_was_timed(bench, sweep):
    assert sweep("--group", "tiny bfloat16 tokens") == 0 and torch.get_num_threads() == 1
    (line,) = bench.table.read(bench.out)
    assert line["settings"]["dtype"] == "bfloat16" and line["settings"]["batches"] == 2
    assert [v["name"] for v in line["fastgate"]] == ["all", "67% spread", "83% low"]
    assert line["fastgate"][1]["kept"] == [0, 3]
    assert set(line["baselines"]) == {"sdpa"} and "fastgate[baselines]" in line["absent"]["onnxruntime"]
    ours = line["fastgate"][0]
    assert ours["speedup"]["sdpa"] == line["baselines"]["sdpa"]["total_ms"] / ours["total_ms"]
    assert ours["lower_bound_share"] == ours["lower_bound"]["total_ms"] / ours["total_ms"]


PLACES = {"all": "all", "50% low": "low", "50% spread": "spread", "50% high": "high"}
KEPT = {"all": list(range(6)), "50% low": [0, 1, 2], "50% spread": [0, 2, 4], "50% high": [3, 4, 5]}


def line_of(dtype="float32", task="sst2", order="data", batch_size=32, processor="a processor"):
    """A line as the sweep writes it: fastgate takes 5 ms whole and 2 ms pruned, SDPA 10 ms."""
    times = {"median_ms": 5.0, "total_ms": 10.0}
    environment = {"processor": processor, "torch": "2.13.0"}
    settings = {"model": "tiny", "dtype": dtype, "task": task, "order": order, "batch_size": batch_size}
    fastgate = [
        {"name": name, "place": place, "kept": KEPT[name], "max_difference": 0.0,
         "median_ms": 5.0, "total_ms": 10.0 if name == "all" else 4.0,
         "speedup": {"sdpa": 2.0 if name == "all" else 5.0}, "lower_bound_share": 0.9, "lower_bound": times}
        for name, place in PLACES.items()
    ]  # fmt: skip
    return {
        "settings": settings | {"threads": 1, "environment": environment},
        "rows": 64, "tokens": 640, "filled": 0.5, "absent": {"onnxruntime": "no package onnxruntime"},
        "baselines": {"sdpa": {"form": "transformers", **times}}, "fastgate": fastgate,
    }  # fmt: skip


def test_the_tables_have_a_section_for_each_size_precision_and_processor(bench):
    lines = [line_of(), line_of(order="length"), line_of(dtype="bfloat16"), line_of(processor="another")]
    shown = markdown(bench, lines)
    assert shown.count("## tiny, float32") == 2 and shown.count("## tiny, bfloat16") == 1
    assert "1 threads, another, torch 2.13.0" in shown
    assert "onnxruntime was not timed: no package" in shown
    assert "| sst2, sorted, 32 | 50% | 5.0 ms | 2.00x | 90% |" in shown
    assert "| sst2, data order, 32 | 0-2 | 2.50x | 5.00x | 5.00x sdpa | 90% |" in shown
    assert "|  | 0, 2, 4 | 2.50x | 5.00x |" in shown and "|  | 3-5 | 2.50x | 5.00x |" in shown
    assert "All rows run the unpruned model" in shown and "above 100%" not in shown
    lines[0]["fastgate"][0]["lower_bound_share"] = 1.02
    assert markdown(bench, lines).count("A share above 100%") == 1


def markdown(bench, lines):
    return "\n".join(section.markdown() for section in bench.table.sections(lines))


def test_of_scenarios_timed_on_two_machines_one_is_plotted(bench):
    lines = [line_of(), line_of(processor="another"), line_of(order="length")]
    assert len({bench.plots.scenario_of(line) for line in lines}) == 2


def test_the_plots_are_written(bench, monkeypatch):
    lines = [line_of(batch_size=size) for size in (1, 32)]
    bench.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["plots", str(bench.out), str(bench.out.parent)])
    bench.plots.main()
    for name, label in (("speed", "speed-up over SDPA"), ("matmul_bound", "% of the lower bound")):
        assert label in (bench.out.parent / f"{name}.svg").read_text()
        assert (bench.out.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["scenarios_cpu.jsonl", "scenarios_amx.jsonl"])
def test_results_of_earlier_versions_are_read(bench, name):
    """They call baselines peers, speed-ups ratios, and the matmul lower bound the floor."""
    path = BENCH / "results" / name
    lines = bench.table.read(path)
    stored = [json.loads(text) for text in path.read_text().splitlines()]
    assert [line["baselines"] for line in lines] == [line["peers"] for line in stored]
    assert lines[0]["fastgate"][0]["speedup"] == stored[0]["fastgate"][0]["ratio"]
    assert lines[0]["fastgate"][0]["lower_bound_share"] == stored[0]["fastgate"][0]["floor_share"]
    settings = stored[0]["settings"]
    assert f"## {settings['model']}, {settings['dtype']}" in markdown(bench, lines)


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
