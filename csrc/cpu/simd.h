// What vectorised loops are written with: loads and stores of float32 and bfloat16, sums, clones for levels
// of x86-64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// One portable source, compiled for two levels of x86-64; the loader takes the one that the machine can run.
// The rows move at the speed of memory with either, so a third level would only cost build time.
#define FASTGATE_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
// The same with the 64-byte vectors of x86-64-v4, for functions that compute more than they move.
#define FASTGATE_WIDE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
// What a clone calls must be inlined into it, or it would run the baseline's code.
#define FASTGATE_INLINE inline __attribute__((always_inline))

namespace fastgate::cpu {

using bf16 = uint16_t;  // bfloat16 as stored

FASTGATE_INLINE float load(const float* p, int64_t i) { return p[i]; }

FASTGATE_INLINE float load(const bf16* p, int64_t i) {
  const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FASTGATE_INLINE void store(float* p, int64_t i, float value) { p[i] = value; }

// Rounds to nearest, ties to even; a NaN stays one.
FASTGATE_INLINE void store(bf16* p, int64_t i, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  p[i] = static_cast<bf16>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

// Sum of f(j) over 0 <= j < n, by halves: two chains of additions, and one order at every call.
template <class F>
FASTGATE_INLINE float sum(int64_t n, const F& f) {
  const int64_t half = n / 2;
  float low = 0.0f, high = 0.0f;
#pragma omp simd reduction(+ : low, high)
  for (int64_t j = 0; j < half; ++j) {
    low += f(j);
    high += f(j + half);
  }
  return n % 2 ? low + high + f(n - 1) : low + high;
}

template <class F>
FASTGATE_INLINE void for_each(int64_t n, const F& f) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) f(j);
}

}  // namespace fastgate::cpu
