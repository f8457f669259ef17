// Halves of encoder layers from packed weights, all in one call: a small batch feels what calling the steps one by
// one costs, all the more as the weights that pass through the caches push out what the caller needs.
#include <algorithm>
#include <cstring>

#include "ops.h"
#include "parts.h"
#include "rows.h"
#include "tiles.h"

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

FASTGATE_CLONES void widen(float* to, const bf16* from, int64_t n) {
  each(n, [&](int64_t i) { store(to, i, load(from, i)); });
}

FASTGATE_CLONES void narrow(bf16* to, const float* from, int64_t n) {
  each(n, [&](int64_t i) { store(to, i, load(from, i)); });
}

// t (rows, columns), dense, in another dtype, if it is not of that already: float32 or bfloat16.
Tensor as(ScalarType dtype, const Tensor& t) {
  const Tensor from = dense(t);
  if (from.scalar_type() == dtype) return from;
  const int64_t columns = from.dim() > 1 ? from.size(1) : from.numel();
  Tensor to = empty_rows(from.numel() / std::max<int64_t>(1, columns), columns, dtype, from);
  torch::stable::parallel_for(0, from.numel(), kWork, [&](int64_t begin, int64_t end) {
    if (dtype == ScalarType::Float)
      widen(floats(to) + begin, static_cast<const bf16*>(from.data_ptr()) + begin, end - begin);
    else
      narrow(static_cast<bf16*>(to.data_ptr()) + begin, floats(from) + begin, end - begin);
  });
  return to;
}

// Rows `wanted` of h.
Tensor gather(const Tensor& h, const Tensor& wanted) {
  const int64_t hidden = h.size(1), rows = wanted.size(0), bytes = hidden * (is_float(h) ? 4 : 2);
  Tensor found = empty_rows(rows, hidden, h.scalar_type(), h);
  const auto* places = static_cast<const int64_t*>(wanted.data_ptr());
  for (int64_t i = 0; i < rows; ++i) {
    STD_TORCH_CHECK(
        places[i] >= 0 && places[i] < h.size(0), "packed_layers: wanted: got row ", places[i], ", wanted one of ",
        h.size(0), "; pass rows of h");
    std::memcpy(
        static_cast<char*>(found.data_ptr()) + i * bytes, static_cast<const char*>(h.data_ptr()) + places[i] * bytes,
        bytes);
  }
  return found;
}

// each(head) for every head, on threads that get `work` multiply-adds at least.
template <class F>
void for_heads(int64_t heads, int64_t work, const F& each) {
  const int64_t grain = std::max<int64_t>(1, kWork / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) each(head);
  });
}

// Takes the operands of the halves in their order.
class Operands {
 public:
  explicit Operands(const std::vector<OptionalTensor>& all) : all_(all) {}
  const OptionalTensor& maybe() {
    STD_TORCH_CHECK(
        next_ < all_.size(), "packed_layers: operands: got ", all_.size(), ", wanted more; pass those of every half");
    return all_[next_++];
  }
  const Tensor& next() {
    const OptionalTensor& found = maybe();
    STD_TORCH_CHECK(
        found.has_value(), "packed_layers: operands: got none at place ", next_ - 1, ", wanted a tensor; pass it");
    return *found;
  }
  bool empty() const { return next_ == all_.size(); }

 private:
  const std::vector<OptionalTensor>& all_;
  size_t next_ = 0;
};

// LayerNorm(residual + x + bias), and a second LayerNorm given weight2.
Tensor add_norm(
    const Tensor& x, const Tensor& residual, const OptionalTensor& bias, const Tensor& weight, const Tensor& norm_bias,
    double eps, const OptionalTensor& weight2 = std::nullopt, const OptionalTensor& norm_bias2 = std::nullopt,
    double eps2 = 0.0) {
  return gated_add_norm(
      x, residual, weight, norm_bias, eps, bias, std::nullopt, std::nullopt, std::nullopt, 0.0, std::nullopt, weight2,
      norm_bias2, eps2);
}

// What ends both kinds of attention: the output's product and bias, the residual, LayerNorm.
Tensor attention_end(const Tensor& mixed, const Tensor& residual, Operands& operands, double eps) {
  const Tensor& output = operands.next();
  const OptionalTensor& bias = operands.maybe();
  const Tensor& weight = operands.next();
  const Tensor& norm_bias = operands.next();
  return add_norm(
      packed_linear(mixed, output, std::nullopt, residual.size(1), false), residual, bias, weight, norm_bias, eps);
}

Tensor attention_half(
    const Tensor& h, Operands& operands, const Tensor& cu_seqlens, int64_t heads, double scale, double eps) {
  const int64_t hidden = h.size(1);
  const Tensor rows = packed_linear(h, operands.next(), std::nullopt, 3 * hidden, false);
  const auto third = [&](int64_t place) {
    Tensor part = rows;
    return torch::stable::narrow(part, 1, place * hidden, hidden);
  };
  const OptionalTensor &q_bias = operands.maybe(), &k_bias = operands.maybe(), &v_bias = operands.maybe();
  const Tensor mixed = attention(
      third(0), third(1), third(2), q_bias, k_bias, v_bias, cu_seqlens, cu_seqlens, heads, scale, 0.0, std::nullopt);
  return attention_end(mixed, h, operands, eps);
}

Tensor absorbed_half(
    const Tensor& h, Operands& operands, const Tensor& cu_seqlens, const OptionalTensor& wanted, int64_t heads,
    double scale, double eps) {
  const int64_t hidden = h.size(1);
  const Tensor& query = operands.next();
  const OptionalTensor& q_bias = operands.maybe();
  const Tensor &key = operands.next(), &value = operands.next();
  const OptionalTensor& v_bias = operands.maybe();
  const auto fits = [&](const Tensor& t, int64_t size) {
    return t.scalar_type() == h.scalar_type() && t.numel() == size;
  };
  STD_TORCH_CHECK(
      hidden % 16 == 0 && heads > 0 && hidden % heads == 0 && fits(key, hidden * hidden) &&
          fits(value, hidden * hidden) && (!v_bias || fits(*v_bias, hidden)) && wanted && wanted->dim() == 1 &&
          wanted->scalar_type() == ScalarType::Long,
      "packed_layers: wanted, key, value, v_bias: got shapes or dtypes that do not fit, wanted (sequences,) int64, "
      "(H, H), (H, H), (H,) of h's dtype, H a multiple of 16 and of heads; call absorbed_attention");
  const Tensor from = dense(h), residual = gather(from, dense(*wanted));
  const Tensor source = as(ScalarType::Float, from);
  const Tensor q = as(ScalarType::Float, packed_linear(residual, query, q_bias, hidden, false));
  const Tensor keys = as(ScalarType::Float, key), values = as(ScalarType::Float, value);
  const int64_t rows = residual.size(0), width = hidden / heads;
  const int64_t sizes[] = {rows, heads, hidden};
  Tensor probe = empty(sizes, 3, ScalarType::Float, h);
  for_heads(heads, rows * width * hidden, [&](int64_t head) {
    multiply(
        false, {floats(q) + head * width, hidden, 1}, floats(keys) + head * width * hidden, hidden,
        floats(probe) + head * hidden, heads * hidden, rows, hidden, width);
  });
  const std::tuple<Tensor, Tensor> found = absorbed_attention(probe, source, cu_seqlens, scale, 0.0, std::nullopt);
  const Tensor &mixed = std::get<0>(found), &total = std::get<1>(found);
  Tensor out = empty_rows(rows, hidden, ScalarType::Float, h);
  const Tensor added = v_bias ? as(ScalarType::Float, *v_bias) : out;
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
  return attention_end(as(h.scalar_type(), out), residual, operands, eps);
}

Tensor feed_forward_half(const Tensor& h, Operands& operands, int64_t inner, double eps, double eps2) {
  const Tensor& up = operands.next();
  const OptionalTensor& up_bias = operands.maybe();
  const Tensor between = packed_linear(h, up, up_bias, inner, true);
  const Tensor x = packed_linear(between, operands.next(), std::nullopt, h.size(1), false);
  const OptionalTensor& bias = operands.maybe();
  const Tensor &weight = operands.next(), &norm_bias = operands.next();
  const OptionalTensor &weight2 = operands.maybe(), &norm_bias2 = operands.maybe();
  return add_norm(x, h, bias, weight, norm_bias, eps, weight2, norm_bias2, eps2);
}

// Of all rows where reach is -1; else of rows up to reach + 1 links away from those that are read, those up to `reach`.
Tensor shift_half(
    const Tensor& h, Operands& operands, const std::vector<Tensor>& links, int64_t reach, double eps) {
  const bool fewer = reach >= 0;
  const size_t place = fewer ? 2 * static_cast<size_t>(reach) : 0;
  STD_TORCH_CHECK(
      links.size() > place + fewer && (!fewer || links[place + 1].scalar_type() == ScalarType::Long),
      "packed_layers: links: got ", links.size(), " tensors or rows of another dtype, wanted (rows,) bool, or that and "
      "int64 rows for each reach from 0 to ", reach, "; pass them for a shift");
  const Tensor &shift = operands.next(), &scale = operands.next(), &before = operands.next(), &after = operands.next();
  const Tensor &weight = operands.next(), &norm_bias = operands.next();
  const Tensor found = shift_norm(h, links[place], shift, scale, before, after, weight, norm_bias, eps);
  return fewer ? gather(found, dense(links[place + 1])) : found;
}

struct Halves {
  const std::vector<OptionalTensor>& operands;
  const std::vector<int64_t>& kinds;
  const std::vector<double>& numbers;
};

Tensor run(const Halves& halves, const Part& part) {
  Operands left(halves.operands);
  Tensor h = part.h;
  for (size_t half = 0; half < halves.kinds.size(); half += 2) {
    const int64_t size = halves.kinds[half + 1];
    const double eps = halves.numbers[half], other = halves.numbers[half + 1];
    switch (halves.kinds[half]) {
      case kAttention: h = attention_half(h, left, part.cu_seqlens, size, other, eps); break;
      case kAbsorbed: h = absorbed_half(h, left, part.cu_seqlens, part.wanted, size, other, eps); break;
      case kFeedForward: h = feed_forward_half(h, left, size, eps, other); break;
      case kShiftNorm: h = shift_half(h, left, part.links, size, eps); break;
      default:
        STD_TORCH_CHECK(
            false, "packed_layers: kinds: got ", halves.kinds[half], ", wanted 0 to 3; see packed_layers.py");
    }
  }
  STD_TORCH_CHECK(
      left.empty(), "packed_layers: operands: got ", halves.operands.size(),
      ", wanted fewer; pass those of every half");
  return h;
}

}  // namespace

Tensor packed_layers(
    Tensor h, std::vector<OptionalTensor> operands, std::vector<int64_t> kinds, std::vector<double> numbers,
    Tensor cu_seqlens, OptionalTensor wanted, std::vector<Tensor> links) {
  STD_TORCH_CHECK(
      h.dim() == 2 && kinds.size() % 2 == 0 && numbers.size() == kinds.size(),
      "packed_layers: h, kinds, numbers: got ", h.dim(), " dimensions, ", kinds.size(), " and ", numbers.size(),
      " numbers, wanted (rows, H), two and two a half; reshape h, pass two a half");
  STD_TORCH_CHECK(
      is_float(h) || h.scalar_type() == ScalarType::BFloat16,
      "packed_layers: h: got another dtype, wanted float32 or bfloat16; convert it first");
  const Halves halves = {operands, kinds, numbers};
  bool single = false;
  for (size_t half = 0; half < kinds.size(); half += 2) single = single || kinds[half] == kAbsorbed;
  const std::vector<Part> parts = parts_of({h, cu_seqlens, wanted, links}, single);
  if (parts.size() == 1) return run(halves, parts[0]);
  Tensor out = empty_rows(single ? cu_seqlens.numel() - 1 : h.size(0), h.size(1), h.scalar_type(), h);
  const int64_t bytes = h.size(1) * (is_float(h) ? 4 : 2);
  torch::stable::parallel_for(0, parts.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tensor found = dense(run(halves, parts[i]));
      const int64_t row = single ? parts[i].sequence : parts[i].row;
      std::memcpy(static_cast<char*>(out.data_ptr()) + row * bytes, found.data_ptr(), found.size(0) * bytes);
    }
  });
  return out;
}

}  // namespace fastgate::cpu
