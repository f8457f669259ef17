"""csrc/cpu/gemm/fp32_gemm.cpp: its gemms for every level of x86-64 that this machine runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++")
DRIVER = Path(__file__).parent / "gemm_driver.cpp"


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_every_level_multiplies(tmp_path):
    """To float32's precision, and an element has the same bits whatever the sizes of the gemm."""
    program = tmp_path / "driver"
    flags = ("-std=c++17", "-O2", "-fopenmp-simd", "-I", str(CSRC))
    done = subprocess.run([COMPILER, *flags, str(DRIVER), "-o", str(program)], capture_output=True, text=True)
    if done.returncode and "x86-64" in done.stderr:
        pytest.skip("the compiler is for another processor")
    assert done.returncode == 0, done.stderr
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    assert [line.split()[0] for line in lines] == ["baseline", "v3", "v4"][: len(lines)]
    for line in lines:
        level, worst, changed = line.split()
        assert float(worst) < 1e-5 and changed == "0", f"{level}: error {worst}, {changed} changed elements"
