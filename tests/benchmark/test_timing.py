"""Interleaved timing, on a clock that only the timed calls move."""

from __future__ import annotations

import itertools

import pytest

from fastgate.benchmark import timing
from fastgate.benchmark.timing import interleave

pytestmark = pytest.mark.slow


class Clock:
    """As much of the module `time` as timing uses."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def timed(clock, calls, name, seconds):
    """A call that notes itself and takes the next of `seconds`."""

    def call(batch):
        calls.append((name, batch))
        clock.sleep(next(seconds))

    return call


def test_models_take_turns_on_each_batch(clock):
    calls = []
    runs = {name: timed(clock, calls, name, itertools.repeat(0.1)) for name in ("a", "b")}
    interleave(runs, [7, 8], repeats=2)
    untimed = [("a", 7), ("b", 7)]
    assert calls[:6] == untimed + untimed + untimed[::-1]  # once untimed, then A, B and B, A
    assert calls[6:] == [(name, 8) for name, _ in calls[:6]]


def test_the_median_of_the_repeats_counts(clock):
    # Of each batch: a first call, which is not timed, and three that are.
    seconds = iter([9.0, 0.3, 0.1, 0.2, 9.0, 0.4, 0.6, 0.5])
    found = interleave({"one": timed(clock, [], "one", seconds)}, [7, 8], repeats=3)
    assert found["one"].batches == pytest.approx((0.2, 0.5))
    assert found["one"].total == pytest.approx(0.7) and found["one"].median == pytest.approx(0.35)


def test_short_calls_are_repeated_and_each_turn_starts_with_one_that_is_not_timed(clock):
    calls = []
    # A first call, then two turns: one slow call, untimed, and three fast ones that last 0.03 seconds.
    short = iter([0.01, *[0.2, 0.01, 0.01, 0.01] * 2])
    runs = {
        "long": timed(clock, calls, "long", itertools.repeat(0.04)),
        "short": timed(clock, calls, "short", short),
    }
    found = interleave(runs, [0], repeats=2, seconds=0.0599)
    names = [name for name, _ in calls]
    assert [(name, len(list(turn))) for name, turn in itertools.groupby(names)] == [
        ("long", 1), ("short", 1), ("long", 1), ("short", 8), ("long", 1),
    ]  # fmt: skip
    assert found["short"].total == pytest.approx(0.01) and found["long"].total == pytest.approx(0.04)


def test_a_pause_lets_other_threads_stop_before_a_short_turn(clock, monkeypatch):
    monkeypatch.setattr(timing, "PAUSE_SECONDS", 5.0)
    found = interleave({"one": timed(clock, [], "one", itertools.repeat(0.01))}, [0], repeats=1, seconds=0.02)
    assert clock.now > 5.0 and found["one"].total == pytest.approx(0.01)  # the pause is not timed
