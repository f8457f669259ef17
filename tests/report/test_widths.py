"""Every table that a command prints fits in a terminal of 80 columns, with nothing cut off."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastgate import env
from fastgate.benchmark import compare
from fastgate.benchmark.timing import Timing
from fastgate.report import sweep_report
from fastgate.report.demo_report import ModelResult, demo_section
from fastgate.report.speedups import read_speedups
from fastgate.training.sweep_results import read_lines

BENCH = Path(__file__).parents[2] / "bench"
RESULTS = BENCH / "results"


def assert_fits(text, *cells):
    """No line has more than 80 columns, and every word of the cells is there, whole."""
    assert max(map(len, text.splitlines())) <= 80, max(text.splitlines(), key=len)
    assert "\u2026" not in text
    words = set(text.split())
    for cell in cells:
        assert set(cell.split()) <= words, (cell, text)


def test_the_tables_of_a_sweep():
    lines, speedups = read_lines(RESULTS / "tasks.jsonl"), read_speedups(RESULTS / "speeds.json")
    for sections in (sweep_report.task_sections, sweep_report.recipe_sections):
        for section in sections(lines, speedups):
            assert_fits(section.text(), *(cell for row in section.rows for cell in row))


@pytest.mark.parametrize("name", ["scenarios_cpu.jsonl", "scenarios_amx.jsonl"])
def test_the_tables_of_the_scenarios(monkeypatch, capsys, name):
    monkeypatch.syspath_prepend(str(BENCH / "models"))
    monkeypatch.delitem(sys.modules, "scenario_table", raising=False)
    import scenario_table

    for section in scenario_table.sections(scenario_table.read(RESULTS / name)):
        assert_fits(section.text(), *(cell for row in section.rows for cell in row))
    monkeypatch.setattr(sys, "argv", ["scenario_table", str(RESULTS / name)])
    scenario_table.main()
    text = capsys.readouterr().out
    assert_fits(text)
    assert ("above 100%" in text) and "| --- |" not in text
    monkeypatch.setattr(sys, "argv", ["scenario_table", str(RESULTS / name), "--markdown"])
    scenario_table.main()
    assert "| task, order, batch | filled |" in capsys.readouterr().out
    sys.modules.pop("scenario_table")


def test_the_table_of_a_demo():
    results = [
        ModelResult("Hugging Face", 0.9, 12, 12, 109_000_000, 437_000_000, 1234.5, 1000.0, 2000.0),
        ModelResult("fastgate dense", 0.9, 12, 12, 109_000_000, 437_000_000, 123.4, 12345.0, 2000.0),
        ModelResult("fastgate pruned", 0.89, 10, 12, 99_000_000, 380_000_000, 12.5, 123456.0, 10000.0),
    ]
    section = demo_section(results, "token_accuracy", "fastgate demo: docstrings, MiniLM-L6")
    assert_fits(section.text(), *(cell for row in section.rows for cell in row))


TIMES = {"sdpa": 12.0, "eager": 13.0, "compile": 11.0, "onnxruntime": 10.0, "openvino": 9.0}


def comparison(seconds, kept, layers=24):
    """Of timings in seconds, by name."""
    settings = {
        "model": "a/checkpoint/" + "x" * 40,
        "task": "ud_ewt_xpos",
        "batch_size": 128,
        "dtype": "bfloat16",
    }
    settings |= {"order": "length", "environment": {"threads": 128}}
    return compare.Comparison(
        {name: Timing((float(value),)) for name, value in seconds.items()},
        tokens=123456, rows=1024, padded=234567, max_difference=1e-5, kept=kept, layers=layers,
        baselines={name: f"a long description of the form of {name}, which says all" for name in TIMES},
        absent={"other": "a reason that takes more than a line of eighty columns, as some reasons do here"},
        settings=settings,
    )  # fmt: skip


def test_the_table_of_a_bench_tells_pruning_and_runtime_apart():
    timings = {
        "fastgate": 2.0,
        "fastgate unpruned": 4.0,
        **TIMES,
        "lower bound": 1.9,
        "lower bound unpruned": 3.0,
    }
    text = compare.bench_table(comparison(timings, kept=[0, 8]))
    assert_fits(text, *TIMES, "fastgate pruned", "2 of 24", "24 of 24", "12000.0")
    told = " ".join(text.split())
    assert (
        "fastgate unpruned, sdpa, eager, compile, onnxruntime, openvino run the unpruned model. "
        "fastgate pruned runs attention in layers 0, 8." in told
    )
    assert "The runtime alone gives 3.00x over sdpa, pruning another 2.00x, both together 6.00x." in told
    rows = {row.split("  ")[0]: row.split() for row in text.splitlines() if " of 24" in row}
    assert list(rows) == ["fastgate pruned", "fastgate unpruned", *TIMES]
    assert rows["fastgate pruned"][-1] == "95%" and rows["fastgate unpruned"][-2:] == ["2.00x", "75%"]
    assert rows["sdpa"][-2:] == ["3.00x", "6.00x"]
    assert "above 100%" not in told


def test_the_table_of_an_unpruned_bench_says_so():
    timings = {"fastgate": 4.0, **TIMES, "lower bound": 4.2}
    text = compare.bench_table(comparison(timings, kept=list(range(24))))
    assert_fits(text)
    assert "All rows run the unpruned model." in text and "pruned  " not in text
    assert "105%" in text and "A share above 100% is possible" in text


def test_the_facts_of_a_machine():
    facts = env.collect() | {"package": "a folder"}  # a path cannot be wrapped
    facts["build"] = {"mode": "off", "cpu": False, "reason": "no compiler: " + "and why not " * 10}
    assert_fits(env.render(facts), *(op["reason"] for op in facts["ops"]), facts["build"]["reason"])
