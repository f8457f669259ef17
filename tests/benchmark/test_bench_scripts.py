"""The scripts and sweep files of bench/: tasks that travel, and the run on a GPU, whose steps may fail."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import subprocesses

from fastgate.training.sweep_config import read_sweep_config

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[2] / "bench"


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
    assert "\nsst2, accuracy" in run("bash", BENCH / "gpu_tasks.sh", carried, recipe)
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
