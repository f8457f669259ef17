// linear on the CPU from a packed weight: x W^T + b, and the GELU of it. float32; bfloat16 where
// has_avx512_bf16(), by AMX where has_amx().
//
// The weight lies in panels of 32 of its rows, which are the result's columns. Element (column, k) of a panel
// is at k * 32 + column, in bfloat16 as in bf16_gemm.h, so a gemm reads a panel once and in order. With few
// rows, the time goes into reading the weight from memory and into the call itself: threads own panels, and
// nothing is looked up. Many rows are processed in blocks that stay in the second-level cache.
#include <algorithm>

#include "cpu/arena.h"
#include "cpu/gelu.h"
#include "cpu/gemm/amx_gemm.h"
#include "cpu/gemm/bf16_gemm.h"
#include "cpu/gemm/fp32_gemm.h"
#include "cpu/simd.h"
#include "ops.h"

namespace fastgate::cpu {
namespace {

constexpr int64_t kRows = 192, kDepth = 768;       // of a block of x: 576 KB
constexpr int64_t kFewRows = 64, kFewDepth = 384;  // 48 KB of a panel
constexpr int64_t kEpilogueRows = 64;   // whose sums stay in the first-level cache until the epilogue
constexpr int64_t kMinWeights = 32768;  // per thread at least: less is not worth waking one

struct OutputBlock {
  int64_t rows, columns, y_row;
  const float* bias;  // null: none
  bool gelu;
};

FASTGATE_WIDE_CLONES void fp32_epilogue(const OutputBlock& o, float* y) {
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

  // The epilogue of the gemm of `rows` rows from `row` on and panel t.
  Epilogue epilogue(const float* c, int64_t rows, int64_t row, int64_t t) const {
    const int64_t column = kPanelColumns * t, n = sizes.n;
    return {c, rows, std::min(kPanelColumns, n - column), bias + column, gelu, out + row * n + column, n};
  }
};

// Panels `begin` to `end` of the result's rows `from` to `to`.
void gemm_panels(const Bf16Linear& o, int64_t from, int64_t to, int64_t begin, int64_t end, float* c) {
  const int64_t k = o.sizes.k;
  for (int64_t t = begin; t < end; ++t) {
    const bf16* panel = o.w + t * k * kPanelColumns;
    const bf16* next = o.sizes.m <= kEpilogueRows && t + 1 < end ? panel + k * kPanelColumns : nullptr;
    for (int64_t row = from; row < to; row += kEpilogueRows) {
      const int64_t rows = std::min(kEpilogueRows, to - row);
      bf16_gemm(o.a + row * k, k, panel, c, rows, k, next);
      bf16_epilogue(o.epilogue(c, rows, row, t));
    }
  }
}

// The same by AMX. Each block of rows prefetches its share of the next panel, and computes the epilogue of
// the block before.
void amx_gemm_panels(
    const Bf16Linear& o, int64_t from, int64_t to, int64_t begin, int64_t end, float* c, float* other,
    AmxTiles& tiles) {
  const int64_t k = o.sizes.k, blocks = (to - from + kAmxRows - 1) / kAmxRows;
  const int64_t share = round_up(kPanelColumns * kPanelColumns / std::max<int64_t>(1, blocks), kPanelColumns);
  Epilogue before = {};
  for (int64_t t = begin; t < end; ++t) {
    const bf16* panel = o.w + t * k * kPanelColumns;
    PanelPrefetch prefetch = {panel + k * kPanelColumns, t + 1 < end ? share : 0};
    // Configuring the tile registers for fewer rows costs more than multiplying some rows again.
    const int64_t rows = std::min(kAmxRows, to - from);
    for (int64_t block = from; block < to;
         block += kAmxRows, prefetch.at += k / kPanelColumns * prefetch.step) {
      const int64_t row = std::min(block, to - rows);
      tiles.gemm(o.a + row * k, k, panel, c, kPanelColumns, rows, k, prefetch, &before);
      before = o.epilogue(c, rows, row, t);
      std::swap(c, other);
    }
  }
  bf16_epilogue(before);
}

void linear_bf16(const Bf16Linear& o) {
  static_assert(kAmxRows <= kEpilogueRows);
  constexpr int64_t kElements = 196608;  // of a block of x: 384 KB
  const int64_t m = o.sizes.m, k = o.sizes.k, count = (o.sizes.n + kPanelColumns - 1) / kPanelColumns;
  const bool by_amx = k % kPanelColumns == 0 && has_amx();
  const int64_t most = std::max<int64_t>(48, kElements / std::max<int64_t>(1, k)),
                row_blocks = (m + most - 1) / most;
  const int64_t grain = std::max<int64_t>(1, kMinWeights / std::max<int64_t>(1, k * kPanelColumns));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    Arena arena(2 * kEpilogueRows * kPanelColumns);
    float *c = arena.take(kEpilogueRows * kPanelColumns), *other = arena.take(kEpilogueRows * kPanelColumns);
    AmxTiles tiles;
    for (int64_t r = 0; r < row_blocks; ++r) {
      const int64_t from = r * m / row_blocks, to = (r + 1) * m / row_blocks;
      if (by_amx)
        amx_gemm_panels(o, from, to, begin, end, c, other, tiles);
      else
        gemm_panels(o, from, to, begin, end, c);
    }
  });
}

struct Fp32Linear {
  GemmSizes sizes;
  const float *a, *w, *bias;  // bias: null: none
  bool gelu;
  float* out;
};

// Panels `begin` to `end` of the result's rows `first` to `first + rows`. last_panel: room for these rows of
// a panel that is wider than what is left of the result.
void gemm_panels(
    const Fp32Linear& o, int64_t first, int64_t rows, int64_t begin, int64_t end, float* last_panel) {
  const int64_t n = o.sizes.n, k = o.sizes.k;
  // Few rows: a panel is read from its beginning to its end, and what follows is prefetched.
  const bool few = o.sizes.m <= kFewRows;
  const int64_t depth = few ? kFewDepth : kDepth, slices = std::max<int64_t>(1, (k + depth - 1) / depth);
  const int64_t panels = end - begin;
  for (int64_t s = 0; s < slices * panels; ++s) {
    const int64_t t = begin + (few ? s / slices : s % panels), p = (few ? s % slices : s / panels) * depth;
    const int64_t deep = std::min(depth, k - p), width = std::min(kPanelColumns, n - kPanelColumns * t);
    float* to = o.out + first * n + kPanelColumns * t;
    float* c = width < kPanelColumns ? last_panel : to;
    const int64_t c_row = width < kPanelColumns ? kPanelColumns : n;
    const float* slice = o.w + (t * k + p) * kPanelColumns;
    const float* next = few && s + 1 < slices * panels ? slice + deep * kPanelColumns : nullptr;
    gemm(p > 0, {o.a + first * k + p, k, 1}, slice, kPanelColumns, c, c_row, rows, kPanelColumns, deep, next);
    if (p + deep < k) continue;
    const float* bias = o.bias ? o.bias + kPanelColumns * t : nullptr;
    if (bias || o.gelu) fp32_epilogue({rows, width, c_row, bias, o.gelu}, c);
    if (width < kPanelColumns)
      for (int64_t i = 0; i < rows; ++i) std::copy_n(c + i * kPanelColumns, width, to + i * n);
  }
}

void linear_fp32(const Fp32Linear& o) {
  const int64_t m = o.sizes.m, n = o.sizes.n, k = o.sizes.k, count = (n + kPanelColumns - 1) / kPanelColumns;
  const int64_t row_blocks = (m + kRows - 1) / kRows;
  const int64_t grain = std::max<int64_t>(1, kMinWeights / std::max<int64_t>(1, k * kPanelColumns));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> last_panel(end * kPanelColumns > n ? std::min(m, kRows) * kPanelColumns : 0);
    for (int64_t r = 0; r < row_blocks; ++r) {
      const int64_t first = r * m / row_blocks, rows = (r + 1) * m / row_blocks - first;
      gemm_panels(o, first, rows, begin, end, last_panel.data());
    }
  });
}

// The rows of x (..., K), also where K is 0.
int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

// x's shape with `columns` in the last place, uninitialised.
Tensor empty_result(const Tensor& x, int64_t columns, ScalarType dtype) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = columns;
  return empty(shape.data(), x.dim(), dtype, x);
}

Tensor packed_linear_fp32(
    const Tensor& x, const Tensor& panels, const OptionalTensor& bias, int64_t columns, bool gelu) {
  const Tensor from = dense(x), added = bias ? dense(*bias) : x;
  Tensor y = empty_result(x, columns, ScalarType::Float);
  Fp32Linear o = {};
  o.sizes = {rows_of(x), columns, panels.size(1)};
  o.a = static_cast<const float*>(from.data_ptr());
  o.w = static_cast<const float*>(panels.data_ptr());
  o.bias = bias ? static_cast<const float*>(added.data_ptr()) : nullptr;
  o.gelu = gelu;
  o.out = static_cast<float*>(y.data_ptr());
  linear_fp32(o);
  return y;
}

Tensor packed_linear_bf16(
    const Tensor& x, const Tensor& panels, const OptionalTensor& bias, int64_t columns, bool gelu) {
  const Tensor from = dense(x), added = bias ? as_float(*bias) : x;
  Tensor y = empty_result(x, columns, ScalarType::BFloat16);
  std::vector<float> padded(panels.size(0) * kPanelColumns);
  if (bias) std::copy_n(static_cast<const float*>(added.data_ptr()), columns, padded.begin());
  Bf16Linear o = {};
  o.sizes = {rows_of(x), columns, 2 * panels.size(1)};
  o.a = static_cast<const bf16*>(from.data_ptr());
  o.w = static_cast<const bf16*>(panels.data_ptr());
  o.bias = padded.data();
  o.gelu = gelu;
  o.out = static_cast<bf16*>(y.data_ptr());
  linear_bf16(o);
  return y;
}

}  // namespace

bool packs_bfloat16() { return has_avx512_bf16(); }

Tensor packed_linear(Tensor x, Tensor panels, OptionalTensor bias, int64_t columns, bool gelu) {
  const ScalarType dtype = panels.scalar_type();
  const bool is_bf16 = dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(
      (dtype == ScalarType::Float || (is_bf16 && has_avx512_bf16())) && x.scalar_type() == dtype &&
          (!bias || bias->scalar_type() == ScalarType::Float || (is_bf16 && bias->scalar_type() == dtype)),
      "packed_linear: x, panels, bias: got another dtype, wanted float32, or bfloat16 on a processor with "
      "AVX512-BF16; convert them first");
  STD_TORCH_CHECK(
      x.dim() > 0 && panels.dim() == 3 && panels.size(2) == (is_bf16 ? 2 : 1) * kPanelColumns &&
          x.size(x.dim() - 1) == (is_bf16 ? 2 : 1) * panels.size(1) && columns >= 0 &&
          panels.size(0) == columns / kPanelColumns + (columns % kPanelColumns > 0) &&
          (!bias || bias->numel() == columns),
      "packed_linear: x, panels, bias: got shapes that do not fit, wanted (..., K), (columns / 32 rounded "
      "up, K, 32), bfloat16 (columns / 32 rounded up, K / 2, 64), (columns,); reshape them");
  STD_TORCH_CHECK(
      panels.is_contiguous(),
      "packed_linear: panels: got a view that is not contiguous, wanted panels one after another; "
      "call contiguous() once");
  return (is_bf16 ? packed_linear_bf16 : packed_linear_fp32)(x, panels, bias, columns, gelu);
}

}  // namespace fastgate::cpu
