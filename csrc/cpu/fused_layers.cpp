// Half layers of encoders from packed weights, any number in one call. Calling the steps one by one takes
// time that a small batch notices, and more so because the weights displace the caller's data from the
// caches.
#include <algorithm>
#include <cstring>

#include "cpu/batch_partition.h"
#include "cpu/gemm/fp32_gemm.h"
#include "cpu/half_layers.h"
#include "cpu/simd.h"
#include "ops.h"

namespace fastgate::cpu {
namespace {

constexpr int64_t kWork = 65536;  // multiply-adds, or elements to convert, that are worth a thread

bool is_float(const Tensor& t) { return t.scalar_type() == ScalarType::Float; }
const float* floats(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }
float* floats(Tensor& t) { return static_cast<float*>(t.data_ptr()); }

Tensor empty_rows(int64_t rows, int64_t columns, ScalarType dtype, const Tensor& like) {
  const int64_t sizes[] = {rows, columns};
  return empty(sizes, 2, dtype, like);
}

FASTGATE_CLONES void to_float32(float* to, const bf16* from, int64_t n) {
  for_each(n, [&](int64_t i) { store(to, i, load(from, i)); });
}

FASTGATE_CLONES void to_bfloat16(bf16* to, const float* from, int64_t n) {
  for_each(n, [&](int64_t i) { store(to, i, load(from, i)); });
}

// t (rows, columns), contiguous, in float32 or bfloat16; t itself if it has that dtype.
Tensor cast(ScalarType dtype, const Tensor& t) {
  const Tensor from = dense(t);
  if (from.scalar_type() == dtype) return from;
  const int64_t columns = from.dim() > 1 ? from.size(1) : from.numel();
  Tensor to = empty_rows(from.numel() / std::max<int64_t>(1, columns), columns, dtype, from);
  torch::stable::parallel_for(0, from.numel(), kWork, [&](int64_t begin, int64_t end) {
    if (dtype == ScalarType::Float)
      to_float32(floats(to) + begin, static_cast<const bf16*>(from.data_ptr()) + begin, end - begin);
    else
      to_bfloat16(static_cast<bf16*>(to.data_ptr()) + begin, floats(from) + begin, end - begin);
  });
  return to;
}

// The rows of h that `indices` names, (n,) int64.
Tensor select_rows(const Tensor& h, const Tensor& indices) {
  const int64_t hidden = h.size(1), rows = indices.size(0), bytes = hidden * (is_float(h) ? 4 : 2);
  Tensor selected = empty_rows(rows, hidden, h.scalar_type(), h);
  const auto* places = static_cast<const int64_t*>(indices.data_ptr());
  for (int64_t i = 0; i < rows; ++i) {
    STD_TORCH_CHECK(
        places[i] >= 0 && places[i] < h.size(0), "fused_layers: output_rows: got row ", places[i],
        ", wanted one of ", h.size(0), "; pass rows of h");
    std::memcpy(
        static_cast<char*>(selected.data_ptr()) + i * bytes,
        static_cast<const char*>(h.data_ptr()) + places[i] * bytes, bytes);
  }
  return selected;
}

// work(head) for every head, each of `cost` multiply-adds, on threads that get at least kWork of them.
template <class F>
void for_heads(int64_t heads, int64_t cost, const F& work) {
  const int64_t grain = std::max<int64_t>(1, kWork / std::max<int64_t>(1, cost));
  torch::stable::parallel_for(0, heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) work(head);
  });
}

// The operands of one half layer, by their places (half_layers.h).
class HalfOperands {
 public:
  HalfOperands(const std::vector<OptionalTensor>& all, size_t begin) : all_(all), begin_(begin) {}
  const OptionalTensor& maybe(int64_t place) const {
    STD_TORCH_CHECK(
        begin_ + place < all_.size(), "fused_layers: operands: got ", all_.size(),
        ", wanted more; pass those of every half layer");
    return all_[begin_ + place];
  }
  const Tensor& at(int64_t place) const {
    const OptionalTensor& operand = maybe(place);
    STD_TORCH_CHECK(
        operand.has_value(), "fused_layers: operands: got none at place ", begin_ + place,
        ", wanted a tensor; pass it");
    return *operand;
  }

 private:
  const std::vector<OptionalTensor>& all_;
  const size_t begin_;
};

// LayerNorm(residual + x + bias), and a second LayerNorm given weight2.
Tensor add_norm(
    const Tensor& x, const Tensor& residual, const OptionalTensor& bias, const Tensor& weight,
    const Tensor& norm_bias, double eps, const OptionalTensor& weight2 = std::nullopt,
    const OptionalTensor& norm_bias2 = std::nullopt, double eps2 = 0.0) {
  return gated_add_norm(
      x, residual, weight, norm_bias, eps, bias, std::nullopt, std::nullopt, std::nullopt, 0.0, std::nullopt,
      weight2, norm_bias2, eps2);
}

// What ends both kinds of attention: the output's weight and bias, LayerNorm.
struct AttentionEnd {
  const Tensor& output;
  const OptionalTensor& bias;
  const Tensor &weight, &norm_bias;
};

Tensor attention_end(const Tensor& mixed, const Tensor& residual, const AttentionEnd& end, double eps) {
  const Tensor x = packed_linear(mixed, end.output, std::nullopt, residual.size(1), false);
  return add_norm(x, residual, end.bias, end.weight, end.norm_bias, eps);
}

Tensor attention_half(
    const Tensor& h, const HalfOperands& operands, const Tensor& cu_seqlens, int64_t heads, double scale,
    double eps) {
  namespace place = attention_operands;
  const int64_t hidden = h.size(1);
  const Tensor qkv = packed_linear(h, operands.at(place::kQkv), std::nullopt, 3 * hidden, false);
  const auto third = [&](int64_t index) {
    Tensor part = qkv;
    return torch::stable::narrow(part, 1, index * hidden, hidden);
  };
  const Tensor mixed = attention(
      third(0), third(1), third(2), operands.maybe(place::kQBias), operands.maybe(place::kKBias),
      operands.maybe(place::kVBias), cu_seqlens, cu_seqlens, heads, scale, 0.0, std::nullopt);
  const AttentionEnd end = {
      operands.at(place::kOutput), operands.maybe(place::kOutputBias), operands.at(place::kNormWeight),
      operands.at(place::kNormBias)};
  return attention_end(mixed, h, end, eps);
}

Tensor absorbed_half(
    const Tensor& h, const HalfOperands& operands, const Tensor& cu_seqlens,
    const OptionalTensor& output_rows, int64_t heads, double scale, double eps) {
  namespace place = absorbed_operands;
  const int64_t hidden = h.size(1);
  const Tensor &key = operands.at(place::kKey), &value = operands.at(place::kValue);
  const OptionalTensor& v_bias = operands.maybe(place::kVBias);
  const auto fits = [&](const Tensor& t, int64_t size) {
    return t.scalar_type() == h.scalar_type() && t.numel() == size;
  };
  STD_TORCH_CHECK(
      hidden % 16 == 0 && heads > 0 && hidden % heads == 0 && fits(key, hidden * hidden) &&
          fits(value, hidden * hidden) && (!v_bias || fits(*v_bias, hidden)) && output_rows &&
          output_rows->dim() == 1 && output_rows->scalar_type() == ScalarType::Long,
      "fused_layers: output_rows, key, value, v_bias: got shapes or dtypes that do not fit, wanted "
      "(sequences,) int64, "
      "(H, H), (H, H), (H,) of h's dtype, H a multiple of 16 and of heads; call absorbed_attention");
  const Tensor from = dense(h), residual = select_rows(from, dense(*output_rows));
  const Tensor source = cast(ScalarType::Float, from);
  const Tensor query =
      packed_linear(residual, operands.at(place::kQuery), operands.maybe(place::kQBias), hidden, false);
  const Tensor q = cast(ScalarType::Float, query);
  const Tensor keys = cast(ScalarType::Float, key), values = cast(ScalarType::Float, value);
  const int64_t rows = residual.size(0), width = hidden / heads;
  const int64_t sizes[] = {rows, heads, hidden};
  Tensor probe = empty(sizes, 3, ScalarType::Float, h);
  for_heads(heads, rows * width * hidden, [&](int64_t head) {
    gemm(
        false, {floats(q) + head * width, hidden, 1}, floats(keys) + head * width * hidden, hidden,
        floats(probe) + head * hidden, heads * hidden, rows, hidden, width);
  });
  const auto [mixed, total] = absorbed_attention(probe, source, cu_seqlens, scale, 0.0, std::nullopt);
  Tensor out = empty_rows(rows, hidden, ScalarType::Float, h);
  const Tensor added = v_bias ? cast(ScalarType::Float, *v_bias) : out;
  const float *mixed_rows = floats(mixed), *shares = floats(total);
  for_heads(heads, rows * width * hidden, [&](int64_t head) {
    gemm_nt(
        mixed_rows + head * hidden, heads * hidden, floats(values) + head * width * hidden, hidden,
        floats(out) + head * width, hidden, rows, width, hidden);
    if (!v_bias) return;
    for (int64_t i = 0; i < rows; ++i) {
      float* to = floats(out) + i * hidden + head * width;
      const float share = shares[i * heads + head];
      for_each(width, [&](int64_t j) { to[j] += share * floats(added)[head * width + j]; });
    }
  });
  const AttentionEnd end = {
      operands.at(place::kOutput), operands.maybe(place::kOutputBias), operands.at(place::kNormWeight),
      operands.at(place::kNormBias)};
  return attention_end(cast(h.scalar_type(), out), residual, end, eps);
}

Tensor feed_forward_half(
    const Tensor& h, const HalfOperands& operands, int64_t inner, double eps, double eps2) {
  namespace place = feed_forward_operands;
  const Tensor between =
      packed_linear(h, operands.at(place::kUp), operands.maybe(place::kUpBias), inner, true);
  const Tensor x = packed_linear(between, operands.at(place::kDown), std::nullopt, h.size(1), false);
  return add_norm(
      x, h, operands.maybe(place::kDownBias), operands.at(place::kNormWeight), operands.at(place::kNormBias),
      eps, operands.maybe(place::kNormWeight2), operands.maybe(place::kNormBias2), eps2);
}

// halo: kAllRows, or h has the rows up to halo + 1 hops from the output rows, and the result those up to halo
// hops.
Tensor shift_half(
    const Tensor& h, const HalfOperands& operands, const std::vector<Tensor>& neighbours, int64_t halo,
    double eps) {
  namespace place = shift_norm_operands;
  const bool fewer = halo >= 0;
  const size_t index = fewer ? 2 * static_cast<size_t>(halo) : 0;
  STD_TORCH_CHECK(
      neighbours.size() > index + fewer &&
          (!fewer || neighbours[index + 1].scalar_type() == ScalarType::Long),
      "fused_layers: neighbours: got ", neighbours.size(),
      " tensors or rows of another dtype, wanted (rows,) bool, or "
      "that and int64 rows for each halo from 0 to ",
      halo, "; pass them for a shift_norm");
  const Tensor y = shift_norm(
      h, neighbours[index], operands.at(place::kOffset), operands.at(place::kScale),
      operands.at(place::kBefore), operands.at(place::kAfter), operands.at(place::kNormWeight),
      operands.at(place::kNormBias), eps);
  return fewer ? select_rows(y, dense(neighbours[index + 1])) : y;
}

struct HalfLayers {
  const std::vector<OptionalTensor>& operands;
  const std::vector<int64_t>& kinds;
  const std::vector<double>& numbers;
  size_t count() const { return kinds.size() / kKindsPerHalf; }
};

// How many operands a half layer has.
int64_t operand_count(int64_t kind) {
  switch (kind) {
    case kAttention:
      return attention_operands::kPlaces;
    case kAbsorbed:
      return absorbed_operands::kPlaces;
    case kFeedForward:
      return feed_forward_operands::kPlaces;
    case kShiftNorm:
      return shift_norm_operands::kPlaces;
  }
  STD_TORCH_CHECK(false, "fused_layers: kinds: got ", kind, ", wanted 0 to 3; see fused_layers.py");
}

// All half layers, one after another, on one part of the batch.
Tensor run_half_layers(const HalfLayers& halves, const BatchPart& part) {
  Tensor h = part.h;
  size_t next = 0;  // place of the first operand
  for (size_t half = 0; half < halves.count(); ++half) {
    const int64_t* kinds = &halves.kinds[half * kKindsPerHalf];
    const double* numbers = &halves.numbers[half * kNumbersPerHalf];
    const int64_t kind = kinds[kKind], size = kinds[kSize];
    const double eps = numbers[kEps], scale_or_eps2 = numbers[kScaleOrEps2];
    const HalfOperands operands(halves.operands, next);
    next += operand_count(kind);
    switch (kind) {
      case kAttention:
        h = attention_half(h, operands, part.cu_seqlens, size, scale_or_eps2, eps);
        break;
      case kAbsorbed:
        h = absorbed_half(h, operands, part.cu_seqlens, part.output_rows, size, scale_or_eps2, eps);
        break;
      case kFeedForward:
        h = feed_forward_half(h, operands, size, eps, scale_or_eps2);
        break;
      case kShiftNorm:
        h = shift_half(h, operands, part.neighbours, size, eps);
        break;
    }
  }
  STD_TORCH_CHECK(
      next == halves.operands.size(), "fused_layers: operands: got ", halves.operands.size(), ", wanted ",
      next, "; pass those of every half layer");
  return h;
}

}  // namespace

Tensor fused_layers(
    Tensor h, std::vector<OptionalTensor> operands, std::vector<int64_t> kinds, std::vector<double> numbers,
    Tensor cu_seqlens, OptionalTensor output_rows, std::vector<Tensor> neighbours) {
  STD_TORCH_CHECK(
      h.dim() == 2 && kinds.size() % kKindsPerHalf == 0 &&
          numbers.size() / kNumbersPerHalf == kinds.size() / kKindsPerHalf &&
          numbers.size() % kNumbersPerHalf == 0,
      "fused_layers: h, kinds, numbers: got ", h.dim(), " dimensions, ", kinds.size(), " and ",
      numbers.size(),
      " numbers, wanted (rows, H), two and two a half layer; reshape h, pass two a half layer");
  STD_TORCH_CHECK(
      is_float(h) || h.scalar_type() == ScalarType::BFloat16,
      "fused_layers: h: got another dtype, wanted float32 or bfloat16; convert it first");
  const HalfLayers halves = {operands, kinds, numbers};
  bool one_query_per_sequence = false;
  for (size_t half = 0; half < halves.count(); ++half)
    one_query_per_sequence = one_query_per_sequence || kinds[half * kKindsPerHalf + kKind] == kAbsorbed;
  const std::vector<BatchPart> parts =
      partition({h, cu_seqlens, output_rows, neighbours}, one_query_per_sequence);
  if (parts.size() == 1) return run_half_layers(halves, parts[0]);
  Tensor out =
      empty_rows(one_query_per_sequence ? cu_seqlens.numel() - 1 : h.size(0), h.size(1), h.scalar_type(), h);
  const int64_t bytes = h.size(1) * (is_float(h) ? 4 : 2);
  torch::stable::parallel_for(0, parts.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tensor rows = dense(run_half_layers(halves, parts[i]));
      const int64_t row = one_query_per_sequence ? parts[i].sequence : parts[i].row;
      std::memcpy(static_cast<char*>(out.data_ptr()) + row * bytes, rows.data_ptr(), rows.size(0) * bytes);
    }
  });
  return out;
}

}  // namespace fastgate::cpu
