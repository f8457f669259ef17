// The two halves of an encoder layer from packed weights, float32, a call each: a small batch feels what calling the
// steps one by one costs.
#include <algorithm>
#include <cstring>

#include "ops.h"
#include "rows.h"
#include "tiles.h"

namespace fastgate::cpu {
namespace {

// LayerNorm(residual + x + bias), and a second LayerNorm given weight2.
Tensor add_norm(const Tensor& x, const Tensor& residual, const OptionalTensor& bias, FASTGATE_NORM_OPERANDS) {
  return gated_add_norm(
      x, residual, weight, norm_bias, eps, bias, std::nullopt, std::nullopt, std::nullopt, 0.0, std::nullopt, weight2,
      norm_bias2, eps2);
}

bool is_float(const Tensor& t) { return t.scalar_type() == ScalarType::Float; }
const float* floats(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }
float* floats(Tensor& t) { return static_cast<float*>(t.data_ptr()); }

Tensor empty_rows(int64_t rows, int64_t columns, const Tensor& like) {
  const int64_t sizes[] = {rows, columns};
  return empty(sizes, 2, ScalarType::Float, like);
}

// Rows `wanted` of h.
Tensor gather(const Tensor& h, const Tensor& wanted) {
  const int64_t hidden = h.size(1), rows = wanted.size(0);
  Tensor found = empty_rows(rows, hidden, h);
  const auto* places = static_cast<const int64_t*>(wanted.data_ptr());
  for (int64_t i = 0; i < rows; ++i) {
    STD_TORCH_CHECK(
        places[i] >= 0 && places[i] < h.size(0), "packed_absorbed_attention: wanted: got row ", places[i],
        ", wanted one of ", h.size(0), "; pass rows of h");
    std::memcpy(floats(found) + i * hidden, floats(h) + places[i] * hidden, hidden * sizeof(float));
  }
  return found;
}

// each(head) for every head, on threads that get `work` multiply-adds at least.
template <class F>
void for_heads(int64_t heads, int64_t work, const F& each) {
  constexpr int64_t kWork = 65536;
  torch::stable::parallel_for(0, heads, std::max<int64_t>(1, kWork / std::max<int64_t>(1, work)), [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) each(head);
  });
}

}  // namespace

Tensor packed_attention(
    Tensor h, Tensor qkv, OptionalTensor q_bias, OptionalTensor k_bias, OptionalTensor v_bias, Tensor cu_seqlens,
    int64_t heads, double scale, Tensor output, OptionalTensor output_bias, Tensor weight, Tensor norm_bias, double eps) {
  STD_TORCH_CHECK(
      h.dim() == 2, "packed_attention: h: got ", h.dim(), " dimensions, wanted (rows, H); reshape it");
  const int64_t hidden = h.size(1);
  const Tensor rows = packed_linear(h, qkv, std::nullopt, 3 * hidden, false);
  const auto third = [&](int64_t place) {
    Tensor part = rows;
    return torch::stable::narrow(part, 1, place * hidden, hidden);
  };
  const Tensor mixed = attention(
      third(0), third(1), third(2), q_bias, k_bias, v_bias, cu_seqlens, cu_seqlens, heads, scale, 0.0, std::nullopt);
  const Tensor x = packed_linear(mixed, output, std::nullopt, hidden, false);
  return add_norm(x, h, output_bias, weight, norm_bias, eps, std::nullopt, std::nullopt, 0.0);
}

Tensor packed_absorbed_attention(
    Tensor h, Tensor wanted, Tensor query, OptionalTensor q_bias, Tensor key, Tensor value, OptionalTensor v_bias,
    Tensor cu_seqlens, int64_t heads, double scale, Tensor output, OptionalTensor output_bias, Tensor weight,
    Tensor norm_bias, double eps) {
  const int64_t hidden = h.size(h.dim() - 1);
  const auto square = [&](const Tensor& t) { return is_float(t) && t.numel() == hidden * hidden; };
  STD_TORCH_CHECK(
      h.dim() == 2 && is_float(h) && hidden % 16 == 0 && heads > 0 && hidden % heads == 0 && square(key) &&
          square(value) && (!v_bias || (is_float(*v_bias) && v_bias->numel() == hidden)) && wanted.dim() == 1 &&
          wanted.scalar_type() == ScalarType::Long,
      "packed_absorbed_attention: h, wanted, key, value, v_bias: got shapes or dtypes that do not fit, wanted (rows, H), "
      "(sequences,) int64, (H, H), (H, H), (H,), H a multiple of 16 and of heads, float32; call absorbed_attention");
  const Tensor from = dense(h), keys = dense(key), values = dense(value);
  const int64_t rows = wanted.size(0), width = hidden / heads;
  const Tensor residual = gather(from, dense(wanted));
  const Tensor q = packed_linear(residual, query, q_bias, hidden, false);
  const int64_t sizes[] = {rows, heads, hidden};
  Tensor probe = empty(sizes, 3, ScalarType::Float, from);
  for_heads(heads, rows * width * hidden, [&](int64_t head) {
    multiply(
        false, {floats(q) + head * width, hidden, 1}, floats(keys) + head * width * hidden, hidden,
        floats(probe) + head * hidden, heads * hidden, rows, hidden, width);
  });
  const auto [mixed, total] = absorbed_attention(probe, from, cu_seqlens, scale, 0.0, std::nullopt);
  Tensor out = empty_rows(rows, hidden, from);
  const Tensor added = v_bias ? dense(*v_bias) : out;
  for_heads(heads, rows * width * hidden, [&](int64_t head) {
    multiply_rows(
        floats(mixed) + head * hidden, heads * hidden, floats(values) + head * width * hidden, hidden,
        floats(out) + head * width, hidden, rows, width, hidden);
    if (!v_bias) return;
    for (int64_t i = 0; i < rows; ++i) {
      float* to = floats(out) + i * hidden + head * width;
      const float share = floats(total)[i * heads + head];
      each(width, [&](int64_t j) { to[j] += share * floats(added)[head * width + j]; });
    }
  });
  const Tensor x = packed_linear(out, output, std::nullopt, hidden, false);
  return add_norm(x, residual, output_bias, weight, norm_bias, eps, std::nullopt, std::nullopt, 0.0);
}

Tensor packed_feed_forward(
    Tensor h, Tensor up, OptionalTensor up_bias, int64_t inner, Tensor down, OptionalTensor down_bias,
    FASTGATE_NORM_OPERANDS) {
  const Tensor between = packed_linear(h, up, up_bias, inner, true);
  const Tensor x = packed_linear(between, down, std::nullopt, h.size(1), false);
  return add_norm(x, h, down_bias, weight, norm_bias, eps, weight2, norm_bias2, eps2);
}

}  // namespace fastgate::cpu
