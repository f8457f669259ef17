// A head's keys are the columns of one gemm's right operand, its values the rows of another's. Panels of
// both, in the layout of bf16_gemm.h, are made once a task. Scores and sums are float32; probabilities are
// rounded, as torch's own are.
#include "cpu/amx_attention.h"

#include <algorithm>

#include "cpu/gemm/amx_gemm.h"

namespace fastgate::cpu {
namespace {

constexpr int64_t kQueriesAtOnce = kAmxRows;

// A head's slice of `rows` rows, its bias added, and zeros up to `padded` rows.
FASTGATE_INLINE void gather_bf16(
    const AttentionProblem& o, const HeadTask& t, const StridedRows& from, const float* bias, int64_t row,
    int64_t rows, int64_t padded, bf16* out) {
  for (int64_t i = 0; i < rows; ++i, out += o.width) {
    const bf16* source = static_cast<const bf16*>(from.at) + (row + i) * from.step + t.head * o.width;
    if (bias) {
      const float* added = bias + t.head * o.width;
      for_each(o.width, [&](int64_t j) __attribute__((always_inline)) {
        store(out, j, load(source, j) + added[j]);
      });
    } else {
      std::copy_n(source, o.width, out);
    }
  }
  std::fill(out, out + (padded - rows) * o.width, bf16{0});
}

// 32 keys (32, width) -> a panel (width / 2, 64): a pair of a key's numbers moves as though it were a float.
FASTGATE_INLINE void panel_of_keys(int64_t width, const bf16* keys, bf16* panel) {
  const auto* from = reinterpret_cast<const float*>(keys);
  for (int64_t key = 0; key < kPanelColumns; key += 16)
    transpose(
        from + key * width / 2, width / 2, width / 2, reinterpret_cast<float*>(panel) + key, kPanelColumns);
}

// Values (keys, width) -> panels (width / 32, keys / 2, 64): two rows side by side, the even one in the low
// halves.
FASTGATE_INLINE void panels_of_values(int64_t width, int64_t keys, const bf16* values, bf16* panels) {
  for (int64_t column = 0; column < width; column += kPanelColumns)
    for (int64_t key = 0; key < keys; key += 2, panels += 2 * kPanelColumns) {
      const bf16 *even = values + key * width + column, *odd = even + width;
      for_each(kPanelColumns, [&](int64_t j) __attribute__((always_inline)) {
        const uint32_t both = static_cast<uint32_t>(even[j]) | static_cast<uint32_t>(odd[j]) << 16;
        std::memcpy(panels + 2 * j, &both, sizeof both);
      });
    }
}

FASTGATE_WIDE_CLONES void prepare_head(
    const AttentionProblem& o, const HeadTask& t, int64_t keys, bf16* q, bf16* k, bf16* v,
    bf16* rows_before_packing) {
  gather_bf16(o, t, o.q, o.q_bias, t.q_row, t.queries, t.queries, q);
  for (int64_t key = 0; key < keys; key += kPanelColumns) {
    gather_bf16(
        o, t, o.k, nullptr, t.k_row + key, std::min(kPanelColumns, t.keys - key), kPanelColumns,
        rows_before_packing);
    panel_of_keys(o.width, rows_before_packing, k + key * o.width);
  }
  gather_bf16(o, t, o.v, o.v_bias, t.k_row, t.keys, keys, rows_before_packing);
  panels_of_values(o.width, keys, rows_before_packing, v);
}

// Dropout factors of one query's row.
FASTGATE_CLONES void draw_row(const AttentionProblem& o, const HeadTask& t, int64_t query, float* factors) {
  draw_factors(o, t, query, factors);
}

}  // namespace

bool amx_attention_fits(const AttentionProblem& o) {
  return o.width % kPanelColumns == 0 && has_avx512_bf16() && has_amx();
}

int64_t amx_arena_size(int64_t longest_q, int64_t longest_k, int64_t width) {
  const int64_t keys = round_up(longest_k, kPanelColumns);
  return (longest_q + 3 * keys) * width / 2 + kQueriesAtOnce * (keys + keys / 2 + kPanelColumns) + keys +
         7 * 16;
}

void amx_forward_tasks(const AttentionProblem& o, void* out, Arena& arena, int64_t begin, int64_t end) {
  constexpr float kNoBias[kPanelColumns] = {};
  const Arena::Mark mark = arena.mark();
  const auto take_bf16 = [&](int64_t count) { return reinterpret_cast<bf16*>(arena.take(count / 2)); };
  AmxTiles tiles;
  for (int64_t index = begin; index < end; ++index) {
    const HeadTask t = head_task(o, index);
    if (t.queries == 0) continue;
    arena.release(mark);
    const int64_t keys = round_up(t.keys, kPanelColumns);
    bf16 *q = take_bf16(t.queries * o.width), *k = take_bf16(keys * o.width), *v = take_bf16(keys * o.width);
    bf16 *rows_before_packing = take_bf16(keys * o.width), *p = take_bf16(kQueriesAtOnce * keys);
    float *scores = arena.take(kQueriesAtOnce * keys), *mixed = arena.take(kQueriesAtOnce * kPanelColumns),
          *factors = arena.take(keys);
    prepare_head(o, t, keys, q, k, v, rows_before_packing);
    for (int64_t first = 0; first < t.queries; first += kQueriesAtOnce) {
      const int64_t rows = std::min(kQueriesAtOnce, t.queries - first);
      for (int64_t key = 0; key < keys; key += kPanelColumns)
        tiles.gemm(q + first * o.width, o.width, k + key * o.width, scores + key, keys, rows, o.width);
      for (int64_t i = 0; i < rows; ++i) {
        if (o.dropout.on) draw_row(o, t, first + i, factors);
        bf16_softmax(
            scores + i * keys, t.keys, keys, o.scale, o.dropout.on ? factors : nullptr, p + i * keys);
      }
      bf16* to = static_cast<bf16*>(out) + (t.q_row + first) * o.hidden + t.head * o.width;
      for (int64_t column = 0; column < o.width; column += kPanelColumns) {
        tiles.gemm(p, keys, v + column * keys, mixed, kPanelColumns, rows, keys);
        bf16_epilogue({mixed, rows, kPanelColumns, kNoBias, false, to + column, o.hidden});
      }
    }
  }
}

}  // namespace fastgate::cpu
