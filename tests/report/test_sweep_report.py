"""The report of a sweep: means, spreads, paired intervals, speeds, what survives."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import tiny_models
from helpers.commands import refused, run
from scipy.stats import ttest_rel

from fastgate.benchmark import model_variants
from fastgate.errors import DataError
from fastgate.ops.linear import ONEDNN_DTYPES
from fastgate.report import sweep_report
from fastgate.report.speedups import speedup_key, this_processor
from fastgate.training.sweep_config import read_sweep_config


def line(method="learned", seed=0, kept=(0,), score=0.8, dense=0.9, task="sst2", **more):
    settings = {
        "model": "minilm",
        "task": task,
        "seed": seed,
        "method": method,
        "max_length": 32,
        "k": len(kept),
    }
    return {
        "task": task, "model": "minilm", "method": method, "replacement": "mean", "target": 0.67,
        "kept": list(kept), "layers": 3, "seed": seed, "metric": "accuracy", "score": score,
        "dense_score": dense, "gates": [{"step": 0, "open": [1, 1, 1]}, {"step": 5, "open": [1, 0, 0]}],
        "settings": settings | more,
    }  # fmt: skip


SCORES = {0: (0.80, 0.90), 1: (0.83, 0.89), 2: (0.84, 0.93)}
LINES = [line(seed=s, kept=(s,), score=a, dense=b) for s, (a, b) in SCORES.items()]
LINES += [line("random", s, (1,), a - 0.1 * s, b) for s, (a, b) in SCORES.items()]
LINES += [line("dense", s, (0, 1, 2), b, b) for s, (_, b) in SCORES.items()]


def test_means_spreads_and_paired_intervals():
    dense, learned, random = sweep_report.group_runs(LINES)
    assert [r.method for r in (dense, learned, random)] == ["dense", "learned", "random"]
    assert learned.score == pytest.approx(0.8233, abs=1e-4) and learned.spread == pytest.approx(
        0.0208, abs=1e-4
    )
    test = ttest_rel(*zip(*SCORES.values(), strict=True)).confidence_interval(0.95)
    assert learned.gap - learned.interval == pytest.approx(test.low)
    assert learned.gap + learned.interval == pytest.approx(test.high)
    assert learned.share == pytest.approx(0.8233 / 0.9067, abs=1e-3) and dense.gap == 0.0
    assert learned.kept == ((0,), (1,), (2,)) and learned.removed == pytest.approx(2 / 3)


def test_one_seed_has_no_interval():
    (row,) = sweep_report.group_runs(LINES[:1])
    assert row.interval is row.spread is None and row.seeds == 1


def test_learned_gates_against_a_control():
    mean, half, pairs = sweep_report.learned_against(LINES, "random")
    gaps = [0.1 * s / b for s, (_, b) in SCORES.items()]
    assert (
        mean == pytest.approx(sum(gaps) / 3)
        and pairs == 3
        and half == pytest.approx(sweep_report.interval(gaps))
    )
    other = [line("random", 0, (0, 1))]  # another number of layers is no pair
    assert sweep_report.learned_against([*LINES[:3], *other], "random")[2] == 0
    labelled = [line(seed=s, kept=(s,), score=0.1, labels=1.0) for s in SCORES]  # not what random is held to
    assert sweep_report.learned_against([*LINES, *labelled], "random") == (mean, half, pairs)
    fast = [line(seed=s, kept=(s,), score=0.1, speedup=2.0) for s in SCORES]  # gave up score for speed
    assert sweep_report.learned_against([*LINES, *fast], "random") == (mean, half, pairs)


def test_rows_that_a_setting_tells_apart_say_which():
    plain, labelled = line(seed=0, dropout=None), line(seed=0, labels=1.0, dropout=0.1)
    found = sweep_report.group_runs([plain, labelled, line("dense", 0, (0, 1, 2))])
    told = [sweep_report.distinguishing_settings(row, found) for row in found]
    assert sorted(told) == ["", "", ", dropout 0.1, labels 1.0"]
    assert "| learned, mean, dropout 0.1, labels 1.0 |" in markdown([plain, labelled])


def markdown(lines, sections=sweep_report.task_sections):
    return "\n".join(section.markdown() for section in sections(lines, {}))


@pytest.mark.slow
def test_the_tables_and_plots(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in LINES))
    known = {speedup_key(one): 4.0 + one["seed"] for one in LINES if one["method"] == "learned"}
    other = {key: 2 * value for key, value in known.items()}
    (tmp_path / "speeds.json").write_text(json.dumps({"slow one": known, "fast one": other}))
    shown = run("report", path, "--out", tmp_path / "report").output
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## sst2, accuracy, up to 3 seeds" in text and "sst2, accuracy, up to 3 seeds" in shown
    assert "| learned, mean | 67% | 0; 1; 2 | 0.8233 ± 0.0208 | 90.8% | -0.0833 ±" in text
    assert "| 5.0x | 10.0x |" in text
    assert "| gap to dense | [1] | [2] |" in text and "on [1] slow one; [2] fast one." in text
    assert "| dense | 0% | all | 0.9067 ± " in text
    assert "- learned - random: +1" in shown and "3 pairs" in shown and "0.8233 ±" in shown
    for name in ("score", "speed", "survivors", "gates"):
        assert f"]({name}.png)" in text and f"]({name}.svg)" in text
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tmp_path / "report" / f"{name}.svg").read_text()
    assert "slow one" in (tmp_path / "report" / "speed.svg").read_text()
    assert shown.rstrip().endswith(str(tmp_path / "report" / "report.md"))


def test_one_table_of_a_recipe(tmp_path):
    """Its runs alone, each share of the same seed's dense score."""
    recipe = {"tasks": ["sst2", "cola"], "seeds": [0, 1], "runs": [{"method": ["dense", "learned"]}]}
    recipe["sparsity"] = 0.67
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    lines = []
    for settings in read_sweep_config(tmp_path / "recipe.yaml")[:-1]:  # cola's seed 1 was not pruned yet
        kept = (0, 1, 2) if settings.method == "dense" else (settings.seed,)
        score = 0.8 if settings.method == "dense" else 0.72 + 0.04 * settings.seed
        made = line(settings.method, settings.seed, kept, score, 0.8, settings.task)
        lines += [made | {"settings": settings.identity}, line(score=0.1)]  # and one of other settings
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    sst2 = {speedup_key(one): 3.0 + one["seed"] for one in lines if one["task"] == "sst2"}
    cola = {speedup_key(one, "bfloat16"): 5.0 for one in lines if one["task"] == "cola"}
    (tmp_path / "speeds.json").write_text(json.dumps({"slow one": sst2 | cola, "fast one": {}}))
    run("report", path, "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("|")] == [
        "| task | metric | dense | removed | of dense | kept |",
        "| --- | --- | ---: | ---: | --- | --- |",
        "| sst2 | accuracy | 0.8000 ± 0.0000 | 67% | 92.5% (90.0% to 95.0%) | {0} {1} |",
        "| cola | accuracy | 0.8000 ± 0.0000 | 67% | 90.0%, 1 of 2 seeds | {0} |",
        "| task | removed | float32 [1] | bfloat16 [1] | float32 [2] | bfloat16 [2] |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| sst2 | 67% | 3.5x |  |  |  |",
        "| cola | 67% |  | 5.0x |  |  |",
    ]
    assert "Speed-ups over SDPA on [1] slow one; [2] fast one." in text and "above 100%" not in text


def test_a_share_above_the_dense_score_is_explained():
    better = [line(score=0.95), line("dense", 0, (0, 1, 2), 0.9)]
    for sections in (sweep_report.task_sections, sweep_report.recipe_sections):
        assert "A share above 100% means" in markdown(better, sections)
        assert "above 100%" not in markdown(LINES, sections)


def test_a_choice_that_was_not_learned_has_a_star():
    unsure = [line(seed=0, kept=(0,)) | {"margin": 0.01}, line(seed=1, kept=(1,)) | {"margin": 0.5}]
    dense = [line("dense", seed, (0, 1, 2), 0.9) for seed in (0, 1)]
    for shown, kept in (
        (markdown([*unsure, *dense]), "| 0*; 1 |"),
        (markdown([*unsure, *dense], sweep_report.recipe_sections), "| {0}* {1} |"),
    ):
        assert kept in shown and "A star: in 1 of 2 learned runs the search did not tell these" in shown
    assert "*" not in markdown([*LINES, unsure[1]])


def test_lines_of_earlier_versions_are_judged_by_their_last_soft_gates():
    def of(*opened, **settings):
        gates = [{"step": step, "open": list(gates)} for step, gates in enumerate(opened)]
        made = line(kept=(0,))
        return made | {"gates": gates, "settings": made["settings"] | {"sparsity": 0.67} | settings}

    tie = of((0.9, 0.9, 0.9), (0.06, 0.05, 0.05), (1, 0, 0))
    assert sweep_report.margin_of(tie) == pytest.approx(0.01) and sweep_report.doubt_mark(tie) == "*"
    told = of((0.06, 0.05, 0.05), (0.9, 0.2, 0.1), (1.0, 0.0, 0.0))
    assert sweep_report.margin_of(told) == pytest.approx(0.7) and sweep_report.doubt_mark(told) == ""
    assert "the last gates it recorded" in markdown([tie])
    assert "the last gates it recorded" not in markdown([tie | {"margin": 0.02}])
    unknown = of((0.06, 0.05, 0.05), (1, 0, 0), sparsity=None, speedup=3.0), of((1, 0, 0)), line("random")
    assert [sweep_report.margin_of(one) for one in unknown] == [None, None, None]


def test_another_pooling_is_another_row_and_another_speed():
    lines = [*LINES[:3], *(line(seed=s, kept=(s,), score=0.5, pooling="mean") for s in range(3))]
    first, mean = sweep_report.group_runs(lines)
    assert (first.pooling, mean.pooling) == ("first", "mean") and (first.seeds, mean.seeds) == (3, 3)
    assert "| learned, mean, pooling mean | 67% |" in markdown(lines)
    keys = {speedup_key(one) for one in lines}
    assert len(keys) == 6 and speedup_key(LINES[0]) == '["minilm", "sst2", [0], 32]'
    assert sweep_report.learned_against([*LINES[:3], line("random", pooling="mean")], "random")[2] == 0


@pytest.mark.slow
def test_speeds_are_measured_once(tmp_path, monkeypatch):
    folder = tiny_models.model_folder(tmp_path / "model")
    monkeypatch.setattr("fastgate.benchmark.compare.SECONDS", 0.0)
    monkeypatch.setattr("fastgate.benchmark.model_variants.demo_model_path", lambda: folder)
    monkeypatch.setitem(model_variants._SHAPES, "minilm", (32, 3, 4, 64))
    for split in ("train", "validation", "test"):
        tiny_models.write_rows(tmp_path / "data" / "sst2" / f"{split}.jsonl", tiny_models.sentiment(40))
    path = tmp_path / "tasks.jsonl"
    lines = [*LINES, line(kept=(0,), pooling="mean")]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    options = ["--data-dir", tmp_path / "data", "--measure", "--out", tmp_path / "report"]
    elsewhere = {"another processor": {speedup_key(one): 7.0 for one in lines}}
    (tmp_path / "speeds.json").write_text(json.dumps(elsewhere))

    def found():
        speeds = json.loads((tmp_path / "speeds.json").read_text())
        assert list(speeds) == ["another processor", this_processor()]
        assert speeds.items() >= elsewhere.items()
        return speeds[this_processor()]

    run("report", path, *options)
    speeds = found()
    assert set(speeds) == {speedup_key(one) for one in lines if one["method"] != "dense"}
    assert all(value > 0 for value in speeds.values())
    run("report", path, *options)
    assert found() == speeds
    if torch.bfloat16 not in ONEDNN_DTYPES:
        assert (
            "bfloat16 takes a processor with AVX512"
            in run("report", path, *options, "--dtype", "bfloat16", code=1).stderr
        )
        return
    run("report", path, *options, "--dtype", "bfloat16")
    assert speeds.items() <= found().items() and len(found()) == 2 * len(speeds)


def test_no_lines_no_report(tmp_path):
    with pytest.raises(DataError, match=r"report: LINES: got .* without a line"):
        sweep_report.write_sweep_report(tmp_path / "none.jsonl", tmp_path / "out", None, False, None)


def test_a_wrong_path_is_told_in_the_terms_of_the_command(tmp_path):
    message = refused("report", tmp_path / "nolines", "--out", tmp_path / "report")
    assert message == (
        f"error: report: LINES: got {tmp_path / 'nolines'}: no such file, wanted results of "
        "`fastgate sweep`; pass the file that `fastgate sweep` wrote\n"
    )
