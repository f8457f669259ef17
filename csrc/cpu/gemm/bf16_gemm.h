// Gemm of bfloat16 rows and packed panels, its epilogue, and the softmax between two of them, on processors
// with AVX512-BF16, whose instructions multiply pairs of bfloat16 numbers.
#pragma once

#include "cpu/simd.h"

namespace fastgate::cpu {

constexpr int64_t kPanelColumns = 32;  // columns of a panel

// Whether this processor has AVX512-BF16. The functions below need it.
bool has_avx512_bf16();

// c (m, 32) = a (m, k) b (k, 32), c float32. k is even; element (p, column) of b lies at p / 2 * 64 + column
// * 2 + p % 2. Rows of a are a_row apart, those of c 32. An element of c is one chain of additions along k,
// whatever m is. next: the panel that the caller reads after this call; it is prefetched. Null: none.
void bf16_gemm(const bf16* a, int64_t a_row, const bf16* b, float* c, int64_t m, int64_t k, const bf16* next);

// What a gemm's result becomes: `rows` rows of 32 sums at c, of which `width` are used, get `bias` (32,)
// added, then the exact GELU if asked, and are written as bfloat16 rows `to_row` apart.
struct Epilogue {
  const float* c;
  int64_t rows, width;
  const float* bias;
  bool gelu;
  bf16* to;
  int64_t to_row;
};
void bf16_epilogue(const Epilogue& epilogue);

// out = softmax(scale * scores) of n scores, times `factors` (of a dropout, zeros up to a multiple of 16;
// null: none), and zeros up to `width`, a multiple of 16. scores are overwritten.
void bf16_softmax(float* scores, int64_t n, int64_t width, float scale, const float* factors, bf16* out);

}  // namespace fastgate::cpu
