// The dropout mask of every backend, Philox 4x32-10 (Salmon et al. 2011): fastgate/ops/reference/dropout.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastgate::cuda {

// Four words for four columns: counter (row low, row high, column / 4, 0) under the key `seed` (low, high).
__device__ inline void philox(uint2 seed, int64_t row, uint32_t group, uint32_t (&words)[4]) {
  uint32_t c0 = static_cast<uint32_t>(row), c1 = static_cast<uint32_t>(row >> 32), c2 = group, c3 = 0;
  uint32_t k0 = seed.x, k1 = seed.y;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Bit c is set if the element of column + c is kept; column and C are multiples of four.
template <int C>
__device__ inline uint32_t keep_bits(uint2 seed, int64_t row, int column, uint32_t threshold) {
  uint32_t bits = 0;
#pragma unroll
  for (int start = 0; start < C; start += 4) {
    uint32_t words[4];
    philox(seed, row, static_cast<uint32_t>(column + start) / 4, words);
#pragma unroll
    for (int c = 0; c < 4; ++c) bits |= static_cast<uint32_t>(words[c] >= threshold) << (start + c);
  }
  return bits;
}

}  // namespace fastgate::cuda
