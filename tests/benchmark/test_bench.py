"""The kernel timings: who is timed is right, and takes turns; table, aims and roofline; a run of them all."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from helpers import subprocesses

from fastgate.training.sweep_config import read_sweep_config

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


def work(bench, **contenders):
    truth = torch.arange(6.0)
    return bench.harness.Work(
        "doubling",
        contenders,
        bytes=48,
        ceilings={"copy": bench.harness.copying(48, 1)},
        truth=[truth * 2],
        tolerance=1e-6,
    )


def test_a_wrong_contender_is_not_timed(bench):
    x, timed = torch.arange(6.0), []

    def wrong(place):
        timed.append(place)
        return x * 2.001

    with pytest.raises(AssertionError, match=r"doubling: wrong, result 0: error 5\.0e-04"):
        bench.harness.hold(work(bench, fastgate=lambda place: x * 2, wrong=wrong), 2)
    assert timed == [0]
    with pytest.raises(AssertionError, match="error inf"):
        bench.harness.hold(work(bench, fastgate=lambda place: x * math.nan), 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="laps of the CPU")
def test_contenders_take_turns(bench, monkeypatch):
    monkeypatch.setattr(bench.harness, "LAP_SECONDS", 0.0)  # one call a lap
    x, called = torch.arange(6.0), []

    def contender(name):
        def call(place):
            called.append(name)
            return x * 2

        return call

    found = bench.harness.hold(work(bench, fastgate=contender("a"), other=contender("b")), 3)
    # Checked, tried once each, then lap about: who begins moves on, over the ceiling's turn too.
    assert "".join(called) == "ab" + "ab" + "ab" + "ba" + "ab" + "ab"
    assert set(found) == {"fastgate", "other", "copy"}
    assert all(len(result.seconds) == 3 and result.median > 0 for result in found.values())


class FakeGpu:
    """As much of torch.cuda as laps use; a call takes a microsecond."""

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
def test_laps_of_a_gpu_walk_over_all_sets(bench, monkeypatch, refuse):
    """On a device that is not there: a graph of whole walks, or the same queued behind a wait."""
    gpu = FakeGpu(refuse)
    gpu.install(monkeypatch)
    lap = bench.harness._gpu_lap(gpu.call, sets=3)
    assert lap.how == ("queue" if refuse else "graph") and lap.calls % 3 == 0
    before = len(gpu.places)
    lap.run()
    assert lap.seconds() == pytest.approx(1e-6)
    assert (gpu.places[before:] == [turn % 3 for turn in range(lap.calls)]) == refuse
    assert (gpu.slept > 0) == refuse and lap.kept == [0, 1, 2]


ENVIRONMENT = {"device": "NVIDIA H200", "torch": "2.11.0"}


def line(work, contender, us, **more):
    return {
        "work": work, "contender": contender, "us": us, "gb_per_s": 1.0, "tflop_per_s": 300.0, "bytes": 100,
        "flops": 0, "bound": "copy", "share": 0.8, "ceilings_us": {"copy": 8.0}, **more,
    }  # fmt: skip


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
            {"work": "gated_add_norm host time of a call, inference", "contender": name, "host_us": us}
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


def test_tasks_travel_and_run_where_no_hub_is(minilm_path, tmp_path):
    """Packed, trimmed, the model in bfloat16; then tuned, pruned and scored; done runs are not done again."""
    words = ("good", "bad", "film", "plot", "dull", "bright")
    rows = [{"sentence": " ".join(words[i % 6 :]), "label": i % 2} for i in range(20)]
    data, carried = tmp_path / "data" / "sst2", tmp_path / "carried"
    data.mkdir(parents=True)
    for split in ("train", "validation"):
        with gzip.open(data / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    environment = os.environ | {"PYTHONPATH": subprocesses.PACKAGE_PARENT, "OMP_NUM_THREADS": "1"}
    environment |= {"OUT": str(tmp_path), "PYTHON": sys.executable}
    recipe = tmp_path / "recipe.yaml"
    runs = "runs: [{method: learned, sparsity: 0.67}]"
    recipe.write_text(f"{{tasks: [sst2], epochs: 1, dense_epochs: 1, batch_size: 4, {runs}}}")

    def run(*command):
        found = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    packed = run(sys.executable, BENCH / "sweeps" / "carry_tasks.py", data.parent, carried, "--rows", 12)
    assert json.loads(packed.splitlines()[-1])["rows"] == {"sst2": {"train": 12, "validation": 12}}
    weights = safetensors.torch.load_file(next((carried / "model").glob("*.safetensors")))
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert "## sst2, accuracy" in run("bash", BENCH / "gpu_tasks.sh", carried, recipe)
    (line,) = (tmp_path / "tasks.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert (result["task"], result["model"], result["layers"]) == ("sst2", "model", 6) and len(
        result["kept"]
    ) == 2
    assert str(tmp_path) not in line and (tmp_path / "report" / "score.svg").is_file()
    assert "sst2 seed 0" not in run("bash", BENCH / "gpu_tasks.sh", carried, recipe)


def test_the_recipes_of_the_sweeps_are_read():
    for name, count in (
        ("tasks.yaml", 7 * 3 * 4),
        ("tasks_controls.yaml", 7 * 3 * 15),
        ("tasks_speed.yaml", 5 * 3 * 2),
        ("tasks_gpu.yaml", 7 * 3),
    ):
        assert len(read_sweep_config(BENCH / "sweeps" / name)) == count


def test_models_are_timed_and_traced(tmp_path):
    """Tiny ones, wherever this runs: outputs found equal, every scenario a line, the aims in a table."""
    environment = os.environ | {"PYTHONPATH": subprocesses.PACKAGE_PARENT, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, BENCH / "models" / "gpu_models.py", "--quick", "--out", tmp_path]
    found = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    first, traced, *lines = map(json.loads, (tmp_path / "models.jsonl").read_text().splitlines())
    assert first["environment"]["torch"] == torch.__version__ and traced["pruned_attention_kernels"] == 0
    assert [line["scenario"] for line in lines] == ["half padding", "batch 1, length 32", "training step"]
    for line in lines:
        rows = line["contenders"]
        assert {"fastgate", "fastgate {0,4,8}", "fastgate {0,1}", "sdpa", "eager"} <= set(rows)
        assert all(row["ms"] > 0 for row in rows.values()) and line["largest_difference"] < 0.1
        assert set(rows["fastgate"]["faster_than"]) >= {"sdpa", "eager"}
        # The work that is left: both are counted from the same steps.
        assert rows["fastgate"]["tflop_per_s"] > 0 and "flash" in {*rows, *line["absent"]}
    table = (tmp_path / "models.md").read_text()
    assert "| half padding: fastgate, sdpa | >= 2.6 |" in table and "replay over its kernels" in table
    assert len(list(tmp_path.glob("trace_*.json.gz"))) == 5


def test_kernels_of_a_pruned_attention_are_counted(bench, monkeypatch):
    """12 layers of 3 steps over 5 kernels of embeddings and packing; and one more a layer would show."""
    import gpu_models

    for extra in (0, 1):
        counts = {"none": 5 + 12 * (3 + extra), "none, half the layers": 5 + 6 * (3 + extra)}
        found = {"layers": 12, "feed_forward": 3, "kernels": counts}
        assert gpu_models.pruned_attention_kernels(found) == extra
    sys.modules.pop("gpu_models")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_run_says_that_there_is_no_gpu(tmp_path):
    found = subprocess.run(
        ["bash", BENCH / "gpu.sh"],
        env=os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2
    assert "gpu.sh: device: got none, wanted a CUDA device" in found.stderr
    assert not list(tmp_path.iterdir())
