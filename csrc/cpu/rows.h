// What the row kernels are written with: float32 views of stored elements, row sums, dropout by Philox, clones.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// One portable source, compiled for two levels of x86-64; the loader takes the one that the machine can run. The rows
// move at the speed of memory with either, so a third level would only cost build time.
#define FASTGATE_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
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
FASTGATE_INLINE void each(int64_t n, const F& f) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) f(j);
}

// Dropout of one row: out[column] = kept or 0. Word column % 4 of Philox 4x32-10 (Salmon et al. 2011) under key `seed`
// and counter (row low, row high, column / 4, 0) keeps its element if it reaches the threshold. Writes whole groups
// of four.
FASTGATE_INLINE void keep_factors(
    uint64_t seed, int64_t row, int64_t hidden, uint32_t threshold, float kept, float* out) {
  const uint32_t row_low = static_cast<uint32_t>(row), row_high = static_cast<uint32_t>(row >> 32);
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const int32_t groups = static_cast<int32_t>((hidden + 3) / 4);
#pragma omp simd
  for (int32_t group = 0; group < groups; ++group) {
    uint32_t c0 = row_low, c1 = row_high, c2 = static_cast<uint32_t>(group), c3 = 0;
    uint64_t p0, p1;
// Written out: gcc vectorises the loop over groups only if there is no loop over rounds left inside it.
#define FASTGATE_ROUND(ROUND)                                                 \
  p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;             \
  c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ (k0 + ROUND##u * 0x9E3779B9u);  \
  c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ (k1 + ROUND##u * 0xBB67AE85u);  \
  c1 = static_cast<uint32_t>(p1), c3 = static_cast<uint32_t>(p0);
    FASTGATE_ROUND(0)
    FASTGATE_ROUND(1)
    FASTGATE_ROUND(2)
    FASTGATE_ROUND(3)
    FASTGATE_ROUND(4)
    FASTGATE_ROUND(5)
    FASTGATE_ROUND(6)
    FASTGATE_ROUND(7)
    FASTGATE_ROUND(8)
    FASTGATE_ROUND(9)
#undef FASTGATE_ROUND
    out[4 * group + 0] = c0 >= threshold ? kept : 0.0f;
    out[4 * group + 1] = c1 >= threshold ? kept : 0.0f;
    out[4 * group + 2] = c2 >= threshold ? kept : 0.0f;
    out[4 * group + 3] = c3 >= threshold ? kept : 0.0f;
  }
}

}  // namespace fastgate::cpu
