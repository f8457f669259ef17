"""bench/kernels: who is timed is right, and takes turns; table, aims and roofline; a run of them all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import subprocesses

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/, which find each other by name."""
    monkeypatch.syspath_prepend(str(BENCH / "kernels"))
    import harness
    import kernel_table

    yield SimpleNamespace(harness=harness, kernel_table=kernel_table)
    for name in ("harness", "kernel_table"):
        sys.modules.pop(name, None)


def work(bench, **implementations):
    truth = torch.arange(6.0)
    return bench.harness.Work(
        "doubling",
        implementations,
        bytes=48,
        ceilings={"copy": bench.harness.copying(48, 1)},
        truth=[truth * 2],
        tolerance=1e-6,
    )


def test_a_wrong_implementation_is_not_timed(bench):
    x, timed = torch.arange(6.0), []

    def wrong(place):
        timed.append(place)
        return x * 2.001

    with pytest.raises(AssertionError, match=r"doubling: wrong, result 0: error 5\.0e-04"):
        bench.harness.time_all(work(bench, fastgate=lambda place: x * 2, wrong=wrong), 2)
    assert timed == [0]
    with pytest.raises(AssertionError, match="error inf"):
        bench.harness.time_all(work(bench, fastgate=lambda place: x * math.nan), 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="blocks of the CPU")
def test_implementations_take_turns(bench, monkeypatch):
    monkeypatch.setattr(bench.harness, "BLOCK_SECONDS", 0.0)  # one call a block
    x, called = torch.arange(6.0), []

    def implementation(name):
        def call(place):
            called.append(name)
            return x * 2

        return call

    found = bench.harness.time_all(work(bench, fastgate=implementation("a"), other=implementation("b")), 3)
    # Checked, tried once each, then block about: who begins moves on, over the ceiling's turn too.
    assert "".join(called) == "ab" + "ab" + "ab" + "ba" + "ab" + "ab"
    assert set(found) == {"fastgate", "other", "copy"}
    assert all(len(result.seconds) == 3 and result.median > 0 for result in found.values())


class FakeGpu:
    """As much of torch.cuda as blocks use; a call takes a microsecond."""

    def __init__(self, refuse: bool) -> None:
        self.refuse, self.clock, self.slept = refuse, 0.0, 0

    def call(self, place: int) -> int:
        self.clock += 1e-6
        self.places.append(place)
        return place

    places: list[int]

    def install(self, monkeypatch) -> None:
        gpu = self
        gpu.places = []

        class Event:
            def __init__(self, enable_timing):
                self.at = 0.0

            def record(self):
                self.at = gpu.clock

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Graph:
            def replay(self):
                gpu.clock += self.taken

        @contextlib.contextmanager
        def capture(graph, stream):
            if gpu.refuse:
                raise RuntimeError("operation not permitted when stream is capturing")
            start = gpu.clock
            yield
            graph.taken, gpu.clock = gpu.clock - start, start

        def sleep(cycles):
            gpu.slept = cycles

        fakes = {"Event": Event, "CUDAGraph": Graph, "graph": capture, "_sleep": sleep}
        fakes |= {"synchronize": lambda: None, "current_stream": lambda: None}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize("refuse", [False, True])
def test_timed_blocks_of_a_gpu_walk_over_all_sets(bench, monkeypatch, refuse):
    """On a device that is not there: a graph of whole walks, or the same queued behind a wait."""
    gpu = FakeGpu(refuse)
    gpu.install(monkeypatch)
    block = bench.harness._gpu_timed_block(gpu.call, sets=3)
    assert block.how == ("queue" if refuse else "graph") and block.calls % 3 == 0
    before = len(gpu.places)
    block.run()
    assert block.seconds() == pytest.approx(1e-6)
    assert (gpu.places[before:] == [turn % 3 for turn in range(block.calls)]) == refuse
    assert (gpu.slept > 0) == refuse and block.kept == [0, 1, 2]


ENVIRONMENT = {"device": "NVIDIA H200", "torch": "2.11.0"}


def line(work, implementation, us, **more):
    figures = {"us": us, "gb_per_s": 1.0, "tflop_per_s": 300.0, "bytes": 100, "flops": 0, "share": 0.8}
    bound = {"bound": "copy", "ceilings_us": {"copy": 8.0}}
    return {"work": work, "implementation": implementation, **figures, **bound, **more}


def test_table_and_aims(bench, tmp_path):
    path = tmp_path / "kernels.jsonl"
    norm, product = "gated_add_norm forward 32768x768 bf16", "linear_gelu forward 4096x768 bfloat16"
    small, attention = (
        "gated_add_norm backward 4096x384 bf16 p=0.1",
        "attention forward 512 12x64 bfloat16",
    )
    ceilings = {"ceilings_us": {"product": 9.5}, "bound": "product"}
    given = [
        line(norm, "fastgate", 10.0),
        line(norm, "cuda", 9.0),
        line(small, "fastgate", 10.0),
        line(small, "compile", 14.0),
        line(small, "eager", 30.0),
        line(attention, "fastgate", 10.0),
        line(attention, "flash", 9.0),
        line(product, "fastgate", 10.0, **ceilings),
        line(product, "eager", 11.0, **ceilings),
        *(
            {"work": "gated_add_norm host time of a call, inference", "implementation": name, "host_us": us}
            for name, us in (("fastgate", 15.0), ("layer_norm", 10.0))
        ),
    ]
    path.write_text("\n".join(json.dumps(one) for one in ({"environment": ENVIRONMENT}, *given)))
    environment, works = bench.kernel_table.read(path)
    table = bench.kernel_table.table(environment, works)
    assert (
        "NVIDIA H200" in table
        and f"| {small} | 10.0 | 1 | 300.0 | 80% | copy | compile 14.0 µs | 1.40x |" in table
    )
    found = {(aim.work, aim.what): aim.met for aim in bench.kernel_table.aims(works)}
    assert found == {
        (norm, "share of the copy rate"): False,
        (small, "faster than compile"): True,
        (attention, "faster than flash"): False,
        (attention, "TFLOP/s"): False,
        (product, "faster than eager"): False,
        (product, "share of the product alone"): True,
        ("gated_add_norm, one call", "host time of layer_norm over ours"): True,
    }


def test_the_timings_run_here(tmp_path):
    """All of bench/, a shape each, then what is made of the results. What needs a GPU is skipped by name."""
    raw = tmp_path / "kernels.json"
    environment = os.environ | {"PYTHONPATH": subprocesses.PACKAGE_PARENT, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark measures nothing in a worker

    def run(*command):
        found = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    options = ("-q", "-p", "no:cacheprovider", "--quick", f"--benchmark-json={raw}")
    printed = run("-m", "pytest", BENCH / "kernels", "-c", BENCH.parent / "pyproject.toml", *options)
    assert " passed" in printed
    if not torch.cuda.is_available():
        assert "cuda: no CUDA device" in printed
    lines = tmp_path / "kernels.jsonl"
    lines.write_text(run(BENCH / "kernels" / "kernel_table.py", "lines", raw))
    first, *rest = map(json.loads, lines.read_text().splitlines())
    assert first["environment"]["torch"] == torch.__version__
    timed = {found["work"].split()[0] for found in rest}
    assert timed == {path.stem.removeprefix("bench_") for path in BENCH.glob("kernels/bench_*.py")}
    assert all(found["us"] > 0 for found in rest if "us" in found)
    assert "| work |" in run(BENCH / "kernels" / "kernel_table.py", "table", lines)
    run(BENCH / "kernels" / "roofline.py", lines, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_common_shapes_are_timed_first_and_the_ops_take_turns(bench, monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("bench_conftest", BENCH / "kernels" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, conftest)
    spec.loader.exec_module(conftest)

    def item(name, **parameters):
        return SimpleNamespace(path=name, name=f"test_{name}[]", callspec=SimpleNamespace(params=parameters))

    rows = [(512, 384), (512, 768), (4096, 768), (32768, 768)]
    items = [item(op, rows=r, hidden=h, implementation=i) for op in "ab" for r, h in rows for i in ("x", "y")]

    class Item(SimpleNamespace):
        __hash__ = object.__hash__

    ordered = conftest.by_priority([Item(**vars(one)) for one in items])
    works = [(one.path, one.callspec.params["rows"], one.callspec.params["hidden"]) for one in ordered[::2]]
    assert works == [
        ("a", 4096, 768), ("b", 4096, 768), ("a", 32768, 768), ("b", 32768, 768),
        ("a", 512, 768), ("b", 512, 768), ("a", 512, 384), ("b", 512, 384),
    ]  # fmt: skip
    assert [one.callspec.params["implementation"] for one in ordered] == ["x", "y"] * 8
