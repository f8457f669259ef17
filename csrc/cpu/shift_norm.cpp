// shift_norm on the CPU, forward and backward: the equations of fastgate/ops/reference/, one row at a time.
//
// A row is mixed with those beside it and normalised in float32 inside the first-level cache. Backward needs
// du of three rows for one of dx: it goes down the rows and holds the last three, and begins each block of
// rows one row early where that one is a neighbour. Parameters' gradients are summed over fixed blocks of
// rows and the blocks in order: the same bits at every call and for every number of threads.
#include <algorithm>

#include "cpu/norm.h"
#include "gradient_bits.h"
#include "ops.h"

namespace fastgate::cpu {
namespace {

namespace grads = shift_norm_gradients;

constexpr int64_t kForwardElements = 32768;  // per thread at least: less is not worth waking one
constexpr int64_t kFlush = 32;               // rows summed before their sum joins the block's
constexpr int64_t kBlocks = 64;              // row blocks at most, each with its own sums

struct ShiftProblem {
  int64_t rows, hidden;
  const void* x;
  const char* has_left_neighbour;  // (rows + 1,): false at both ends
  const float *offset, *scale, *before, *after, *weight, *norm_bias;
  const void* zeros;  // a row that stands for a neighbour that is missing
  float eps;

  bool above(int64_t row) const { return has_left_neighbour[row]; }
  bool below(int64_t row) const { return has_left_neighbour[row + 1]; }
};

template <class T>
struct NeighbourRows {
  const T *x, *above, *below;
};

template <class T>
FASTGATE_INLINE NeighbourRows<T> rows_at(const ShiftProblem& o, int64_t row) {
  const T *x = static_cast<const T*>(o.x) + row * o.hidden, *zeros = static_cast<const T*>(o.zeros);
  return {x, o.above(row) ? x - o.hidden : zeros, o.below(row) ? x + o.hidden : zeros};
}

// u of one row into `u`, and its statistics.
template <class T>
FASTGATE_INLINE Norm mix(const ShiftProblem& o, const NeighbourRows<T>& r, float* u) {
  const float *offset = o.offset, *scale = o.scale, *before = o.before, *after = o.after;
  const T *at = r.x, *above = r.above, *below = r.below;
  const float total = sum(o.hidden, [&](int64_t j) {
    const float x = load(at, j);
    return u[j] = x + (offset[j] + scale[j] * x + before[j] * load(above, j) + after[j] * load(below, j));
  });
  return statistics(u, o.hidden, total, o.eps);
}

template <class T>
FASTGATE_INLINE void forward_rows(const ShiftProblem& o, void* out, float* u, int64_t begin, int64_t end) {
  const float *weight = o.weight, *norm_bias = o.norm_bias;
  for (int64_t row = begin; row < end; ++row) {
    T* y = static_cast<T*>(out) + row * o.hidden;
    const Norm norm = mix(o, rows_at<T>(o, row), u);
    for_each(
        o.hidden, [&](int64_t j) { store(y, j, (u[j] - norm.mean) * norm.rstd * weight[j] + norm_bias[j]); });
  }
}

// du of one row into `du`; the norm's own gradients are added to dweight and dnorm_bias.
template <class T>
FASTGATE_INLINE void du_of(
    const ShiftProblem& o, const void* grad, const NeighbourRows<T>& r, int64_t row, float* u, float* du,
    float* dweight, float* dnorm_bias) {
  const T* dy = static_cast<const T*>(grad) + row * o.hidden;
  const Norm norm = mix(o, r, u);
  const Means means = norm_backward(o.hidden, dy, o.weight, norm, u, du, dweight, dnorm_bias);
  for_each(o.hidden, [&](int64_t j) { du[j] = through_norm(norm, means, u[j], du[j]); });
}

template <class T>
FASTGATE_INLINE void backward_rows(
    const ShiftProblem& o, const void* grad, void* gradient, float* scratch, int64_t begin, int64_t end,
    float* block) {
  const int64_t n = o.hidden;
  float *u = scratch, *zeros = u + padded(n), *unused = zeros + padded(n), *sums = unused + 2 * padded(n);
  float *doffset = sums, *dscale = doffset + n, *dbefore = dscale + n, *dafter = dbefore + n;
  float *dweight = dafter + n, *dnorm_bias = dweight + n, *ring = sums + grads::kParameters * n;
  const float *scale = o.scale, *before = o.before, *after = o.after;
  std::fill(zeros, zeros + n, 0.0f);
  const auto held = [&](int64_t row) { return ring + row % 3 * padded(n); };
  const auto of_another_block =
      [&](int64_t row) __attribute__((always_inline)) {  // as all that a clone calls
        du_of<T>(o, grad, rows_at<T>(o, row), row, u, held(row), unused, unused + padded(n));
      };
  if (o.above(begin)) of_another_block(begin - 1);
  for (int64_t start = begin; start < end; start += kFlush) {
    const int64_t stop = std::min(end, start + kFlush);
    std::fill(sums, sums + grads::kParameters * n, 0.0f);
    // A row's dx comes when du of the row below is there: one row late.
    const int64_t last = stop == end ? end : stop - 1;
    for (int64_t row = start; row <= last; ++row) {
      if (row == end) {
        if (o.below(end - 1)) of_another_block(end);
      } else {
        const NeighbourRows<T> r = rows_at<T>(o, row);
        float* du = held(row);
        du_of<T>(o, grad, r, row, u, du, dweight, dnorm_bias);
        for_each(n, [&](int64_t j) {
          doffset[j] += du[j];
          dscale[j] += du[j] * load(r.x, j);
          dbefore[j] += du[j] * load(r.above, j);
          dafter[j] += du[j] * load(r.below, j);
        });
      }
      const int64_t ready = row - 1;
      if (gradient == nullptr || ready < begin) continue;
      T* dx = static_cast<T*>(gradient) + ready * n;
      const float *du = held(ready),
                  *down = o.above(ready) ? held(ready + 2) : zeros;  // ready - 1 lies there
      const float* up = o.below(ready) ? held(ready + 1) : zeros;
      for_each(n, [&](int64_t j) {
        store(dx, j, du[j] + (scale[j] * du[j] + before[j] * up[j] + after[j] * down[j]));
      });
    }
    for_each(grads::kParameters * n, [&](int64_t j) { block[j] += sums[j]; });
  }
}

#define FASTGATE_SHIFT(NAME, T)                                                                      \
  FASTGATE_CLONES void forward_##NAME(                                                               \
      const ShiftProblem& o, void* y, float* scratch, int64_t begin, int64_t end) {                  \
    forward_rows<T>(o, y, scratch, begin, end);                                                      \
  }                                                                                                  \
  FASTGATE_CLONES void backward_##NAME(                                                              \
      const ShiftProblem& o, const void* grad, void* dx, float* scratch, int64_t begin, int64_t end, \
      float* block) {                                                                                \
    backward_rows<T>(o, grad, dx, scratch, begin, end, block);                                       \
  }

FASTGATE_SHIFT(f, float)
FASTGATE_SHIFT(b, bf16)

// Holds what ShiftProblem points into.
struct PreparedShift {
  ShiftProblem problem{};
  std::vector<Tensor> kept_alive;
  std::vector<float> zeros;
  std::vector<char>
      has_left_neighbour;  // with its ends: a loop over rows that tests for them is not vectorised
  bool is_bf16 = false;
};

const float* floats(PreparedShift& p, const Tensor& t) {
  STD_TORCH_CHECK(
      t.numel() == p.problem.hidden, "shift_norm: vectors: got ", t.numel(), " elements, wanted ",
      p.problem.hidden, "; match x's last dimension");
  return static_cast<const float*>(p.kept_alive.emplace_back(as_float(t)).data_ptr());
}

PreparedShift prepare(FASTGATE_PARAMETERS(SHIFT_NORM)) {
  PreparedShift p;
  ShiftProblem& o = p.problem;
  p.kept_alive.reserve(8);
  p.is_bf16 = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(
      (p.is_bf16 || x.scalar_type() == ScalarType::Float) && x.dim() == 2 &&
          has_left_neighbour.scalar_type() == ScalarType::Bool && has_left_neighbour.numel() == x.size(0),
      "shift_norm: x, has_left_neighbour: got other dtypes or shapes, wanted (rows, H) float32 or bfloat16, "
      "(rows,) bool; the torch "
      "reference takes other dtypes");
  o.rows = x.size(0), o.hidden = x.size(1);
  o.x = p.kept_alive.emplace_back(dense(x)).data_ptr();
  const Tensor neighbours = dense(has_left_neighbour);
  p.has_left_neighbour.assign(o.rows + 1, 0);
  if (o.rows > 0)
    std::memcpy(
        p.has_left_neighbour.data() + 1, static_cast<const char*>(neighbours.data_ptr()) + 1, o.rows - 1);
  o.has_left_neighbour = p.has_left_neighbour.data();
  o.offset = floats(p, offset), o.scale = floats(p, scale), o.before = floats(p, before),
  o.after = floats(p, after);
  o.weight = floats(p, weight), o.norm_bias = floats(p, norm_bias);
  o.eps = static_cast<float>(eps);
  p.zeros.assign(o.hidden, 0.0f);
  o.zeros = p.zeros.data();
  return p;
}

}  // namespace

Tensor shift_norm(FASTGATE_PARAMETERS(SHIFT_NORM)) {
  const PreparedShift p = prepare(FASTGATE_ARGUMENTS(SHIFT_NORM));
  const ShiftProblem& o = p.problem;
  Tensor y = empty_like(x, x.scalar_type());
  void* out = y.data_ptr();
  if (o.rows == 0 || o.hidden == 0) return y;
  torch::stable::parallel_for(
      0, o.rows, std::max<int64_t>(1, kForwardElements / o.hidden), [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(padded(o.hidden));
        (p.is_bf16 ? forward_b : forward_f)(o, out, scratch.data(), begin, end);
      });
  return y;
}

std::tuple<Tensor, Tensor> shift_norm_backward(
    Tensor grad, FASTGATE_PARAMETERS(SHIFT_NORM), int64_t requested) {
  const PreparedShift p = prepare(FASTGATE_ARGUMENTS(SHIFT_NORM));
  const ShiftProblem& o = p.problem;
  STD_TORCH_CHECK(
      grad.scalar_type() == x.scalar_type() && grad.numel() == x.numel(),
      "shift_norm_backward: grad: got another shape or dtype, wanted y's; pass the gradient of y");
  const Tensor dy = dense(grad);
  const void* from = dy.data_ptr();
  const int64_t none = 0;
  const bool along_x = requested & grads::kX;
  Tensor dx = along_x ? empty_like(x, x.scalar_type()) : empty(&none, 1, x.scalar_type(), x);
  void* gradient = along_x ? dx.data_ptr() : nullptr;

  // Blocks depend on the number of rows only, never on the number of threads.
  const int64_t least = std::max<int64_t>(1, (o.rows + kBlocks - 1) / kBlocks);
  const int64_t block_rows = (least + kFlush - 1) / kFlush * kFlush;
  const int64_t blocks = (o.rows + block_rows - 1) / block_rows, size = grads::kParameters * o.hidden;
  std::vector<float> sums(blocks * size);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(7 * padded(o.hidden) + size);
    for (int64_t b = begin; b < end; ++b)
      (p.is_bf16 ? backward_b : backward_f)(
          o, from, gradient, scratch.data(), b * block_rows, std::min(o.rows, (b + 1) * block_rows),
          sums.data() + b * size);
  });

  std::vector<int> asked;
  for (int parameter = 0; parameter < grads::kParameters; ++parameter)
    if (requested & (int64_t{grads::kFirstParameterBit} << parameter)) asked.push_back(parameter);
  const int64_t shape[2] = {static_cast<int64_t>(asked.size()), o.hidden};
  Tensor parameters = empty(shape, 2, ScalarType::Float, x);
  float* out = static_cast<float*>(parameters.data_ptr());
  for (size_t place = 0; place < asked.size(); ++place, out += o.hidden) {
    std::fill(out, out + o.hidden, 0.0f);
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t j = 0; j < o.hidden; ++j) out[j] += sums[b * size + asked[place] * o.hidden + j];
  }
  return {dx, parameters};
}

}  // namespace fastgate::cpu
