// Gemm of small float32 matrices that lie in the caches.
#pragma once

#include <cstdint>

namespace fastgate::cpu {

// A matrix in memory: element (i, p) is data[i * row_stride + p * column_stride].
struct MatrixView {
  const float* data;
  int64_t row_stride, column_stride;
};

// c (m, n) = a (m, k) b (k, n), or += if `add`. n is a multiple of 16. An element of c is one chain of
// additions along k, whatever m and n are. next: n * k floats that the caller reads after this call; they are
// prefetched. Null: none.
void gemm(
    bool add, MatrixView a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t n,
    int64_t k, const float* next = nullptr);

// c (m, n) = a (m, k) b^T, b (n, k), both with rows of adjacent elements. k is a multiple of 16. An element
// of c does not depend on m and n.
void gemm_nt(
    const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m,
    int64_t n, int64_t k);

}  // namespace fastgate::cpu
