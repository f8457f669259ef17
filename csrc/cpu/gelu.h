// The exact GELU, without an exponential or a division: max(x, 0) less what the normal distribution takes off.
#pragma once

#include "rows.h"

namespace fastgate::cpu {

// x Phi(x) to 4e-7, which is max(x, 0) - |x| Phi(-|x|). Phi(-a) is a polynomial of s = a / 2.75 - 1, its largest error times
// a + 1/4 the least that this degree has for a <= 5.5; from there on a Phi(-a) is 1e-7 and less, and is left at that.
FASTGATE_INLINE float gelu(float x) {
  float a = std::fabs(x);
  a = a < 5.5f ? a : 5.5f;
  const float s = a * (1.0f / 2.75f) - 1.0f;
  float p = -6.028282272e-3f;
  p = p * s + 5.946321709e-3f;
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
  return (x < 0.0f ? 0.0f : x) - a * p;
}

}  // namespace fastgate::cpu
