// The softmax of rows of scores, vector after vector.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace fastgate::cpu {

// exp for x <= 0 to 2 units in the last place, and no less than exp(-80), which a share of leaves a normal
// number: 2^n times a polynomial of the remainder.
FASTGATE_INLINE float exponential(float x) {
  x = x < -80.0f ? -80.0f : x;
  const float magic = 12582912.0f, shifted = x * 1.44269504f + magic, n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;  // n stands in the low bits of `shifted`
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Scores of a block's rows become probabilities. A row is `blocks` of 16 long, and beyond the first n are
// numbers that nobody reads: scores low enough to add nothing, so that no loop has a tail.
FASTGATE_INLINE void softmax(float* scores, int64_t rows, int64_t row_step, int64_t n, int64_t blocks) {
  const int64_t width = 16 * blocks;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = n; j < width; ++j) scores[i * row_step + j] = -1e30f;
  for (int64_t i = 0; i < rows; ++i) {
    float *row = scores + i * row_step, top = -1e30f, total = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < width; ++j) top = row[j] > top ? row[j] : top;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < width; ++j) {
      const float part = exponential(row[j] - top);
      row[j] = part;
      total += part;
    }
    const float share =
        1.0f / total;  // rounds once more, where sixteen divisions take as long as the exponentials
    for_each(width, [&](int64_t j) { row[j] *= share; });
  }
}

}  // namespace fastgate::cpu
