// Prints a line for each level of x86-64 that this machine runs: its name, the largest error of an element
// against sums in double, and the number of elements whose bits are others in another tile of the same
// product.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/gemm/fp32_gemm.cpp"

using namespace fastgate::cpu;

float at(int i) { return (i * 2654435761u >> 20) * 0x1p-11f - 1.0f; }

void check(const char* name, GemmLevel level) {
  double worst = 0.0;
  int changed = 0;
  std::vector<float> a(40 * 97), b(97 * 97), c(40 * 97), again(97);
  for (size_t i = 0; i < a.size(); ++i) a[i] = at(i);
  for (size_t i = 0; i < b.size(); ++i) b[i] = at(3 * i + 1);
  const auto compare = [&](double true_sum, float found) {
    worst = std::max(worst, std::abs(true_sum - found));
  };
  for (int64_t m : {1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 25, 40})
    for (int64_t k : {0, 1, 7, 40})
      for (int64_t n : {16, 32, 48, 96})
        for (bool add : {false, true})
          for (bool across : {false, true}) {
            const MatrixView left = across ? MatrixView{a.data(), 1, 97} : MatrixView{a.data(), 97, 1};
            for (size_t i = 0; i < c.size(); ++i) c[i] = add ? at(i) : 1e9f;
            level.gemm(add, left, b.data(), 97, c.data(), 97, m, n, k, nullptr);
            for (int64_t i = 0; i < m; ++i)
              for (int64_t j = 0; j < n; ++j) {
                double sum = add ? at(i * 97 + j) : 0.0;
                for (int64_t p = 0; p < k; ++p)
                  sum += double(left.data[i * left.row_stride + p * left.column_stride]) * b[p * 97 + j];
                compare(sum, c[i * 97 + j]);
              }
            const int64_t last = m - 1;
            for (int64_t j = 0; j < n; ++j) again[j] = add ? at(last * 97 + j) : 0.0f;
            level.gemm(
                add, {left.data + last * left.row_stride, left.row_stride, left.column_stride}, b.data(), 97,
                again.data(), 97, 1, n, k, b.data());
            for (int64_t j = 0; j < n; ++j) changed += again[j] != c[last * 97 + j];
          }
  for (int64_t m : {1, 2, 3, 4, 5, 12})
    for (int64_t n : {1, 2, 3, 4, 5, 6, 7, 25, 64})
      for (int64_t k : {16, 96}) {
        level.gemm_nt(a.data(), 97, b.data(), 97, c.data(), 97, m, n, k);
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j) {
            double sum = 0.0;
            for (int64_t p = 0; p < k; ++p) sum += double(a[i * 97 + p]) * b[j * 97 + p];
            compare(sum, c[i * 97 + j]);
            level.gemm_nt(a.data() + i * 97, 97, b.data() + j * 97, 97, again.data(), 97, 1, 1, k);
            changed += again[0] != c[i * 97 + j];
          }
      }
  std::printf("%s %g %d\n", name, worst, changed);
}

int main() {
  check("baseline", {gemm_Baseline, gemm_nt_Baseline});
  if (__builtin_cpu_supports("x86-64-v3")) check("v3", {gemm_Avx2, gemm_nt_Avx2});
  if (__builtin_cpu_supports("x86-64-v4")) check("v4", {gemm_Avx512, gemm_nt_Avx512});
}
