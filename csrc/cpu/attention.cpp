// Self-attention over an unpadded batch on the CPU, forward and backward: the equations of
// kernels/attention_forward.py and attention_backward.py.
//
// One task is one head of one sequence. Its slices of q, k and v are copied to float32 buffers whose rows are
// whole vectors, so that every product is a gemm of fp32_gemm.h. Backward draws the dropout mask and the
// probabilities again, so forward keeps nothing, and a task owns its rows of every gradient: the same bits at
// every call.
#include "cpu/amx_attention.h"
#include "cpu/attention_task.h"
#include "cpu/cu_seqlens.h"
#include "cpu/softmax.h"

namespace fastgate::cpu {
namespace {

constexpr int64_t kQueries = 64;  // queries whose scores are held at a time

int64_t forward_arena_size(int64_t longest_q, int64_t longest_k, int64_t width) {
  const int64_t k = row_stride(longest_k), w = row_stride(width);
  return (longest_q + kQueries + 16 + longest_k) * w + (round_up(width, 16) + kQueries + 1) * k;
}

template <class T>
FASTGATE_INLINE void forward_tasks(
    const AttentionProblem& o, void* out, Arena& arena, int64_t begin, int64_t end) {
  const Arena::Mark mark = arena.mark();
  for (int64_t index = begin; index < end; ++index) {
    const HeadTask t = head_task(o, index);
    if (t.queries == 0) continue;
    arena.release(mark);
    const int64_t w = t.width_row, n = t.keys_row;
    float *q = arena.take(t.queries * w), *mixed = arena.take(kQueries * w), *key_block = arena.take(16 * w);
    float *v = arena.take(t.keys * w), *kt = arena.take(t.width16 * n), *p = arena.take(kQueries * n);
    float* factors = arena.take(n);
    gather_head<T>(o, t, o.q, o.q_bias, t.q_row, t.queries, t.queries, o.scale, q);
    gather_head<T>(o, t, o.v, o.v_bias, t.k_row, t.keys, t.keys, 1.0f, v);
    for (int64_t key = 0; key < t.keys; key += 16) {
      gather_head<T>(
          o, t, o.k, nullptr, t.k_row + key, std::min<int64_t>(16, t.keys - key), 16, 1.0f, key_block);
      transpose(key_block, w, t.width16, kt + key, n);
    }
    for (int64_t first = 0; first < t.queries; first += kQueries) {
      const int64_t rows = std::min(kQueries, t.queries - first);
      gemm(false, {q + first * w, w, 1}, kt, n, p, n, rows, 16 * t.blocks, o.width);
      softmax(p, rows, n, t.keys, t.blocks);
      for (int64_t i = 0; i < rows && o.dropout.on; ++i) {
        float* row = p + i * n;
        draw_factors(o, t, first + i, factors);
        for_each(16 * t.blocks, [&](int64_t j) { row[j] *= factors[j]; });
      }
      gemm(false, {p, n, 1}, v, w, mixed, w, rows, t.width16, t.keys);
      scatter_head<T>(o, t, mixed, t.q_row + first, rows, 1.0f, out);
    }
  }
}

int64_t backward_arena_size(int64_t longest_q, int64_t longest_k, int64_t width) {
  const int64_t k = row_stride(longest_k), w = row_stride(width);
  return (3 * longest_q + 2 * round_up(longest_k, 16) + 2 * longest_k) * w +
         (2 * round_up(width, 16) + 2 * kQueries + 1) * k;
}

struct AttentionGradients {
  StridedRows grad;
  void *dq, *dk, *dv;
};

template <class T>
FASTGATE_INLINE void backward_tasks(
    const AttentionProblem& o, const AttentionGradients& g, Arena& arena, int64_t begin, int64_t end) {
  const Arena::Mark mark = arena.mark();
  for (int64_t index = begin; index < end; ++index) {
    const HeadTask t = head_task(o, index);
    arena.release(mark);
    const int64_t w = t.width_row, n = t.keys_row, keys16 = 16 * t.blocks;
    float *q = arena.take(t.queries * w), *grad = arena.take(t.queries * w), *dq = arena.take(t.queries * w);
    float *k = arena.take(keys16 * w), *v = arena.take(keys16 * w);
    float *dk = arena.take(t.keys * w), *dv = arena.take(t.keys * w);
    float *kt = arena.take(t.width16 * n), *vt = arena.take(t.width16 * n);
    float *p = arena.take(kQueries * n), *dp = arena.take(kQueries * n), *factors = arena.take(n);
    gather_head<T>(o, t, o.q, o.q_bias, t.q_row, t.queries, t.queries, o.scale, q);
    gather_head<T>(o, t, g.grad, nullptr, t.q_row, t.queries, t.queries, 1.0f, grad);
    gather_head<T>(o, t, o.k, nullptr, t.k_row, t.keys, keys16, 1.0f, k);
    gather_head<T>(o, t, o.v, o.v_bias, t.k_row, t.keys, keys16, 1.0f, v);
    for (int64_t key = 0; key < t.keys; key += 16) {
      transpose(k + key * w, w, t.width16, kt + key, n);
      transpose(v + key * w, w, t.width16, vt + key, n);
    }
    if (t.queries == 0) {
      std::fill(dk, dk + t.keys * w, 0.0f);
      std::fill(dv, dv + t.keys * w, 0.0f);
    }
    for (int64_t first = 0; first < t.queries; first += kQueries) {
      const int64_t rows = std::min(kQueries, t.queries - first);
      gemm(false, {q + first * w, w, 1}, kt, n, p, n, rows, keys16, o.width);
      gemm(false, {grad + first * w, w, 1}, vt, n, dp, n, rows, keys16, o.width);
      softmax(p, rows, n, t.keys, t.blocks);
      for (int64_t i = 0; i < rows; ++i) {
        float *row = p + i * n, *drow = dp + i * n;
        if (o.dropout.on) {
          draw_factors(o, t, first + i, factors);
          for_each(keys16, [&](int64_t j) { drow[j] *= factors[j]; });
        }
        const float along = sum(keys16, [&](int64_t j) { return row[j] * drow[j]; });
        for_each(keys16, [&](int64_t j) { drow[j] = row[j] * (drow[j] - along); });
        if (o.dropout.on) for_each(keys16, [&](int64_t j) { row[j] *= factors[j]; });
      }
      gemm(false, {dp, n, 1}, k, w, dq + first * w, w, rows, t.width16, t.keys);
      gemm(first > 0, {dp, 1, n}, q + first * w, w, dk, w, t.keys, t.width16, rows);
      gemm(first > 0, {p, 1, n}, grad + first * w, w, dv, w, t.keys, t.width16, rows);
    }
    scatter_head<T>(o, t, dq, t.q_row, t.queries, o.scale, g.dq);
    scatter_head<T>(o, t, dk, t.k_row, t.keys, 1.0f, g.dk);
    scatter_head<T>(o, t, dv, t.k_row, t.keys, 1.0f, g.dv);
  }
}

// A pair of functions for each element type, compiled for every clone.
#define FASTGATE_ATTENTION(NAME, T)                                                                       \
  FASTGATE_WIDE_CLONES void forward_##NAME(                                                               \
      const AttentionProblem& o, void* out, Arena& arena, int64_t begin, int64_t end) {                   \
    forward_tasks<T>(o, out, arena, begin, end);                                                          \
  }                                                                                                       \
  FASTGATE_WIDE_CLONES void backward_##NAME(                                                              \
      const AttentionProblem& o, const AttentionGradients& g, Arena& arena, int64_t begin, int64_t end) { \
    backward_tasks<T>(o, g, arena, begin, end);                                                           \
  }

FASTGATE_ATTENTION(f, float)
FASTGATE_ATTENTION(b, bf16)

// Holds what AttentionProblem points into.
struct PreparedAttention {
  AttentionProblem problem{};
  std::vector<Tensor> kept_alive;
  std::vector<int64_t> cu_q, cu_k;
  int64_t longest_q = 0, longest_k = 0;
  bool is_bf16 = false;
};

StridedRows strided_rows(std::vector<Tensor>& kept_alive, const Tensor& t) {
  kept_alive.push_back(t.stride(1) == 1 ? t : dense(t));
  return {kept_alive.back().data_ptr(), kept_alive.back().stride(0)};
}

const float* bias_of(PreparedAttention& p, const OptionalTensor& bias) {
  if (!bias) return nullptr;
  p.kept_alive.push_back(as_float(*bias));
  return static_cast<const float*>(p.kept_alive.back().data_ptr());
}

PreparedAttention prepare(FASTGATE_PARAMETERS(ATTENTION)) {
  const auto dtype = q.scalar_type();
  STD_TORCH_CHECK(
      (dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && k.scalar_type() == dtype &&
          v.scalar_type() == dtype,
      "attention: q, k, v: got other or unequal dtypes, wanted float32 or bfloat16; convert them first");
  STD_TORCH_CHECK(
      q.dim() == 2 && k.dim() == 2 && v.dim() == 2 && k.size(0) == v.size(0) && q.size(1) == k.size(1) &&
          k.size(1) == v.size(1) && heads > 0 && q.size(1) % heads == 0,
      "attention: q, k, v: got shapes that do not fit, wanted (queries, hidden), (keys, hidden), (keys, "
      "hidden) with hidden a "
      "multiple of heads; reshape them first");
  STD_TORCH_CHECK(
      cu_q.numel() == cu_k.numel(),
      "attention: cu_q, cu_k: got unequal lengths, wanted one end a sequence in each; pad with equal ends");
  PreparedAttention p;
  AttentionProblem& o = p.problem;
  o.sequences = cu_q.numel() - 1;
  o.hidden = q.size(1);
  o.heads = heads;
  o.width = o.hidden / heads;
  p.is_bf16 = dtype == ScalarType::BFloat16;
  p.kept_alive.reserve(8);
  o.q = strided_rows(p.kept_alive, q), o.k = strided_rows(p.kept_alive, k),
  o.v = strided_rows(p.kept_alive, v);
  p.cu_q = read_cu_seqlens("attention", "cu_q", cu_q, q.size(0));
  p.cu_k = read_cu_seqlens("attention", "cu_k", cu_k, k.size(0));
  o.cu_q = p.cu_q.data(), o.cu_k = p.cu_k.data();
  p.longest_q = longest_sequence(p.cu_q), p.longest_k = longest_sequence(p.cu_k);
  for (const OptionalTensor* bias : {&q_bias, &k_bias, &v_bias})
    STD_TORCH_CHECK(
        !*bias || ((*bias)->dim() == 1 && (*bias)->size(0) == o.hidden),
        "attention: q_bias, k_bias, v_bias: got another shape, wanted (", o.hidden,
        ",); pass one number a column of q");
  o.q_bias = bias_of(p, q_bias);
  o.v_bias = bias_of(p, v_bias);
  o.scale = static_cast<float>(scale);
  o.dropout = dropout_of("attention", dropout_p, seed);
  return p;
}

// Of one head of a sequence, in float operations: the products, and what moving a row's slice costs beside
// them.
double cost_of(const AttentionProblem& o, int64_t sequence) {
  const double queries = o.cu_q[sequence + 1] - o.cu_q[sequence],
               keys = o.cu_k[sequence + 1] - o.cu_k[sequence];
  return 4.0 * o.width * queries * keys + 50.0 * queries * keys + 20.0 * o.width * (queries + keys);
}

}  // namespace

Tensor attention(FASTGATE_PARAMETERS(ATTENTION)) {
  const PreparedAttention p = prepare(FASTGATE_ARGUMENTS(ATTENTION));
  Tensor out = empty_like(q, q.scalar_type());
  void* to = out.data_ptr();
  const AttentionProblem& o = p.problem;
  const bool by_amx = p.is_bf16 && amx_attention_fits(o);
  const int64_t size = (by_amx ? amx_arena_size : forward_arena_size)(p.longest_q, p.longest_k, o.width);
  const auto cost = [&](int64_t sequence) { return cost_of(o, sequence); };
  parallel_by_cost(o.sequences, heads, cost, [&](int64_t begin, int64_t end) {
    Arena arena(size);
    (by_amx ? amx_forward_tasks : p.is_bf16 ? forward_b : forward_f)(o, to, arena, begin, end);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad, FASTGATE_PARAMETERS(ATTENTION)) {
  PreparedAttention p = prepare(FASTGATE_ARGUMENTS(ATTENTION));
  STD_TORCH_CHECK(
      grad.scalar_type() == q.scalar_type() && has_sizes_of(grad, q),
      "attention_backward: grad: got another shape or dtype, wanted the output's; pass the gradient of the "
      "output");
  Tensor dq = empty_like(q, q.scalar_type()), dk = empty_like(k, k.scalar_type()),
         dv = empty_like(v, v.scalar_type());
  const AttentionGradients g{strided_rows(p.kept_alive, grad), dq.data_ptr(), dk.data_ptr(), dv.data_ptr()};
  const AttentionProblem& o = p.problem;
  const int64_t size = backward_arena_size(p.longest_q, p.longest_k, o.width);
  const auto cost = [&](int64_t sequence) { return 2.5 * cost_of(o, sequence); };
  parallel_by_cost(o.sequences, heads, cost, [&](int64_t begin, int64_t end) {
    Arena arena(size);
    (p.is_bf16 ? backward_b : backward_f)(o, g, arena, begin, end);
  });
  return {dq, dk, dv};
}

}  // namespace fastgate::cpu
