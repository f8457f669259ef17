// The epilogue of one row of a bfloat16 gemm, whose sums are still in the first-level cache. It is inlined
// into functions that are compiled for AVX512-BF16 or for more.
#pragma once

#include "cpu/gelu.h"
#include "cpu/gemm/bf16_gemm.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define FASTGATE_AVX512_BF16
#ifdef __clang__
#include <immintrin.h>
#define FASTGATE_AVX512_BF16_FEATURES "avx512f,avx512bw,avx512vl,avx512bf16"
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#define FASTGATE_AVX512_BF16_FEATURES "avx512f,avx512bw,avx512vl,avx512bf16,prefer-vector-width=512"
#endif

#define FASTGATE_AVX512_BF16_TARGET __attribute__((target(FASTGATE_AVX512_BF16_FEATURES)))

namespace fastgate::cpu {

template <bool Gelu>
FASTGATE_AVX512_BF16_TARGET FASTGATE_INLINE __m512 epilogue_of(const float* sums, const float* bias) {
  const __m512 x = _mm512_add_ps(_mm512_loadu_ps(sums), _mm512_loadu_ps(bias));
  if constexpr (!Gelu) return x;
  // max takes its second operand where one is a NaN, so x stays a NaN.
  __m512 y = _mm512_max_ps(_mm512_setzero_ps(), x);
  subtract_tail(y, _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(kTailEnd)));
  return y;
}

template <bool Gelu>
FASTGATE_AVX512_BF16_TARGET FASTGATE_INLINE void epilogue_row(const Epilogue& epilogue, int64_t i) {
  const float* c = epilogue.c + i * kPanelColumns;
  const __m512 low = epilogue_of<Gelu>(c, epilogue.bias),
               high = epilogue_of<Gelu>(c + 16, epilogue.bias + 16);
  const auto used = static_cast<__mmask32>((uint64_t{1} << epilogue.width) - 1);
  _mm512_mask_storeu_epi16(epilogue.to + i * epilogue.to_row, used, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

}  // namespace fastgate::cpu
#endif
