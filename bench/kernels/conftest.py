"""How the kernel timings are held and reported: `pytest bench --benchmark-json=FILE`, a row a contender.

The contenders of one work are timed together, in turn (harness.py); each test reports its own contender. The
clock that pytest-benchmark reads is one that the measured times move.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # lengths.py is shared with bench/models

import harness

from fastgate.env import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one shape a test, two rounds: shows that they run")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.clear()  # names the machine and its user; what a figure depends on is here
    machine_info.update(environment())


class _Clock:
    now = 0.0


def measured() -> float:
    """The sum of the times that were reported."""
    return _Clock.now


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=measured))
    if config.getoption("--quick"):
        first: dict[tuple[str, str], dict] = {}
        items[:] = [item for item in items if first.setdefault(_function(item), _shape(item)) == _shape(item)]


def _function(item: pytest.Item) -> tuple[str, str]:
    return str(item.path), item.name.partition("[")[0]


def _shape(item: pytest.Item) -> dict:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return {name: value for name, value in parameters.items() if name != "contender"}


@pytest.fixture(scope="session", autouse=True)
def _stream():
    """One stream for everything: a captured backward runs where its forward ran."""
    if not harness.ON_GPU:
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


@dataclass
class _Held:
    """What is left of a work that was timed: its tensors are gone."""

    group: str
    absent: dict[str, str]
    seconds: dict[str, list[float]]
    info: dict[str, dict[str, object]]


def _hold(work: harness.Work, rounds: int) -> _Held:
    results = harness.hold(work, rounds)
    return _Held(
        work.group,
        work.absent,
        {name: results[name].seconds for name in work.contenders},
        {name: _info(work, results, name) for name in work.contenders},
    )


@pytest.fixture(scope="session")
def _held() -> dict[object, _Held]:
    return {}


@pytest.fixture
def report(benchmark, request, _held) -> Callable[[Callable[..., harness.Work], tuple, str], None]:
    """report(make, arguments, contender): make(*arguments) is the Work, timed at its first contender."""

    def report(make: Callable[..., harness.Work], arguments: tuple, contender: str) -> None:
        key = (make, *arguments)
        if key not in _held:
            quick = request.config.getoption("--quick")
            _held[key] = _hold(make(*arguments), harness.QUICK_ROUNDS if quick else harness.ROUNDS)
            if harness.ON_GPU:
                torch.cuda.empty_cache()
        held = _held[key]
        if contender in held.absent:
            pytest.skip(f"{contender}: {held.absent[contender]}")
        left = iter(held.seconds[contender])

        def advance() -> None:
            _Clock.now += next(left)

        benchmark.group = held.group
        benchmark.extra_info.update(held.info[contender])
        benchmark.pedantic(advance, rounds=len(held.seconds[contender]))

    return report


def _info(work: harness.Work, results: dict[str, harness.Result], contender: str) -> dict[str, object]:
    ceilings = {name: results[name].median for name in work.ceilings}
    seconds = results[contender].median
    slowest = max(ceilings, key=ceilings.__getitem__)
    return {
        "contender": contender,
        "how": results[contender].how,
        "bytes": work.bytes,
        "flops": work.flops,
        "gb_per_s": work.bytes / seconds / 1e9,
        "tflop_per_s": work.flops / seconds / 1e12,
        "ceilings_us": {name: 1e6 * value for name, value in ceilings.items()},
        "bound": slowest,
        "share": ceilings[slowest] / seconds,
    }
