// The exact GELU, without an exponential or a division: max(x, 0) minus the normal distribution's tail.
#pragma once

#include "cpu/simd.h"

namespace fastgate::cpu {

// x Phi(x), for x <= 0 and for x >= 0, is max(x, 0) less |x| Phi(-|x|).
constexpr float kTailEnd = 5.5f;  // from there on a Phi(-a) is at most 1e-7, and is taken as its value there

// Subtracts a Phi(-a), 0 <= a <= kTailEnd, from y, to 4e-7: for a float or a vector of them. Phi(-a) is a
// polynomial of s = a / 2.75 - 1, its largest error times a + 1/4 the least that this degree has.
template <class V>
FASTGATE_INLINE void subtract_tail(V& y, const V& a) {
  const V s = a * (1.0f / 2.75f) - 1.0f;
  V p = -6.028282272e-3f * s + 5.946321709e-3f;
  p = p * s + 3.124413644e-2f;
  p = p * s - 4.524826131e-2f;
  p = p * s - 5.003884197e-2f;
  p = p * s + 1.350839637e-1f;
  p = p * s - 3.462204098e-2f;
  p = p * s - 1.640363454e-1f;
  p = p * s + 2.184463009e-1f;
  p = p * s - 5.114498573e-2f;
  p = p * s - 1.771880245e-1f;
  p = p * s + 2.718600618e-1f;
  p = p * s - 2.068047853e-1f;
  p = p * s + 9.455917444e-2f;
  p = p * s - 2.500816505e-2f;
  p = p * s + 2.979766312e-3f;
  y = y - a * p;
}

FASTGATE_INLINE float gelu(float x) {
  const float a = std::fabs(x);
  float y = x < 0.0f ? 0.0f : x;
  subtract_tail(y, a < kTailEnd ? a : kTailEnd);
  return y;
}

}  // namespace fastgate::cpu
