"""The demo's report: its table, how sure it is, the picture of the gates; and progress on a screen."""

from __future__ import annotations

import io

import matplotlib.image
import pytest
from rich.console import Console

from fastgate.cli.progress import Display
from fastgate.report.demo_report import (
    ModelResult,
    demo_section,
    gate_picture,
    how_chosen,
    standard_error,
    write_demo_report,
)
from fastgate.training.progress import Progress

RESULTS = [
    ModelResult("Hugging Face", 0.9, 6, 6, 22_000_000, 90_000_000, 10.0, 100.0, 2000.0),
    ModelResult("fastgate pruned", 0.89, 2, 6, 20_000_000, 80_000_000, 2.5, 500.0, 10000.0),
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
    lines = demo_section(RESULTS, "accuracy", "").markdown().split("\n\n")[0].splitlines()
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")] == [
        "fastgate pruned", "0.8900", "2 of 6", "20.0M", "80.0MB", "2.5ms", "4.0x", "500", "5.0x",
    ]  # fmt: skip
    assert len(lines) == 4 and lines[2].count("1.0x") == 2
    text = demo_section(RESULTS, "accuracy", "a title").text()
    assert "2.5ms" in text and "4.0x" in text and text.startswith("a title\n") and "…" not in text
    assert "speed-ups over Hugging Face" in " ".join(text.split())


def test_the_report_says_what_was_measured_and_how_sure_it_is(tmp_path):
    write_demo_report(tmp_path / "report.md", "demo", RESULTS, RESULT, ["a note"])
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
    write_demo_report(tmp_path / "report.md", "demo", RESULTS, result, [])
    assert f"layers [1, 4]. {how_chosen(pruned)}" in (tmp_path / "report.md").read_text()


def test_the_picture_shows_one_line_a_layer(tmp_path):
    history = [{"step": s, "open": [1.0, 1 - s / 9], "reduction": s / 18, "target": 0.5} for s in range(10)]
    gate_picture(history, [0], tmp_path / "gates.png")
    pixels = matplotlib.image.imread(tmp_path / "gates.png")
    assert pixels.shape[0] == 600 and pixels.shape[1] == 960
    assert pixels[..., :3].std() > 0.05  # not a blank page
    assert "layer (solid: kept, dashed: removed)" in (tmp_path / "gates.svg").read_text()


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
