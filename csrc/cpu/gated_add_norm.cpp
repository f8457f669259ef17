// gated_add_norm on the CPU, forward and backward: the equations of fastgate/ops/reference/, one row at a
// time.
//
// A row is read once, worked on in float32 inside the first-level cache, and written once. Backward
// recomputes the row's statistics from x and residual, so forward keeps nothing. Parameters' gradients are
// summed over fixed blocks of rows and the blocks in order: the same bits at every call and for every number
// of threads.
#include <algorithm>

#include "cpu/dropout.h"
#include "cpu/norm.h"
#include "gradient_bits.h"

namespace fastgate::cpu {
namespace {

namespace grads = gated_add_norm_gradients;
constexpr int64_t parameter_bit(int parameter) { return int64_t{grads::kFirstParameterBit} << parameter; }

constexpr int64_t kForwardElements = 32768;  // per thread at least: less is not worth waking one
constexpr int64_t kFlush = 32;               // rows summed before their sum joins the block's
constexpr int64_t kBlocks = 64;              // row blocks at most, each with its own sums

struct GatedNormProblem {
  int64_t rows, hidden;
  const void *x, *residual;
  const float *weight, *norm_bias;
  const float *weight2, *norm_bias2;   // null: one norm
  const float *bias, *scale, *offset;  // zeros and ones where none was given
  const float* undropped;              // ones
  float gate, eps, eps2;
  Dropout dropout;
};

FASTGATE_CLONES void draw_keep_factors(const GatedNormProblem& o, int64_t row, float* keep) {
  keep_factors(o.dropout, row, o.hidden, keep);
}

// u of one row into `u`, and its statistics. `keep` holds the row's dropout factors.
template <class TX, class TR>
FASTGATE_INLINE Norm
mix(const GatedNormProblem& o, const TX* x, const TR* residual, const float* keep, float* u) {
  const float gate = o.gate;
  const float *scale = o.scale, *bias = o.bias, *offset = o.offset;
  const float total = sum(o.hidden, [&](int64_t j) {
    const float dropped = keep[j] * (load(x, j) + bias[j]);
    return u[j] = scale[j] * load(residual, j) + (gate * dropped + offset[j]);
  });
  return statistics(u, o.hidden, total, o.eps);
}

template <class TX, class TR, class TY>
FASTGATE_INLINE void forward_rows(
    const GatedNormProblem& o, void* out, float* scratch, int64_t begin, int64_t end) {
  const int64_t n = o.hidden;
  float *u = scratch, *drawn = u + padded(n);
  const float *weight = o.weight, *norm_bias = o.norm_bias, *weight2 = o.weight2, *norm_bias2 = o.norm_bias2;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * n;
    TY* y = static_cast<TY*>(out) + first;
    if (o.dropout.on) draw_keep_factors(o, row, drawn);
    const Norm one =
        mix(o, static_cast<const TX*>(o.x) + first, static_cast<const TR*>(o.residual) + first,
            o.dropout.on ? drawn : o.undropped, u);
    if (weight2 == nullptr) {
      for_each(n, [&](int64_t j) { store(y, j, (u[j] - one.mean) * one.rstd * weight[j] + norm_bias[j]); });
      continue;
    }
    const float total =
        sum(n, [&](int64_t j) { return u[j] = (u[j] - one.mean) * one.rstd * weight[j] + norm_bias[j]; });
    const Norm two = statistics(u, n, total, o.eps2);
    for_each(n, [&](int64_t j) { store(y, j, (u[j] - two.mean) * two.rstd * weight2[j] + norm_bias2[j]); });
  }
}

struct GatedNormGradients {
  const void* grad;
  void *dx, *dresidual;  // null: not requested
  int64_t requested;
};

template <class TX, class TR, class TY>
FASTGATE_INLINE void backward_rows(
    const GatedNormProblem& o, const GatedNormGradients& g, float* scratch, int64_t begin, int64_t end,
    float* block) {
  const int64_t n = o.hidden, requested = g.requested;
  float *u = scratch, *t = u + padded(n), *v = t + padded(n), *drawn = v + padded(n),
        *sums = drawn + padded(n);
  float *dbias = sums, *dgate = dbias + n, *dscale = dgate + n, *doffset = dscale + n;
  float *dweight = doffset + n, *dnorm_bias = dweight + n, *dweight2 = dnorm_bias + n,
        *dnorm_bias2 = dweight2 + n;
  const float *weight = o.weight, *norm_bias = o.norm_bias, *scale = o.scale, *bias = o.bias;
  const float* keep = o.dropout.on ? drawn : o.undropped;
  const float gate = o.gate;
  for (int64_t start = begin; start < end; start += kFlush) {
    const int64_t stop = std::min(end, start + kFlush);
    std::fill(sums, sums + grads::kParameters * n, 0.0f);
    for (int64_t row = start; row < stop; ++row) {
      const int64_t first = row * n;
      const TX* x = static_cast<const TX*>(o.x) + first;
      const TR* residual = static_cast<const TR*>(o.residual) + first;
      const TY* dy = static_cast<const TY*>(g.grad) + first;
      if (o.dropout.on) draw_keep_factors(o, row, drawn);
      const Norm one = mix(o, x, residual, keep, u);
      Means means;
      if (o.weight2 == nullptr) {
        means = norm_backward(n, dy, weight, one, u, t, dweight, dnorm_bias);
      } else {
        const float total =
            sum(n, [&](int64_t j) { return v[j] = (u[j] - one.mean) * one.rstd * weight[j] + norm_bias[j]; });
        const Norm two = statistics(v, n, total, o.eps2);
        means = norm_backward(n, dy, o.weight2, two, v, t, dweight2, dnorm_bias2);
        for_each(n, [&](int64_t j) { t[j] = through_norm(two, means, v[j], t[j]); });
        means = norm_backward(n, t, weight, one, u, t, dweight, dnorm_bias);
      }
      // From here on t is du. dbias is summed beside dx whether it is requested or not: one pass less.
      if (g.dresidual != nullptr) {
        TR* dresidual = static_cast<TR*>(g.dresidual) + first;
        for_each(n, [&](int64_t j) {
          const float du = t[j] = through_norm(one, means, u[j], t[j]);
          store(dresidual, j, scale[j] * du);
        });
      } else {
        for_each(n, [&](int64_t j) { t[j] = through_norm(one, means, u[j], t[j]); });
      }
      if (g.dx != nullptr) {
        TX* dx = static_cast<TX*>(g.dx) + first;
        for_each(n, [&](int64_t j) {
          const float along_x = gate * (keep[j] * t[j]);
          store(dx, j, along_x);
          dbias[j] += along_x;
        });
      } else if (requested & parameter_bit(grads::kBias)) {
        for_each(n, [&](int64_t j) { dbias[j] += gate * (keep[j] * t[j]); });
      }
      if (requested & parameter_bit(grads::kGate))
        for_each(n, [&](int64_t j) { dgate[j] += t[j] * (keep[j] * (load(x, j) + bias[j])); });
      if (requested & parameter_bit(grads::kScale))
        for_each(n, [&](int64_t j) { dscale[j] += t[j] * load(residual, j); });
      if (requested & parameter_bit(grads::kOffset)) for_each(n, [&](int64_t j) { doffset[j] += t[j]; });
    }
    float* into = block;
    for (int parameter = 0; parameter < grads::kParameters; ++parameter) {
      if (!(requested & parameter_bit(parameter))) continue;
      const float* from = sums + parameter * n;
      for_each(n, [&](int64_t j) { into[j] += from[j]; });
      into += n;
    }
  }
}

// One pair of functions for each pair of element types, compiled for every clone.
#define FASTGATE_KERNELS(NAME, TX, TR, TY)                                                                \
  FASTGATE_CLONES void forward_##NAME(                                                                    \
      const GatedNormProblem& o, void* y, float* scratch, int64_t begin, int64_t end) {                   \
    forward_rows<TX, TR, TY>(o, y, scratch, begin, end);                                                  \
  }                                                                                                       \
  FASTGATE_CLONES void backward_##NAME(                                                                   \
      const GatedNormProblem& o, const GatedNormGradients& g, float* scratch, int64_t begin, int64_t end, \
      float* block) {                                                                                     \
    backward_rows<TX, TR, TY>(o, g, scratch, begin, end, block);                                          \
  }

FASTGATE_KERNELS(ff, float, float, float)
FASTGATE_KERNELS(fb, float, bf16, float)
FASTGATE_KERNELS(bf, bf16, float, float)
FASTGATE_KERNELS(bb, bf16, bf16, bf16)

struct Kernels {
  void (*forward)(const GatedNormProblem&, void*, float*, int64_t, int64_t);
  void (*backward)(const GatedNormProblem&, const GatedNormGradients&, float*, int64_t, int64_t, float*);
};

Kernels choose(ScalarType x, ScalarType residual) {
  static constexpr auto kBf16 = ScalarType::BFloat16;
  if (x == kBf16)
    return residual == kBf16 ? Kernels{forward_bb, backward_bb} : Kernels{forward_bf, backward_bf};
  return residual == kBf16 ? Kernels{forward_fb, backward_fb} : Kernels{forward_ff, backward_ff};
}

// Holds what GatedNormProblem points into.
struct PreparedGatedNorm {
  GatedNormProblem problem{};
  Kernels kernels{};
  ScalarType y_dtype{};
  std::vector<Tensor> kept_alive;
  std::vector<std::vector<float>> copies;
};

// A vector operand as float32: itself, or a copy.
const float* floats(PreparedGatedNorm& p, const Tensor& t, const char* name) {
  const int64_t n = p.problem.hidden;
  STD_TORCH_CHECK(
      t.numel() == n, "gated_add_norm: ", name, ": got ", t.numel(), " elements, wanted ", n,
      "; match x's last dimension");
  if (t.scalar_type() == ScalarType::BFloat16 && t.is_contiguous()) {  // without the dispatcher's cost
    const bf16* from = static_cast<const bf16*>(t.data_ptr());
    p.copies.emplace_back(n);
    for (int64_t j = 0; j < n; ++j) p.copies.back()[j] = load(from, j);
    return p.copies.back().data();
  }
  p.kept_alive.push_back(as_float(t));
  return static_cast<const float*>(p.kept_alive.back().data_ptr());
}

void check_dtype(const char* name, const Tensor& t) {
  const auto dtype = t.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "gated_add_norm: ", name,
      ": got another dtype, wanted float32 or bfloat16; the torch reference takes the others");
}

PreparedGatedNorm prepare(FASTGATE_PARAMETERS(GATED_ADD_NORM)) {
  check_dtype("x", x);
  check_dtype("residual", residual);
  STD_TORCH_CHECK(
      x.dim() > 0 && x.numel() == residual.numel(), "gated_add_norm: residual: got ", residual.numel(),
      " elements, wanted ", x.numel(), "; match x's shape");
  PreparedGatedNorm p;
  GatedNormProblem& o = p.problem;
  p.kept_alive.reserve(12);
  o.hidden = x.size(x.dim() - 1);
  o.rows = o.hidden > 0 ? x.numel() / o.hidden : 0;
  p.kept_alive.push_back(dense(x));
  o.x = p.kept_alive.back().data_ptr();
  p.kept_alive.push_back(dense(residual));
  o.residual = p.kept_alive.back().data_ptr();
  const bool both_bf16 =
      x.scalar_type() == ScalarType::BFloat16 && residual.scalar_type() == ScalarType::BFloat16;
  p.y_dtype = both_bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  o.dropout = dropout_of("gated_add_norm", dropout_p, seed);
  p.kernels = choose(x.scalar_type(), residual.scalar_type());
  o.eps = static_cast<float>(eps);
  o.eps2 = static_cast<float>(eps2);
  o.weight = floats(p, weight, "weight");
  o.norm_bias = floats(p, norm_bias, "norm_bias");
  STD_TORCH_CHECK(
      weight2.has_value() == norm_bias2.has_value(),
      "gated_add_norm: weight2, norm_bias2: got one of them, wanted both or neither; pass the other too");
  if (weight2) {
    o.weight2 = floats(p, *weight2, "weight2");
    o.norm_bias2 = floats(p, *norm_bias2, "norm_bias2");
  }
  STD_TORCH_CHECK(
      !gate || gate->numel() == 1, "gated_add_norm: gate: got ", gate ? gate->numel() : 0,
      " elements, wanted one; pass a number as a tensor");
  o.gate = gate ? *static_cast<const float*>(p.kept_alive.emplace_back(as_float(*gate)).data_ptr()) : 1.0f;
  const float* zeros = p.copies.emplace_back(o.hidden, 0.0f).data();
  const float* ones = p.copies.emplace_back(o.hidden, 1.0f).data();
  o.undropped = ones;
  o.bias = bias ? floats(p, *bias, "bias") : zeros;
  o.scale = scale ? floats(p, *scale, "scale") : ones;
  o.offset = offset ? floats(p, *offset, "offset") : zeros;
  return p;
}

}  // namespace

Tensor gated_add_norm(FASTGATE_PARAMETERS(GATED_ADD_NORM)) {
  const PreparedGatedNorm p = prepare(FASTGATE_ARGUMENTS(GATED_ADD_NORM));
  const GatedNormProblem& o = p.problem;
  Tensor y = empty_like(x, p.y_dtype);
  void* out = y.data_ptr();
  if (o.rows == 0) return y;
  const int64_t grain = std::max<int64_t>(1, kForwardElements / o.hidden);
  torch::stable::parallel_for(0, o.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * padded(o.hidden));
    p.kernels.forward(o, out, scratch.data(), begin, end);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gated_add_norm_backward(
    Tensor grad, FASTGATE_PARAMETERS(GATED_ADD_NORM), int64_t requested) {
  const PreparedGatedNorm p = prepare(FASTGATE_ARGUMENTS(GATED_ADD_NORM));
  const GatedNormProblem& o = p.problem;
  STD_TORCH_CHECK(
      grad.scalar_type() == p.y_dtype && grad.numel() == x.numel(),
      "gated_add_norm_backward: grad: got another shape or dtype, wanted y's; pass the gradient of y");
  const Tensor dy = dense(grad);
  const int64_t none = 0;
  Tensor dx = requested & grads::kX ? empty_like(x, x.scalar_type()) : empty(&none, 1, x.scalar_type(), x);
  Tensor dresidual = requested & grads::kResidual ? empty_like(x, residual.scalar_type())
                                                  : empty(&none, 1, residual.scalar_type(), x);
  int64_t count = 0;
  for (int parameter = 0; parameter < grads::kParameters; ++parameter)
    count += (requested & parameter_bit(parameter)) != 0;
  const int64_t shape[2] = {count, o.hidden};
  Tensor parameters = empty(shape, 2, ScalarType::Float, x);

  // Blocks depend on the number of rows only, never on the number of threads.
  const int64_t least = std::max<int64_t>(1, (o.rows + kBlocks - 1) / kBlocks);
  const int64_t block_rows = (least + kFlush - 1) / kFlush * kFlush;
  const int64_t blocks = (o.rows + block_rows - 1) / block_rows, size = count * o.hidden;
  std::vector<float> sums(blocks * size);
  const GatedNormGradients g{
      dy.data_ptr(), requested & grads::kX ? dx.data_ptr() : nullptr,
      requested & grads::kResidual ? dresidual.data_ptr() : nullptr, requested};
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(4 * padded(o.hidden) + grads::kParameters * o.hidden);
    for (int64_t b = begin; b < end; ++b)
      p.kernels.backward(
          o, g, scratch.data(), b * block_rows, std::min(o.rows, (b + 1) * block_rows),
          sums.data() + b * size);
  });
  float* out = static_cast<float*>(parameters.data_ptr());
  std::fill(out, out + size, 0.0f);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t j = 0; j < size; ++j) out[j] += sums[b * size + j];
  return {dx, dresidual, parameters};
}

}  // namespace fastgate::cpu
