"""The display of a run: the remaining time, scorings, and lines between the bars."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fastgate.cli import progress
from fastgate.cli.progress import Display, duration
from fastgate.training.progress import DENSE, SCORE, Progress


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the display sees; set clock[0]."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines_of(clock, steps, terminal=False):
    """What is printed for [(seconds, Progress)]."""
    file = io.StringIO()
    with Display(Console(file=file, width=200, force_terminal=terminal)) as display:
        for seconds, step in steps:
            clock[0] = seconds
            display(step)
    return file.getvalue()


def test_the_remaining_time_is_that_of_the_steps_left_at_the_speed_so_far(clock):
    steps = [(5.0 + 2.0 * step, Progress(DENSE, step, 100)) for step in range(1, 101)]
    lines = lines_of(clock, steps).splitlines()
    assert lines[0] == "dense fine-tune: step 1 of 100, 0 s"
    assert "dense fine-tune: step 10 of 100, 18 s, about 3 min left" in lines
    assert "dense fine-tune: step 60 of 100, 2 min, about 80 s left" in lines
    assert lines[-1] == "dense fine-tune: step 100 of 100, 3 min"


def test_a_resumed_phase_counts_the_steps_of_this_process(clock):
    steps = [(float(step), Progress(DENSE, step, 100)) for step in range(81, 101)]
    lines = lines_of(clock, steps).splitlines()
    assert "dense fine-tune: step 90 of 100, 9 s, about 10 s left" in lines


def test_a_terminal_shows_the_remaining_time(clock):
    shown = lines_of(clock, [(0.0, Progress(DENSE, 1, 11)), (6.0, Progress(DENSE, 3, 11))], terminal=True)
    assert "about 24 s left" in shown


def test_only_a_long_scoring_prints_lines(clock):
    short = [(0.1 * batch, Progress(SCORE, batch, 50)) for batch in range(1, 51)]
    assert lines_of(clock, short) == ""
    long = [(batch, Progress(SCORE, batch, 50)) for batch in range(1, 51)]
    lines = lines_of(clock, long).splitlines()
    assert (
        "score: batch 20 of 50, 19 s, about 30 s left" in lines and lines[-1] == "score: batch 50 of 50, 49 s"
    )


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (99.0, "99 s"), (120.0, "2 min"), (5400.0, "90 min"), (9000.0, "2.5 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
