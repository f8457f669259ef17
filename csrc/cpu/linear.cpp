// linear on the CPU from a packed weight: x W^T + b, and the GELU of it, float32, or bfloat16 where has_avx512_bf16(), by tiles
// where has_amx().
//
// The weight lies in panels of 32 of its rows, the result's columns: element (column, k) of a panel at k * 32 + column,
// bfloat16 as pairs.h has it, so a tile of the result reads it once and in order. A few rows wait for the weight to come
// from memory, and feel what a call costs: threads own panels, and nothing is looked up. Many rows pass in blocks that
// stay in the second-level cache.
#include <algorithm>

#include "cpu/gemm/amx_gemm.h"
#include "cpu/gelu.h"
#include "ops.h"
#include "cpu/gemm/bf16_gemm.h"
#include "cpu/simd.h"
#include "cpu/arena.h"
#include "cpu/gemm/fp32_gemm.h"

namespace fastgate::cpu {
namespace {

constexpr int64_t kPanel = 32;
constexpr int64_t kRows = 192, kDepth = 768;  // of a block of x: 576 KB
constexpr int64_t kFew = 64, kFewDepth = 384;  // 48 KB of a panel
constexpr int64_t kAtOnce = 64;                // rows of pairs that are finished while they are in the first-level cache
constexpr int64_t kWeights = 32768;           // per thread at least: less is not worth waking one

struct OutputBlock {
  int64_t rows, columns, y_row;
  const float* bias;  // null: none
  bool gelu;
};

FASTGATE_WIDE_CLONES void finish(const OutputBlock& o, float* y) {
  for (int64_t i = 0; i < o.rows; ++i) {
    float* row = y + i * o.y_row;
    if (o.bias) for_each(o.columns, [&](int64_t j) { row[j] += o.bias[j]; });
    if (o.gelu) for_each(o.columns, [&](int64_t j) { row[j] = gelu(row[j]); });
  }
}

struct GemmSizes {
  int64_t m, n, k;
};

struct Bf16Linear {
  GemmSizes sizes;
  const bf16 *a, *w;
  const float* bias;  // of whole panels
  bool gelu;
  bf16* out;

  // What becomes of sums of rows from `row` on and panel t.
  Epilogue epilogue(const float* c, int64_t rows, int64_t row, int64_t t) const {
    const int64_t column = kPanel * t, n = sizes.n;
    return {c, rows, std::min(kPanel, n - column), bias + column, gelu, out + row * n + column, n};
  }
};

// Panels `begin` to `end` of the result's rows `from` to `to`.
void gemm_panels(const Bf16Linear& o, int64_t from, int64_t to, int64_t begin, int64_t end, float* c) {
  const int64_t k = o.sizes.k;
  for (int64_t t = begin; t < end; ++t) {
    const bf16* panel = o.w + t * k * kPanel;
    const bf16* next = o.sizes.m <= kAtOnce && t + 1 < end ? panel + k * kPanel : nullptr;
    for (int64_t row = from; row < to; row += kAtOnce) {
      const int64_t rows = std::min(kAtOnce, to - row);
      bf16_gemm(o.a + row * k, k, panel, c, rows, k, next);
      bf16_epilogue(o.epilogue(c, rows, row, t));
    }
  }
}

// The same by tiles. Each block of rows brings its share of the next panel nearer, and finishes the block before.
void gemm_panels(
    const Bf16Linear& o, int64_t from, int64_t to, int64_t begin, int64_t end, float* c, float* other, AmxTiles& tiles) {
  const int64_t k = o.sizes.k, blocks = (to - from + kAmxRows - 1) / kAmxRows;
  const int64_t share = round_up(kPanel * kPanel / std::max<int64_t>(1, blocks), kPanel);
  Epilogue before = {};
  for (int64_t t = begin; t < end; ++t) {
    const bf16* panel = o.w + t * k * kPanel;
    PanelPrefetch prefetch = {panel + k * kPanel, t + 1 < end ? share : 0};
    // Tiles of another shape cost more than rows multiplied again.
    const int64_t rows = std::min(kAmxRows, to - from);
    for (int64_t block = from; block < to; block += kAmxRows, prefetch.at += k / kPanel * prefetch.step) {
      const int64_t row = std::min(block, to - rows);
      tiles.gemm(o.a + row * k, k, panel, c, kPanel, rows, k, prefetch, &before);
      before = o.epilogue(c, rows, row, t);
      std::swap(c, other);
    }
  }
  bf16_epilogue(before);
}

void linear_bf16(const Bf16Linear& o) {
  static_assert(kPanel == kPanelColumns && kAmxRows <= kAtOnce);
  constexpr int64_t kElements = 196608;  // of a block of x: 384 KB
  const int64_t m = o.sizes.m, k = o.sizes.k, count = (o.sizes.n + kPanel - 1) / kPanel;
  const bool by_tiles = k % kPanel == 0 && has_amx();
  const int64_t most = std::max<int64_t>(48, kElements / std::max<int64_t>(1, k)), row_blocks = (m + most - 1) / most;
  const int64_t grain = std::max<int64_t>(1, kWeights / std::max<int64_t>(1, k * kPanel));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    Arena arena(2 * kAtOnce * kPanel);
    float *c = arena.take(kAtOnce * kPanel), *other = arena.take(kAtOnce * kPanel);
    AmxTiles tiles;
    for (int64_t r = 0; r < row_blocks; ++r) {
      const int64_t from = r * m / row_blocks, to = (r + 1) * m / row_blocks;
      if (by_tiles)
        gemm_panels(o, from, to, begin, end, c, other, tiles);
      else
        gemm_panels(o, from, to, begin, end, c);
    }
  });
}

// Of x (..., K), also where K is 0.
int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

Tensor packed_linear_bf16(const Tensor& x, const Tensor& panels, const OptionalTensor& bias, int64_t columns, bool gelu) {
  const int64_t k = 2 * panels.size(1), m = rows_of(x);
  const Tensor from = dense(x), added = bias ? as_float(*bias) : x;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = columns;
  Tensor y = empty(shape.data(), x.dim(), ScalarType::BFloat16, x);
  std::vector<float> padded(panels.size(0) * kPanel);
  if (bias) std::copy_n(static_cast<const float*>(added.data_ptr()), columns, padded.begin());
  linear_bf16(
      {{m, columns, k}, static_cast<const bf16*>(from.data_ptr()), static_cast<const bf16*>(panels.data_ptr()), padded.data(),
       gelu, static_cast<bf16*>(y.data_ptr())});
  return y;
}

}  // namespace

bool packs_bfloat16() { return has_avx512_bf16(); }

Tensor packed_linear(Tensor x, Tensor panels, OptionalTensor bias, int64_t columns, bool gelu) {
  const ScalarType dtype = panels.scalar_type();
  const bool pairs = dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(
      (dtype == ScalarType::Float || (pairs && has_avx512_bf16())) && x.scalar_type() == dtype &&
          (!bias || bias->scalar_type() == ScalarType::Float || (pairs && bias->scalar_type() == dtype)),
      "packed_linear: x, panels, bias: got another dtype, wanted float32, or bfloat16 on a processor with AVX512-BF16; "
      "convert them first");
  STD_TORCH_CHECK(
      x.dim() > 0 && panels.dim() == 3 && panels.size(2) == (pairs ? 2 : 1) * kPanel &&
          x.size(x.dim() - 1) == (pairs ? 2 : 1) * panels.size(1) && columns >= 0 &&
          panels.size(0) == columns / kPanel + (columns % kPanel > 0) && (!bias || bias->numel() == columns),
      "packed_linear: x, panels, bias: got shapes that do not fit, wanted (..., K), (columns / 32 rounded up, K, 32), "
      "bfloat16 (columns / 32 rounded up, K / 2, 64), (columns,); reshape them");
  STD_TORCH_CHECK(
      panels.is_contiguous(), "packed_linear: panels: got a view that is not contiguous, wanted panels one after another; "
      "call contiguous() once");
  if (pairs) return packed_linear_bf16(x, panels, bias, columns, gelu);
  const int64_t count = panels.size(0), k = panels.size(1), n = columns, m = rows_of(x);
  const Tensor from = dense(x), added = bias ? dense(*bias) : x;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  Tensor y = empty(shape.data(), x.dim(), ScalarType::Float, x);
  const auto *a = static_cast<const float*>(from.data_ptr()), *w = static_cast<const float*>(panels.data_ptr());
  const float* b = bias ? static_cast<const float*>(added.data_ptr()) : nullptr;
  auto* out = static_cast<float*>(y.data_ptr());
  const int64_t row_blocks = (m + kRows - 1) / kRows;
  // Few rows: a panel is read from its beginning to its end, and what follows is brought nearer meanwhile.
  const bool few = m <= kFew;
  const int64_t depth = few ? kFewDepth : kDepth, slices = std::max<int64_t>(1, (k + depth - 1) / depth);
  const int64_t grain = std::max<int64_t>(1, kWeights / std::max<int64_t>(1, k * kPanel));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    // The last panel may be wider than what is left of a row.
    std::vector<float> aside(end * kPanel > n ? std::min(m, kRows) * kPanel : 0);
    for (int64_t r = 0; r < row_blocks; ++r) {
      const int64_t first = r * m / row_blocks, rows = (r + 1) * m / row_blocks - first;
      for (int64_t s = 0; s < slices * (end - begin); ++s) {
        const int64_t t = begin + (few ? s / slices : s % (end - begin)), p = (few ? s % slices : s / (end - begin)) * depth;
        const int64_t deep = std::min(depth, k - p), width = std::min(kPanel, n - kPanel * t);
        float* to = out + first * n + kPanel * t;
        float* c = width < kPanel ? aside.data() : to;
        const int64_t c_row = width < kPanel ? kPanel : n;
        const float* at = w + (t * k + p) * kPanel;
        const float* next = few && s + 1 < slices * (end - begin) ? at + deep * kPanel : nullptr;
        gemm(p > 0, {a + first * k + p, k, 1}, at, kPanel, c, c_row, rows, kPanel, deep, next);
        if (p + deep < k) continue;
        if (b || gelu) finish({rows, width, c_row, b ? b + kPanel * t : nullptr, gelu}, c);
        if (width < kPanel)
          for (int64_t i = 0; i < rows; ++i) std::copy_n(c + i * kPanel, width, to + i * n);
      }
    }
  });
  return y;
}

}  // namespace fastgate::cpu
