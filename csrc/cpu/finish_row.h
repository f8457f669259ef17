// Sums of a product of bfloat16, still in the first-level cache, become a row of its result. For functions that are
// compiled for AVX512-BF16, or for more: they take it in, amid what else they compute.
#pragma once

#include "gelu.h"
#include "pairs.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define FASTGATE_PAIRS
#ifdef __clang__
#include <immintrin.h>
#define FASTGATE_PAIRS_FEATURES "avx512f,avx512bw,avx512vl,avx512bf16"
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // what GCC 12 says of its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#define FASTGATE_PAIRS_FEATURES "avx512f,avx512bw,avx512vl,avx512bf16,prefer-vector-width=512"
#endif

#define FASTGATE_PAIRS_TARGET __attribute__((target(FASTGATE_PAIRS_FEATURES)))

namespace fastgate::cpu {

template <bool Gelu>
FASTGATE_PAIRS_TARGET FASTGATE_INLINE __m512 finished(const float* sums, const float* bias) {
  const __m512 x = _mm512_add_ps(_mm512_loadu_ps(sums), _mm512_loadu_ps(bias));
  if constexpr (!Gelu) return x;
  // The second operand is taken where the first is not a number, which x must stay.
  __m512 y = _mm512_max_ps(_mm512_setzero_ps(), x);
  take_off(y, _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(kFarthest)));
  return y;
}

template <bool Gelu>
FASTGATE_PAIRS_TARGET FASTGATE_INLINE void finish_row(const Sums& sums, int64_t i) {
  const float* c = sums.c + i * kPairPanel;
  const __m512 low = finished<Gelu>(c, sums.bias), high = finished<Gelu>(c + 16, sums.bias + 16);
  const auto wanted = static_cast<__mmask32>((uint64_t{1} << sums.width) - 1);
  _mm512_mask_storeu_epi16(sums.to + i * sums.to_row, wanted, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

}  // namespace fastgate::cpu
#endif
