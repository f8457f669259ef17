// Attention's unit of work, one head of one sequence, and its copies between unpadded rows and buffers.
#pragma once

#include "cpu/arena.h"
#include "cpu/dropout.h"
#include "cpu/gemm/fp32_gemm.h"

namespace fastgate::cpu {

// (rows, hidden) with adjacent columns: the thirds of a fused QKV's rows need not be copied.
struct StridedRows {
  const void* at;
  int64_t step;  // from row to row
};

struct AttentionProblem {
  int64_t sequences, hidden, heads, width;  // width: of a head
  const int64_t *cu_q, *cu_k;
  StridedRows q, k, v;
  const float *q_bias, *v_bias;  // null: none. A bias of the keys cancels in the softmax.
  float scale;
  Dropout dropout;
};

// One head of one sequence: where its rows begin, how many there are, and the sizes of its buffers.
struct HeadTask {
  int64_t head, q_row, queries, k_row, keys;
  int64_t blocks, width16;      // 16 keys a block; a head's width in whole vectors
  int64_t width_row, keys_row;  // distances between rows of the buffers
};

inline HeadTask head_task(const AttentionProblem& o, int64_t index) {
  const int64_t sequence = index / o.heads, head = index % o.heads;
  const int64_t q_row = o.cu_q[sequence], k_row = o.cu_k[sequence];
  const int64_t queries = o.cu_q[sequence + 1] - q_row, keys = o.cu_k[sequence + 1] - k_row;
  const int64_t blocks = (keys + 15) / 16, width16 = round_up(o.width, 16);
  return {head, q_row, queries, k_row, keys, blocks, width16, row_stride(o.width), row_stride(keys)};
}

FASTGATE_INLINE float rounded_to(const float*, float value) { return value; }

FASTGATE_INLINE float rounded_to(const bf16*, float value) {
  bf16 stored;
  store(&stored, 0, value);
  return load(&stored, 0);
}

// A head's slice of `rows` rows, its bias added, into `out` (`padded` rows of width16), times `factor`; the
// padding is zero. The sum with a bias is rounded to T, as a Linear's output would be.
template <class T>
FASTGATE_INLINE void gather_head(
    const AttentionProblem& o, const HeadTask& t, const StridedRows& from, const float* bias, int64_t row,
    int64_t rows, int64_t padded, float factor, float* out) {
  const float* head_bias = bias ? bias + t.head * o.width : nullptr;
  for (int64_t i = 0; i < padded; ++i) {
    float* to = out + i * t.width_row;
    const int64_t n = i < rows ? o.width : 0;
    const T* source = static_cast<const T*>(from.at) + (row + i) * from.step + t.head * o.width;
    if (bias)
      for_each(n, [&](int64_t j) { to[j] = factor * rounded_to(source, load(source, j) + head_bias[j]); });
    else
      for_each(n, [&](int64_t j) { to[j] = factor * load(source, j); });
    for (int64_t j = n; j < t.width16; ++j) to[j] = 0.0f;
  }
}

template <class T>
FASTGATE_INLINE void scatter_head(
    const AttentionProblem& o, const HeadTask& t, const float* from, int64_t row, int64_t rows, float factor,
    void* to) {
  for (int64_t i = 0; i < rows; ++i) {
    T* out = static_cast<T*>(to) + (row + i) * o.hidden + t.head * o.width;
    const float* source = from + i * t.width_row;
    for_each(o.width, [&](int64_t j) { store(out, j, factor * source[j]); });
  }
}

typedef float float4 __attribute__((vector_size(16)));

// Sixteen rows of `columns`, a multiple of 4 -> sixteen columns.
FASTGATE_INLINE void transpose(
    const float* from, int64_t from_row, int64_t columns, float* to, int64_t to_row) {
  for (int64_t i = 0; i < 16; i += 4)
    for (int64_t j = 0; j < columns; j += 4) {
      float4 a, b, c, d;
      std::memcpy(&a, from + i * from_row + j, sizeof a);
      std::memcpy(&b, from + (i + 1) * from_row + j, sizeof b);
      std::memcpy(&c, from + (i + 2) * from_row + j, sizeof c);
      std::memcpy(&d, from + (i + 3) * from_row + j, sizeof d);
      const float4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5),
                   AB = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const float4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5),
                   CD = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      const float4 rows[4] = {
          __builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
          __builtin_shufflevector(AB, CD, 0, 1, 4, 5), __builtin_shufflevector(AB, CD, 2, 3, 6, 7)};
      for (int64_t row = 0; row < 4; ++row) std::memcpy(to + (j + row) * to_row + i, &rows[row], sizeof a);
    }
}

// Dropout factors of one query's row, zeros up to whole blocks; its counter row is query * heads + head.
FASTGATE_INLINE void draw_factors(
    const AttentionProblem& o, const HeadTask& t, int64_t query, float* factors) {
  keep_factors(o.dropout, (t.q_row + query) * o.heads + t.head, t.keys, factors);
  for (int64_t j = t.keys; j < 16 * t.blocks; ++j) factors[j] = 0.0f;
}

}  // namespace fastgate::cpu
