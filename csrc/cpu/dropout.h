// Dropout as every backend draws it (fastgate/ops/reference/dropout.py): Philox against a threshold.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/simd.h"
#include "ops.h"

namespace fastgate::cpu {

struct Dropout {
  bool on = false;
  uint64_t seed = 0;
  uint32_t threshold = 0;
  float kept = 1.0f;  // 1 / (1 - dropout_p)
};

// op: its name for error messages.
inline Dropout dropout_of(const char* op, double dropout_p, const OptionalTensor& seed) {
  STD_TORCH_CHECK(
      dropout_p >= 0.0 && dropout_p < 1.0, op, ": dropout_p: got ", dropout_p,
      ", wanted 0 <= dropout_p < 1; "
      "pass a gate of 0 to drop everything");
  if (dropout_p == 0.0) return {};
  STD_TORCH_CHECK(
      seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, op,
      ": seed: got none, wanted an int64 tensor of one element with dropout_p > 0; pass a seed");
  return {
      true, static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr())),
      static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 4294967296.0), 4294967295.0)),
      static_cast<float>(1.0 / (1.0 - dropout_p))};
}

// One row: out[column] = kept or 0. Word column % 4 of Philox 4x32-10 (Salmon et al. 2011) under key `seed`
// and counter (row low, row high, column / 4, 0) keeps its element if it reaches the threshold. Writes whole
// groups of four.
FASTGATE_INLINE void keep_factors(const Dropout& dropout, int64_t row, int64_t hidden, float* out) {
  const uint64_t seed = dropout.seed;
  const uint32_t threshold = dropout.threshold;
  const float kept = dropout.kept;
  const uint32_t row_low = static_cast<uint32_t>(row), row_high = static_cast<uint32_t>(row >> 32);
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const int32_t groups = static_cast<int32_t>((hidden + 3) / 4);
#pragma omp simd
  for (int32_t group = 0; group < groups; ++group) {
    uint32_t c0 = row_low, c1 = row_high, c2 = static_cast<uint32_t>(group), c3 = 0;
    uint64_t p0, p1;
// Written out: gcc vectorises the loop over groups only if there is no loop over rounds left inside it.
#define FASTGATE_ROUND(ROUND)                                                \
  p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;            \
  c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ (k0 + ROUND##u * 0x9E3779B9u); \
  c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ (k1 + ROUND##u * 0xBB67AE85u); \
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
