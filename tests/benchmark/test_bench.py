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
        rows = line["models"]
        assert {"fastgate", "fastgate {0,4,8}", "fastgate {0,1}", "sdpa", "eager", "flash varlen"} <= set(
            rows
        )
        assert all(row["ms"] > 0 for row in rows.values()) and line["largest_difference"] < 0.1
        assert set(rows["fastgate"]["speedups"]) >= {"sdpa", "eager", "flash varlen"}
        # The work that is left: both are counted from the same steps.
        assert rows["fastgate"]["tflop_per_s"] > 0 and "flash" in {*rows, *line["absent"]}
    table = (tmp_path / "models.md").read_text()
    assert "| half padding: fastgate, sdpa | >= 2.6 |" in table and "replay over its kernels" in table
    assert len(list(tmp_path.glob("trace_*.json.gz"))) == 5


def test_kernels_of_a_pruned_attention_are_counted(models):
    """12 layers of 3 steps over 5 kernels of embeddings and unpadding; and one more a layer would show."""
    import gpu_models

    for extra in (0, 1):
        counts = {"none": 5 + 12 * (3 + extra), "none, half the layers": 5 + 6 * (3 + extra)}
        found = {"layers": 12, "feed_forward": 3, "kernels": counts}
        assert gpu_models.pruned_attention_kernels(found) == extra


@pytest.fixture
def models(monkeypatch):
    """The modules of bench/models, which find each other by name."""
    monkeypatch.syspath_prepend(str(BENCH / "models"))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCH)):
            del sys.modules[name]


def test_the_flattened_model_is_the_padded_one(models):
    """Logits, loss and gradients; and its logits depend on where each sequence begins."""
    import flattened
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}
    padded = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes)).eval()
    for parameter in padded.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    flat = flattened.FlattenedClassifier(padded).eval()
    mask = (torch.arange(9) < torch.tensor([9, 1, 4])[:, None]).long()
    batch = {"input_ids": torch.randint(1, 50, (3, 9)) * mask, "attention_mask": mask}
    batch["labels"] = torch.tensor([0, 2, 1])
    inputs = flattened.flatten(batch)
    assert inputs["input_ids"].shape == (1, 14) and inputs["cu_seq_lens_q"].tolist() == [0, 9, 10, 14]
    want, got = padded(**batch), flat(**inputs)
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.loss, want.loss)
    want.loss.backward()
    got.loss.backward()
    query = padded.bert.encoder.layer[0].attention.self.query.weight.grad
    torch.testing.assert_close(flat.encoder.encoder.layer[0].attention.self.query.weight.grad, query)
    moved = flat(**inputs | {"cu_seq_lens_q": torch.tensor([0, 8, 10, 14])})
    assert (moved.logits - want.logits).abs().max() > 1e-3


def test_two_versions_are_compared_bit_for_bit(models):
    import same_bits

    one = {"logits": torch.tensor([1.0, 2.0]), "loss": torch.tensor(torch.nan)}
    assert same_bits.difference(one, {name: t.clone() for name, t in one.items()}) is None
    other = one | {"logits": torch.tensor([1.0, 2.0]).nextafter(torch.tensor(3.0))}
    assert "1 of 2 tensors, first logits: largest difference 2.4e-07" in same_bits.difference(one, other)
    assert "zero" not in str(same_bits.difference({"a": torch.tensor(0.0)}, {"a": torch.tensor(0.0)}))
    assert same_bits.difference({"a": torch.tensor(0.0)}, {"a": torch.tensor(-0.0)}) is not None
    assert "only new has ['b']" in same_bits.difference({}, {"b": torch.zeros(1)})
    assert same_bits.difference("KeyError: a", "KeyError: b") is None
    assert same_bits.difference("KeyError: a", "ValueError: a") is not None
    assert same_bits.difference(one, "KeyError: a") == "old ran, new KeyError: a"
    large = torch.zeros(same_bits.LARGE + 1)
    digests = [{"a": same_bits.compact(t)} for t in (large, large + 1)]
    assert same_bits.difference(digests[0], digests[0]) is None and digests[0]["a"].numel() == 32
    assert "other bits" in same_bits.difference(*digests)


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


def test_the_gpu_run_fits_into_nine_minutes():
    text = (BENCH / "gpu.sh").read_text()
    table = text[text.index("<<'TABLE'") : text.index("\nTABLE\n")].splitlines()[1:]
    limits = {"kernels": 0, "models": 0}
    for row in table:
        part, _, seconds, *_ = row.split()
        limits[part] += int(seconds)
    assert limits == {"kernels": 300, "models": 240}


STUB = """#!/usr/bin/env bash
# A Python whose tests of models fail, whose timings fail after two lines, and whose models never end.
case "$*" in
  *collect-only*) echo "tests/ops/test_triton_attention.py::test_one" ;;
  *graphs_on_gpu*) echo "FAILED tests/runtime/test_a.py::test_b - assert 1 == 2"; exit 1 ;;
  *--lines*) printf '{}' >"$OUT/kernels.jsonl"; echo "Fatal Python error | here"; exit 3 ;;
  *gpu_models*) echo "a line" >"$OUT/models.jsonl"; kill -9 $$ ;;
  *) echo "well" ;;
esac
"""


@pytest.mark.parametrize("only", ["kernels", "models", ""])
def test_a_failing_step_of_the_gpu_run_does_not_stop_the_next_one(tmp_path, only):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    out = tmp_path / "out"
    environment = os.environ | {"OUT": str(out), "PYTHON": str(stub), "FASTGATE_GPU_DRY_RUN": "1"}
    environment |= {"ONLY": only} if only else {}
    found = subprocess.run(
        ["bash", BENCH / "gpu.sh"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 1, found.stdout + found.stderr
    failures = (out / "failures.md").read_text().splitlines()[2:]
    kernels = ["| timings | 3 | Fatal Python error   here |"]
    models = ["| graphs | 1 | tests/runtime/test_a.py::test_b |", "| models | 137 |"]
    wanted = {"kernels": kernels, "models": models, "": kernels + models}[only]
    assert len(failures) == len(wanted)
    assert all(row.startswith(want) for row, want in zip(failures, wanted, strict=True))
    assert "steps failed: " in found.stdout and (out / "log.txt").read_text().count("environment: well") >= 1
    assert (out / "kernels.jsonl").exists() == (only != "models")
    assert (out / "models.jsonl").exists() == (only != "kernels")


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
