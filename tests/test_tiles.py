"""csrc/cpu/tiles.cpp: the products of every level of x86-64 that this machine runs, against sums in double."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++")
# Prints a line for each level: its name, the largest error of an element, and the elements whose bits another tile
# of the same product changed.
DRIVER = r"""
#include <cstdio>
#include <vector>

#include "cpu/tiles.cpp"

using namespace fastgate::cpu;

float at(int i) { return (i * 2654435761u >> 20) * 0x1p-11f - 1.0f; }

void check(const char* name, Products level) {
  double worst = 0.0;
  int changed = 0;
  std::vector<float> a(40 * 97), b(97 * 97), c(40 * 97), again(97);
  for (size_t i = 0; i < a.size(); ++i) a[i] = at(i);
  for (size_t i = 0; i < b.size(); ++i) b[i] = at(3 * i + 1);
  const auto compare = [&](double true_sum, float found) { worst = std::max(worst, std::abs(true_sum - found)); };
  for (int64_t m : {1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 25, 40})
    for (int64_t k : {0, 1, 7, 40})
      for (int64_t n : {16, 32, 48, 96})
        for (bool add : {false, true})
          for (bool across : {false, true}) {
            const Left left = across ? Left{a.data(), 1, 97} : Left{a.data(), 97, 1};
            if (across && k > 40) continue;
            for (size_t i = 0; i < c.size(); ++i) c[i] = add ? at(i) : 1e9f;
            level.multiply(add, left, b.data(), 97, c.data(), 97, m, n, k);
            for (int64_t i = 0; i < m; ++i)
              for (int64_t j = 0; j < n; ++j) {
                double sum = add ? at(i * 97 + j) : 0.0;
                for (int64_t p = 0; p < k; ++p) sum += double(left.at[i * left.row + p * left.step]) * b[p * 97 + j];
                compare(sum, c[i * 97 + j]);
              }
            const int64_t last = m - 1;
            for (int64_t j = 0; j < n; ++j) again[j] = add ? at(last * 97 + j) : 0.0f;
            level.multiply(
                add, {left.at + last * left.row, left.row, left.step}, b.data(), 97, again.data(), 97, 1, n, k);
            for (int64_t j = 0; j < n; ++j) changed += again[j] != c[last * 97 + j];
          }
  for (int64_t m : {1, 2, 3, 4, 5, 12})
    for (int64_t n : {1, 2, 3, 4, 5, 6, 7, 25, 64})
      for (int64_t k : {16, 96}) {
        level.multiply_rows(a.data(), 97, b.data(), 97, c.data(), 97, m, n, k);
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j) {
            double sum = 0.0;
            for (int64_t p = 0; p < k; ++p) sum += double(a[i * 97 + p]) * b[j * 97 + p];
            compare(sum, c[i * 97 + j]);
            level.multiply_rows(a.data() + i * 97, 97, b.data() + j * 97, 97, again.data(), 97, 1, 1, k);
            changed += again[0] != c[i * 97 + j];
          }
      }
  std::printf("%s %g %d\n", name, worst, changed);
}

int main() {
  check("baseline", {multiply_Baseline, multiply_rows_Baseline});
  if (__builtin_cpu_supports("x86-64-v3")) check("v3", {multiply_Avx2, multiply_rows_Avx2});
  if (__builtin_cpu_supports("x86-64-v4")) check("v4", {multiply_Avx512, multiply_rows_Avx512});
}
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_every_level_multiplies(tmp_path):
    """To float32's precision, and an element has the same bits in whatever tile it is computed."""
    source, program = tmp_path / "driver.cpp", tmp_path / "driver"
    source.write_text(DRIVER)
    flags = ("-std=c++17", "-O2", "-fopenmp-simd", "-I", str(CSRC))
    done = subprocess.run([COMPILER, *flags, str(source), "-o", str(program)], capture_output=True, text=True)
    if done.returncode and "x86-64" in done.stderr:
        pytest.skip("the compiler is for another processor")
    assert done.returncode == 0, done.stderr
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    assert [line.split()[0] for line in lines] == ["baseline", "v3", "v4"][: len(lines)]
    for line in lines:
        level, worst, changed = line.split()
        assert float(worst) < 1e-5 and changed == "0", f"{level}: error {worst}, {changed} changed elements"
