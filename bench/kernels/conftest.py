"""How the kernel timings are run and reported: `pytest bench/kernels`, a test per implementation of a work.

The implementations of one work are timed together, in turn (harness.py); each test reports its own. The timer
that pytest-benchmark reads, an option of it, is a counter that the measured times advance.

    --lines FILE    appends a JSON line per implementation to FILE as it is timed (kernel_table.py reads it)
    --seconds N     starts no work after N seconds; BERT-base's common shapes come first, one of each op
    --quick         one shape per test, two rounds: shows that they run
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # lengths.py is shared with bench/models

import harness
import kernel_table

from fastgate.env import environment

COMMON_ROWS = (4096, 32768)  # of the shapes that are timed first
Items = list[pytest.Item]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one shape per test, two rounds")
    parser.addoption("--lines", type=Path, help="append a JSON line per implementation to this file")
    parser.addoption("--seconds", type=float, help="start no work after so many seconds")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # names the machine and its user; what a figure depends on is here
    machine_info.update(environment())


def pytest_sessionstart(session: pytest.Session) -> None:
    path = session.config.getoption("--lines")
    if path is not None:
        path.write_text(json.dumps({"environment": environment()}) + "\n")


class MeasuredTime:
    """The sum of the seconds that were reported so far: pytest-benchmark's timer."""

    seconds = 0.0


def measured_time() -> float:
    return MeasuredTime.seconds


def pytest_collection_modifyitems(config: pytest.Config, items: Items) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=measured_time))
    if config.getoption("--quick"):
        first: dict[tuple[str, str], dict[str, Any]] = {}
        items[:] = [item for item in items if first.setdefault(_function(item), _shape(item)) == _shape(item)]
    elif config.getoption("--seconds") is not None:
        items[:] = by_priority(items)


def by_priority(items: Items) -> Items:
    """Common shapes of BERT-base first, then its other shapes, then the rest; the ops take turns in each."""
    shapes: dict[tuple[str, str], list[dict[str, Any]]] = {}
    order = {}
    for item in items:
        seen = shapes.setdefault(_function(item), [])
        rank = _rank(_shape(item))
        if _shape(item) not in seen:
            seen.append(_shape(item))
        turn = sum(_rank(shape) == rank for shape in seen[: seen.index(_shape(item))])
        order[item] = (rank, turn)
    return sorted(items, key=order.__getitem__)  # stable: the implementations of a work stay together


def _rank(shape: dict[str, Any]) -> int:
    base = shape.get("hidden", 768) == 768 and shape.get("heads", 12) == 12
    base = base and shape.get("head_dim", 64) == 64 and shape.get("dtype", "bf16") == "bf16"
    return 2 if not base else int(shape.get("rows", COMMON_ROWS[0]) not in COMMON_ROWS)


def _function(item: pytest.Item) -> tuple[str, str]:
    return str(item.path), item.name.partition("[")[0]


def _shape(item: pytest.Item) -> dict[str, Any]:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return {name: value for name, value in parameters.items() if name != "implementation"}


@pytest.fixture(scope="session", autouse=True)
def _stream():
    """One stream for everything: a captured backward runs where its forward ran."""
    if not harness.ON_GPU:
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


@dataclass
class _TimedWork:
    """What is left of a work that was timed: its tensors are gone."""

    group: str
    absent: dict[str, str]
    seconds: dict[str, list[float]]
    info: dict[str, dict[str, object]]


def _time(work: harness.Work, rounds: int) -> _TimedWork:
    results = harness.time_all(work, rounds)
    return _TimedWork(
        work.group,
        work.absent,
        {name: results[name].seconds for name in work.implementations},
        {name: _info(work, results, name) for name in work.implementations},
    )


@pytest.fixture(scope="session")
def _timed_works() -> dict[object, _TimedWork]:
    return {}


@pytest.fixture(scope="session")
def _start() -> float:
    return time.monotonic()


@pytest.fixture
def write_line(request) -> Callable[[Any], None]:
    """write_line(benchmark): appends the figures of a test that has run to the file of --lines."""

    def write_line(benchmark: Any) -> None:
        path = request.config.getoption("--lines")
        if path is not None:
            stats = benchmark.stats.stats
            figures = {"median": stats.median, "iqr": stats.iqr, "rounds": stats.rounds}
            with path.open("a") as file:
                line = kernel_table.line_of(benchmark.group, benchmark.extra_info, figures)
                file.write(json.dumps(line) + "\n")

    return write_line


@pytest.fixture
def report(
    benchmark, request, _timed_works, _start, write_line
) -> Callable[[Callable[..., harness.Work], tuple[Any, ...], str], None]:
    """report(make, arguments, implementation): make(*arguments) is the Work, timed at its first one."""

    def report(make: Callable[..., harness.Work], arguments: tuple[Any, ...], implementation: str) -> None:
        key = (make, *arguments)
        if key not in _timed_works:
            limit = request.config.getoption("--seconds")
            if limit is not None and time.monotonic() - _start > limit:
                pytest.skip(f"the {limit:g} seconds are over")
            quick = request.config.getoption("--quick")
            _timed_works[key] = _time(make(*arguments), harness.QUICK_ROUNDS if quick else harness.ROUNDS)
            if harness.ON_GPU:
                torch.cuda.empty_cache()
        work = _timed_works[key]
        if implementation in work.absent:
            pytest.skip(f"{implementation}: {work.absent[implementation]}")
        seconds = iter(work.seconds[implementation])

        def advance() -> None:
            MeasuredTime.seconds += next(seconds)

        benchmark.group = work.group
        benchmark.extra_info.update(work.info[implementation])
        benchmark.pedantic(advance, rounds=len(work.seconds[implementation]))
        write_line(benchmark)

    return report


def _info(work: harness.Work, results: dict[str, harness.Result], implementation: str) -> dict[str, object]:
    ceilings = {name: results[name].median for name in work.ceilings}
    seconds = results[implementation].median
    slowest = max(ceilings, key=ceilings.__getitem__)
    return {
        "implementation": implementation,
        "how": results[implementation].how,
        "bytes": work.bytes,
        "flops": work.flops,
        "gb_per_s": work.bytes / seconds / 1e9,
        "tflop_per_s": work.flops / seconds / 1e12,
        "ceilings_us": {name: 1e6 * value for name, value in ceilings.items()},
        "bound": slowest,
        "share": ceilings[slowest] / seconds,
    }
