// Products of bfloat16 rows and packed panels, and what stands between them, on processors that multiply bfloat16 in pairs
// (AVX512-BF16).
#pragma once

#include "rows.h"

namespace fastgate::cpu {

constexpr int64_t kPairPanel = 32;  // columns of a panel

// Whether this processor can.
bool has_pairs();

// c (m, 32) = a (m, k) b (k, 32). k is even; element (p, column) of b lies at p / 2 * 64 + column * 2 + p % 2. Rows of a are
// a_row apart, those of c 32. An element of c is one chain of additions along k, whatever m is. next: the panel that the
// caller reads afterwards, which is brought nearer meanwhile; null: none.
void multiply_pairs(const bf16* a, int64_t a_row, const bf16* b, float* c, int64_t m, int64_t k, const bf16* next);

// Rows of 32 sums, `width` of them wanted, and what they become: bfloat16 rows `to_row` apart, 32 of bias added, then the
// exact GELU of it if asked.
struct Sums {
  const float* c;
  int64_t rows, width;
  const float* bias;
  bool gelu;
  bf16* to;
  int64_t to_row;
};
void finish_pairs(const Sums& sums);

// out = softmax(scale * scores) of n scores, times `factors` (of a dropout, zeros up to a multiple of 16; null: none), zeros up
// to `width`, a multiple of 16. scores are written over.
void softmax_pairs(float* scores, int64_t n, int64_t width, float scale, const float* factors, bf16* out);

}  // namespace fastgate::cpu
