// LayerNorm of a row and its backward, in float32: what the ops with a norm share.
#pragma once

#include <cmath>

#include "cpu/simd.h"

namespace fastgate::cpu {

// Scratch rows: room for the last group of four dropout factors, and each on its own cache line.
constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

struct Norm {
  float mean, rstd;
};

FASTGATE_INLINE Norm statistics(const float* u, int64_t n, float total, float eps) {
  const float mean = total / static_cast<float>(n);
  const float squares = sum(n, [&](int64_t j) {
    const float centred = u[j] - mean;
    return centred * centred;
  });
  return {mean, 1.0f / std::sqrt(squares / static_cast<float>(n) + eps)};
}

// The means over a row of t and of t * xhat.
struct Means {
  float t, along;
};

// xhat into `xhat`, which held the norm's input, and t = dy * weight into `t`, which may be dy itself.
template <class TY>
FASTGATE_INLINE Means norm_backward(
    int64_t n, const TY* dy, const float* weight, Norm norm, float* xhat, float* t, float* dweight,
    float* dbias) {
  float total = 0.0f, along = 0.0f;
#pragma omp simd reduction(+ : total, along)
  for (int64_t j = 0; j < n; ++j) {
    const float g = load(dy, j), normed = (xhat[j] - norm.mean) * norm.rstd, weighted = g * weight[j];
    xhat[j] = normed;
    dweight[j] += g * normed;
    dbias[j] += g;
    t[j] = weighted;
    total += weighted;
    along += weighted * normed;
  }
  return {total / static_cast<float>(n), along / static_cast<float>(n)};
}

// An element of the gradient of the norm's input.
FASTGATE_INLINE float through_norm(Norm norm, Means means, float xhat, float t) {
  return norm.rstd * (t - means.t - xhat * means.along);
}

}  // namespace fastgate::cpu
