// Dropout by itself, where no norm takes it in: y = kept or 0, times x. It is its own backward.
#include <algorithm>
#include <cmath>

#include "ops.h"
#include "rows.h"

namespace fastgate::cpu {
namespace {

constexpr int64_t kElements = 16384;  // per thread at least: less is not worth waking one

struct Mask {
  uint64_t seed;
  uint32_t threshold;
  float kept;
};

FASTGATE_CLONES void draw(const Mask& mask, int64_t row, int64_t n, float* keep) {
  keep_factors(mask.seed, row, n, mask.threshold, mask.kept, keep);
}

template <class T>
FASTGATE_INLINE void drop_row(int64_t n, const void* x, void* y, const float* keep) {
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(y);
  each(n, [&](int64_t j) { store(to, j, keep[j] * load(from, j)); });
}

FASTGATE_CLONES void drop_float(int64_t n, const void* x, void* y, const float* keep) { drop_row<float>(n, x, y, keep); }
FASTGATE_CLONES void drop_bf16(int64_t n, const void* x, void* y, const float* keep) { drop_row<bf16>(n, x, y, keep); }

}  // namespace

// x: (rows, hidden) float32 or bfloat16; the mask of keep_mask, fastgate/reference/dropout.py.
Tensor dropout(Tensor x, double dropout_p, Tensor seed) {
  const auto dtype = x.scalar_type();
  STD_TORCH_CHECK(
      x.dim() == 2 && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
      "dropout: x: got another shape or dtype, wanted (rows, hidden) of float32 or bfloat16; convert it");
  STD_TORCH_CHECK(
      seed.numel() == 1 && seed.scalar_type() == ScalarType::Long,
      "dropout: seed: got another tensor, wanted int64 of one element; pass a seed");
  const Mask mask{
      static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr())),
      static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 4294967296.0), 4294967295.0)),
      static_cast<float>(1.0 / (1.0 - dropout_p))};
  const Tensor from = dense(x);
  Tensor y = empty_like(from, dtype);
  const int64_t rows = x.size(0), hidden = x.size(1);
  if (rows == 0 || hidden == 0) return y;
  const auto drop_row = dtype == ScalarType::Float ? drop_float : drop_bf16;
  const int64_t row_bytes = hidden * (dtype == ScalarType::Float ? sizeof(float) : sizeof(bf16));
  const char* in = static_cast<const char*>(from.data_ptr());
  char* out = static_cast<char*>(y.data_ptr());
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kElements / hidden), [&](int64_t begin, int64_t end) {
    std::vector<float> keep((hidden + 3) / 4 * 4);
    for (int64_t row = begin; row < end; ++row) {
      draw(mask, row, hidden, keep.data());
      drop_row(hidden, in + row * row_bytes, out + row * row_bytes, keep.data());
    }
  });
  return y;
}

}  // namespace fastgate::cpu
