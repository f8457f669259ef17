"""The report: ratios to the first contender, the gates' picture, interleaved timing, the floor's products."""

from __future__ import annotations

import io
import itertools
import time

import matplotlib.image
import pytest
import torch
from rich.console import Console
from transformers import BertConfig, BertForSequenceClassification

import fastgate
from fastgate.benchmark import timing
from fastgate.benchmark.matmul_bound import Floor
from fastgate.benchmark.timing import interleave
from fastgate.cli.progress import Display
from fastgate.report.demo_report import (
    Contender,
    gate_picture,
    how_chosen,
    markdown_table,
    standard_error,
    table,
    write_report,
)
from fastgate.training.progress import Progress

CONTENDERS = [
    Contender("Hugging Face", 0.9, 6, 6, 22_000_000, 90_000_000, 10.0, 100.0, 2000.0),
    Contender("fastgate pruned", 0.89, 2, 6, 20_000_000, 80_000_000, 2.5, 500.0, 10000.0),
]
RESULT = {
    "metric": "accuracy",
    "rows": {"evaluation": 400},
    "dense": {"score": 0.9},
    "pruned": {"kept": [1, 4]},
    "settings": {"lr": 1e-4, "speedup": None, "data": {}},
    "environment": {"torch": "2"},
}


def test_the_table_measures_against_its_first_line():
    lines = markdown_table(CONTENDERS, "accuracy").splitlines()
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")] == [
        "fastgate pruned", "0.8900", "2 of 6", "20.0M", "80.0MB", "2.5ms", "4.0x", "500", "5.0x",
    ]  # fmt: skip
    assert len(lines) == 4 and lines[2].count("1.0x") == 2
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(CONTENDERS, "accuracy", "a title"))
    text = console.export_text()
    assert "2.5ms" in text and "4.0x" in text and "a title" in text and "…" not in text


def test_the_report_says_what_was_measured_and_how_sure_it_is(tmp_path):
    write_report(tmp_path / "report.md", "demo", CONTENDERS, RESULT, ["a note"])
    text = (tmp_path / "report.md").read_text()
    assert "one standard error of the dense score is 0.0150" in text
    assert "layers [1, 4]" in text and "- a note" in text and "- lr: 0.0001" in text and "speedup" not in text
    assert standard_error("accuracy", 0.5, 100) == pytest.approx(0.05)
    assert standard_error("spearman", 0.5, 100) is None


@pytest.mark.parametrize(
    ("pruned", "said"),
    [
        ({"margin": 0.41, "separated": True}, "has told them from the next best choice, by 0.41"),
        (
            {"margin": 0.004, "separated": False},
            "has NOT told them from the next best choice, which is within 0.004",
        ),
        ({"margin": None, "separated": None}, "no other choice"),
    ],
)
def test_the_report_says_whether_the_choice_was_learned(tmp_path, pruned, said):
    assert said in how_chosen(pruned)
    result = {**RESULT, "pruned": {"kept": [1, 4], **pruned}}
    write_report(tmp_path / "report.md", "demo", CONTENDERS, result, [])
    assert f"layers [1, 4]. {how_chosen(pruned)}" in (tmp_path / "report.md").read_text()


def test_the_picture_shows_one_line_a_layer(tmp_path):
    history = [{"step": s, "open": [1.0, 1 - s / 9], "reduction": s / 18, "target": 0.5} for s in range(10)]
    gate_picture(history, [0], tmp_path / "gates.png")
    pixels = matplotlib.image.imread(tmp_path / "gates.png")
    assert pixels.shape[0] == 600 and pixels.shape[1] == 960
    assert pixels[..., :3].std() > 0.05  # not a blank page


def test_contenders_take_turns_on_each_batch_and_medians_are_taken():
    calls = []

    def run(name, pause):
        return lambda batch: (calls.append((name, batch)), time.sleep(pause))

    found = interleave({"slow": run("slow", 0.02), "fast": run("fast", 0.0)}, [7, 8], repeats=2)
    first = [("slow", 7), ("fast", 7)]
    assert calls[:6] == first + first + first[::-1]  # once to warm up, then A, B and B, A
    assert calls[6:8] == [("slow", 8), ("fast", 8)]
    assert found["slow"].total > 0.04 > found["fast"].total and found["slow"].median == pytest.approx(
        found["slow"].total / 2, rel=0.5
    )


def test_short_calls_are_repeated_and_each_turn_starts_with_one_that_is_not_timed(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE_SECONDS", 0.0)
    calls = []

    def run(name, pauses):
        return lambda batch: (calls.append(name), time.sleep(next(pauses)))

    # A first call of any length, then each of the two turns: one slow call, untimed, and fast ones.
    short = iter([0.0, 0.1, *[0.01] * 6, 0.1, *[0.01] * 20])
    found = interleave(
        {"long": run("long", itertools.repeat(0.04)), "short": run("short", short)},
        [0],
        repeats=2,
        seconds=0.06,
    )
    assert calls.count("long") == 3
    turns = [len(list(turn)) for name, turn in itertools.groupby(calls) if name == "short"]
    assert turns[0] == 1 and sum(turns) > 6
    assert found["short"].total == pytest.approx(0.01, rel=0.6) and found["long"].total > 0.03


def test_the_floor_is_the_products_of_the_plan():
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    model = fastgate.patch(BertForSequenceClassification(config).eval())
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": mask}
    tokens, pairs, h, i = 6, 4 * 4 + 2 * 2, 32, 64
    full = 2 * tokens * h * (4 * h + 2 * i) + 4 * pairs * h  # a whole layer
    last = 2 * 2 * h * (4 * h + 2 * i) + 2 * 2 * tokens * h * 4  # one query a sequence, absorbed
    assert Floor(model, [batch]).flops == [2 * full + last]
    fastgate.prune(model, keep=[0], replacement="zero")
    floor = Floor(model, [batch])
    assert floor.flops == [last + 2 * 2 * 2 * h * 2 * i]
    floor(batch)
    assert floor.flops[0] == fastgate.explain(model, [4, 2]).flops
    shifted = fastgate.patch(BertForSequenceClassification(config).eval())
    fastgate.prune(shifted, keep=[0], replacement="shift")
    every_row = full + 2 * 2 * tokens * h * 2 * i
    assert Floor(shifted, [batch]).flops[0] == fastgate.explain(shifted, [4, 2]).flops < every_row


def test_plain_lines_without_a_terminal_and_bars_with_one(tmp_path):
    path = tmp_path / "plain.txt"
    with path.open("w") as file, Display(Console(file=file)) as display:
        for step in range(1, 101):
            display(Progress("prune", step, 100, 0.5, (1.0, 0.25), "search"))
    lines = path.read_text().splitlines()
    assert len(lines) == 11
    assert lines[-1].startswith("self-prune (search): step 100 of 100") and lines[-1].endswith(
        "gates 1.00 0.25"
    )
    console = Console(force_terminal=True, width=100, record=True, file=io.StringIO())
    display = Display(console)
    console.print(display._picture(Progress("prune", 5, 10, 0.5, (1.0, 0.25, 0.0)), 1.0))
    text = console.export_text()
    assert "layer 0" in text and "open" in text and "0.25" in text and "closed" in text and "5/10" in text
