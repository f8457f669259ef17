// The keys of a head are the columns of one product, its values the rows of another: panels of both are made once a task,
// of pairs as pairs.h has them. Scores and sums are float32; probabilities are rounded, as torch's own are.
#include "amx_attention.h"

#include <algorithm>

#include "amx.h"

namespace fastgate::cpu {
namespace {

constexpr int64_t kAtOnce = kTileRows;  // queries
constexpr int64_t kPanel = kPairPanel;

// A head's slice of `rows` rows, its bias added, and zeros up to `padded` rows.
FASTGATE_INLINE void gather_half(
    const Problem& o, const Task& t, const Operand& from, const float* bias, int64_t row, int64_t rows, int64_t padded,
    bf16* out) {
  for (int64_t i = 0; i < rows; ++i, out += o.width) {
    const bf16* source = static_cast<const bf16*>(from.at) + (row + i) * from.step + t.head * o.width;
    if (bias) {
      const float* added = bias + t.head * o.width;
      each(o.width, [&](int64_t j) __attribute__((always_inline)) { store(out, j, load(source, j) + added[j]); });
    } else {
      std::copy_n(source, o.width, out);
    }
  }
  std::fill(out, out + (padded - rows) * o.width, bf16{0});
}

// 32 keys (32, width) -> a panel (width / 2, 64): a pair of a key's numbers moves as though it were a float.
FASTGATE_INLINE void panel_of_keys(int64_t width, const bf16* keys, bf16* panel) {
  const auto* from = reinterpret_cast<const float*>(keys);
  for (int64_t key = 0; key < kPanel; key += 16)
    transpose(from + key * width / 2, width / 2, width / 2, reinterpret_cast<float*>(panel) + key, kPanel);
}

// Values (keys, width) -> panels (width / 32, keys / 2, 64): two rows side by side, the even one in the low halves.
FASTGATE_INLINE void panels_of_values(int64_t width, int64_t keys, const bf16* values, bf16* panels) {
  for (int64_t column = 0; column < width; column += kPanel)
    for (int64_t key = 0; key < keys; key += 2, panels += 2 * kPanel) {
      const bf16 *even = values + key * width + column, *odd = even + width;
      each(kPanel, [&](int64_t j) __attribute__((always_inline)) {
        const uint32_t both = static_cast<uint32_t>(even[j]) | static_cast<uint32_t>(odd[j]) << 16;
        std::memcpy(panels + 2 * j, &both, sizeof both);
      });
    }
}

FASTGATE_WIDE_CLONES void prepare_head(const Problem& o, const Task& t, int64_t keys, bf16* q, bf16* k, bf16* v, bf16* few) {
  gather_half(o, t, o.q, o.q_bias, t.q_row, t.queries, t.queries, q);
  for (int64_t key = 0; key < keys; key += kPanel) {
    gather_half(o, t, o.k, nullptr, t.k_row + key, std::min(kPanel, t.keys - key), kPanel, few);
    panel_of_keys(o.width, few, k + key * o.width);
  }
  gather_half(o, t, o.v, o.v_bias, t.k_row, t.keys, keys, few);
  panels_of_values(o.width, keys, few, v);
}

// Dropout factors of one query's row.
FASTGATE_CLONES void draw_row(const Problem& o, const Task& t, int64_t query, float* factors) { draw(o, t, query, factors); }

}  // namespace

bool takes_tiles(const Problem& o) { return o.width % kPanel == 0 && has_pairs() && has_amx(); }

int64_t tiles_scratch(int64_t longest_q, int64_t longest_k, int64_t width) {
  const int64_t keys = up(longest_k, kPanel);
  return (longest_q + 3 * keys) * width / 2 + kAtOnce * (keys + keys / 2 + kPanel) + keys + 7 * 16;
}

void forward_tiles(const Problem& o, void* out, Scratch& scratch, int64_t begin, int64_t end) {
  constexpr float kNoBias[kPanel] = {};
  const Scratch::Mark mark = scratch.mark();
  const auto halves = [&](int64_t count) { return reinterpret_cast<bf16*>(scratch.take(count / 2)); };
  Tiles tiles;
  for (int64_t index = begin; index < end; ++index) {
    const Task t = task_of(o, index);
    if (t.queries == 0) continue;
    scratch.release(mark);
    const int64_t keys = up(t.keys, kPanel);
    bf16 *q = halves(t.queries * o.width), *k = halves(keys * o.width), *v = halves(keys * o.width);
    bf16 *few = halves(keys * o.width), *p = halves(kAtOnce * keys);
    float *scores = scratch.take(kAtOnce * keys), *mixed = scratch.take(kAtOnce * kPanel), *factors = scratch.take(keys);
    prepare_head(o, t, keys, q, k, v, few);
    for (int64_t first = 0; first < t.queries; first += kAtOnce) {
      const int64_t rows = std::min(kAtOnce, t.queries - first);
      for (int64_t key = 0; key < keys; key += kPanel)
        tiles.multiply(q + first * o.width, o.width, k + key * o.width, scores + key, keys, rows, o.width);
      for (int64_t i = 0; i < rows; ++i) {
        if (o.dropout.on) draw_row(o, t, first + i, factors);
        softmax_pairs(scores + i * keys, t.keys, keys, o.scale, o.dropout.on ? factors : nullptr, p + i * keys);
      }
      bf16* to = static_cast<bf16*>(out) + (t.q_row + first) * o.hidden + t.head * o.width;
      for (int64_t column = 0; column < o.width; column += kPanel) {
        tiles.multiply(p, keys, v + column * keys, mixed, kPanel, rows, keys);
        finish_pairs({mixed, rows, kPanel, kNoBias, false, to + column, o.hidden});
      }
    }
  }
}

}  // namespace fastgate::cpu
