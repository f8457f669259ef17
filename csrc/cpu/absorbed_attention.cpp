// Absorbed attention on the CPU, forward and backward: the equations of
// fastgate/ops/reference/absorbed_attention.py.
//
// A unit of work is one head of one sequence, and heads of a sequence that come to one thread go together:
// their scores in one sweep over the sequence's rows, a softmax, and one sweep more for the mix. Backward
// makes the weights again. Its gradient of the rows takes all heads: a second round, over runs of rows.
// Whoever computes an element, and beside which others, it is the same sum: the same bits at every call and
// for every number of threads.
#include "cpu/arena.h"
#include "cpu/cu_seqlens.h"
#include "cpu/dropout.h"
#include "cpu/gemm/fp32_gemm.h"
#include "cpu/softmax.h"

namespace fastgate::cpu {
namespace {

constexpr int64_t kRows = 64;   // rows of x at a time: they stay in the second-level cache
constexpr int64_t kParts = 16;  // runs of rows of a sequence, at most, for the gradient of the rows

// (sequences, heads, width) with adjacent channels.
struct HeadRows {
  const void* at;
  int64_t sequence_step, head_step;
};

struct AbsorbedProblem {
  int64_t sequences, heads, width;  // width: of x's rows
  const int64_t* ends;
  HeadRows probe;
  const void* x;
  float scale;
  Dropout dropout;
  bool direct;  // rows are float32 in whole vectors: gemm reads them where they lie
};

struct AbsorbedGradients {
  HeadRows grad;
  const float* grad_total;  // (sequences, heads); null: none
  void *dprobe, *dx;
  // P and scale * dS of the module's equations: of a sequence, (heads, rows) and (heads, rows) once more.
  float* weights;
};

// Float32 rows that gemm reads, `step` apart.
struct FloatRows {
  const float* at;
  int64_t step;
};

// `count` rows: where they lie, or as float32 in `buffer`, padded with zeros to whole vectors.
template <class T>
FASTGATE_INLINE FloatRows rows_of(
    const AbsorbedProblem& o, const void* from, int64_t offset, int64_t step, int64_t count, float* buffer) {
  const T* first = static_cast<const T*>(from) + offset;
  if (o.direct) return {reinterpret_cast<const float*>(first), step};
  const int64_t width = o.width, apart = row_stride(width);
  for (int64_t i = 0; i < count; ++i) {
    float* to = buffer + i * apart;
    for_each(width, [&](int64_t j) { to[j] = load(first, i * step + j); });
    for (int64_t j = width; j < round_up(width, 16); ++j) to[j] = 0.0f;
  }
  return {buffer, apart};
}

template <class T>
FASTGATE_INLINE FloatRows heads_of(
    const AbsorbedProblem& o, const HeadRows& from, int64_t sequence, int64_t head, int64_t count,
    float* buffer) {
  const int64_t offset = sequence * from.sequence_step + head * from.head_step;
  return rows_of<T>(o, from.at, offset, from.head_step, count, buffer);
}

template <class T>
FASTGATE_INLINE FloatRows x_of(const AbsorbedProblem& o, int64_t row, int64_t count, float* buffer) {
  return rows_of<T>(o, o.x, row * o.width, o.width, count, buffer);
}

// Where gemm leaves rows that belong at `row` of `to`; `write_back` brings them there.
FASTGATE_INLINE FloatRows gemm_target(const AbsorbedProblem& o, void* to, int64_t row, float* buffer) {
  return o.direct ? FloatRows{static_cast<float*>(to) + row * o.width, o.width}
                  : FloatRows{buffer, row_stride(o.width)};
}

template <class T>
FASTGATE_INLINE void write_back(
    const AbsorbedProblem& o, const FloatRows& from, int64_t count, void* to, int64_t row) {
  if (o.direct) return;
  T* out = static_cast<T*>(to) + row * o.width;
  for (int64_t i = 0; i < count; ++i)
    for_each(o.width, [&](int64_t j) { store(out, i * o.width + j, from.at[i * from.step + j]); });
}

// Heads of one sequence that are computed together: their rows and the sizes of their buffers.
struct HeadGroup {
  int64_t sequence, head, heads, row, rows;
  int64_t blocks, apart;  // of a row of scores: 16 a block; distance between such rows
};

// The units from `begin` that belong to its sequence, and come before `end`.
HeadGroup head_group(const AbsorbedProblem& o, int64_t begin, int64_t end) {
  const int64_t sequence = begin / o.heads, head = begin % o.heads;
  const int64_t row = o.ends[sequence], rows = o.ends[sequence + 1] - row;
  return {sequence,        head, std::min(o.heads - head, end - begin), row, rows, (rows + 15) / 16,
          row_stride(rows)};
}

// out (heads, rows) = left x^T, `left` a row for each of the group's heads.
template <class T>
FASTGATE_INLINE void scores_against_rows(
    const AbsorbedProblem& o, const HeadGroup& r, const FloatRows& left, float* out, float* buffer) {
  for (int64_t first = 0; first < r.rows; first += kRows) {
    const int64_t count = std::min(kRows, r.rows - first);
    const FloatRows x = x_of<T>(o, r.row + first, count, buffer);
    gemm_nt(left.at, left.step, x.at, x.step, out + first, r.apart, r.heads, count, round_up(o.width, 16));
  }
}

// The group's heads of `to` = weights (heads, rows) x.
template <class T>
FASTGATE_INLINE void mix_rows(
    const AbsorbedProblem& o, const HeadGroup& r, const float* weights, void* to, float* buffer,
    float* mixed) {
  const int64_t place = r.sequence * o.heads + r.head;
  const FloatRows out = gemm_target(o, to, place, mixed);
  for (int64_t first = 0; first == 0 || first < r.rows; first += kRows) {
    const int64_t count = std::min(kRows, r.rows - first);
    const FloatRows x = x_of<T>(o, r.row + first, count, buffer);
    gemm(
        first > 0, {weights + first, r.apart, 1}, x.at, x.step, const_cast<float*>(out.at), out.step, r.heads,
        round_up(o.width, 16), count);
  }
  write_back<T>(o, out, r.heads, to, place);
}

// The group's probabilities into `scores`.
template <class T>
FASTGATE_INLINE void weigh(
    const AbsorbedProblem& o, const HeadGroup& r, float* scores, float* probes, float* buffer) {
  scores_against_rows<T>(o, r, heads_of<T>(o, o.probe, r.sequence, r.head, r.heads, probes), scores, buffer);
  for (int64_t h = 0; h < r.heads; ++h)
    for_each(r.rows, [&](int64_t j) { scores[h * r.apart + j] *= o.scale; });
  softmax(scores, r.heads, r.apart, r.rows, r.blocks);
}

// Dropout factors of the group's head h; the counter row is sequence * heads + head.
FASTGATE_INLINE void draw_factors(const AbsorbedProblem& o, const HeadGroup& r, int64_t h, float* factors) {
  keep_factors(o.dropout, r.sequence * o.heads + r.head + h, r.rows, factors);
}

int64_t longest_row(const AbsorbedProblem& o, int64_t longest) { return row_stride(longest) * o.heads; }

// Of rows of x, of a row for each head.
int64_t rows_size(const AbsorbedProblem& o) { return o.direct ? 0 : kRows * row_stride(o.width); }
int64_t heads_size(const AbsorbedProblem& o) { return o.direct ? 0 : o.heads * row_stride(o.width); }

struct AbsorbedOutputs {
  void* mixed;
  float* total;
};

template <class T>
FASTGATE_INLINE void forward_units(
    const AbsorbedProblem& o, const AbsorbedOutputs& out, int64_t longest, int64_t begin, int64_t end) {
  Arena arena(rows_size(o) + 2 * heads_size(o) + longest_row(o, longest) + row_stride(longest));
  float *buffer = arena.take(rows_size(o)), *probes = arena.take(heads_size(o)),
        *mixed = arena.take(heads_size(o));
  float *scores = arena.take(longest_row(o, longest)), *factors = arena.take(row_stride(longest));
  for (int64_t unit = begin; unit < end;) {
    const HeadGroup r = head_group(o, unit, end);
    weigh<T>(o, r, scores, probes, buffer);
    for (int64_t h = 0; h < r.heads; ++h) {
      float* row = scores + h * r.apart;
      out.total[unit + h] = r.rows > 0 ? 1.0f : 0.0f;
      if (!o.dropout.on) continue;
      draw_factors(o, r, h, factors);
      out.total[unit + h] = sum(r.rows, [&](int64_t j) { return row[j] *= factors[j]; });
    }
    mix_rows<T>(o, r, scores, out.mixed, buffer, mixed);
    unit += r.heads;
  }
}

// The weights P and scale * dS, and from the latter dprobe.
template <class T>
FASTGATE_INLINE void backward_units(
    const AbsorbedProblem& o, const AbsorbedGradients& g, int64_t longest, int64_t begin, int64_t end) {
  Arena arena(rows_size(o) + 2 * heads_size(o) + 2 * longest_row(o, longest) + row_stride(longest));
  float *buffer = arena.take(rows_size(o)), *probes = arena.take(heads_size(o)),
        *mixed = arena.take(heads_size(o));
  float *scores = arena.take(longest_row(o, longest)), *dscores = arena.take(longest_row(o, longest));
  float* factors = arena.take(row_stride(longest));
  for (int64_t unit = begin; unit < end;) {
    const HeadGroup r = head_group(o, unit, end);
    weigh<T>(o, r, scores, probes, buffer);
    scores_against_rows<T>(
        o, r, heads_of<T>(o, g.grad, r.sequence, r.head, r.heads, probes), dscores, buffer);
    for (int64_t h = 0; h < r.heads; ++h) {
      float *p = scores + h * r.apart, *ds = dscores + h * r.apart;
      float* probabilities = g.weights + 2 * o.heads * r.row + (r.head + h) * r.rows;
      float* dscores_out = probabilities + o.heads * r.rows;
      const float more = g.grad_total ? g.grad_total[unit + h] : 0.0f;
      if (o.dropout.on) {
        draw_factors(o, r, h, factors);
        for_each(r.rows, [&](int64_t j) {
          probabilities[j] = p[j] * factors[j], ds[j] = factors[j] * (ds[j] + more);
        });
      } else {
        for_each(r.rows, [&](int64_t j) { probabilities[j] = p[j], ds[j] += more; });
      }
      const float along = sum(r.rows, [&](int64_t j) { return p[j] * ds[j]; });
      for_each(r.rows, [&](int64_t j) { dscores_out[j] = ds[j] = o.scale * p[j] * (ds[j] - along); });
    }
    mix_rows<T>(o, r, dscores, g.dprobe, buffer, mixed);
    unit += r.heads;
  }
}

// dx of runs of rows, kParts to a sequence.
template <class T>
FASTGATE_INLINE void backward_rows(
    const AbsorbedProblem& o, const AbsorbedGradients& g, int64_t begin, int64_t end) {
  Arena arena(2 * heads_size(o) + rows_size(o));
  float *grads = arena.take(heads_size(o)), *probes = arena.take(heads_size(o)),
        *buffer = arena.take(rows_size(o));
  for (int64_t part = begin; part < end;) {
    const int64_t sequence = part / kParts, until = std::min(end, (sequence + 1) * kParts);
    const int64_t row = o.ends[sequence], rows = o.ends[sequence + 1] - row;
    const int64_t from = part % kParts * rows / kParts, to = (until - sequence * kParts) * rows / kParts;
    part = until;
    if (from == to) continue;
    const FloatRows u = heads_of<T>(o, g.grad, sequence, 0, o.heads, grads);
    const FloatRows a = heads_of<T>(o, o.probe, sequence, 0, o.heads, probes);
    const float *probabilities = g.weights + 2 * o.heads * row, *dscores_out = probabilities + o.heads * rows;
    for (int64_t first = from; first < to; first += kRows) {
      const int64_t count = std::min(kRows, to - first);
      const FloatRows out = gemm_target(o, g.dx, row + first, buffer);
      float* dx = const_cast<float*>(out.at);
      gemm(
          false, {probabilities + first, 1, rows}, u.at, u.step, dx, out.step, count, round_up(o.width, 16),
          o.heads);
      gemm(
          true, {dscores_out + first, 1, rows}, a.at, a.step, dx, out.step, count, round_up(o.width, 16),
          o.heads);
      write_back<T>(o, out, count, g.dx, row + first);
    }
  }
}

#define FASTGATE_ABSORBED(NAME, T)                                                                         \
  FASTGATE_WIDE_CLONES void forward_##NAME(                                                                \
      const AbsorbedProblem& o, const AbsorbedOutputs& out, int64_t longest, int64_t begin, int64_t end) { \
    forward_units<T>(o, out, longest, begin, end);                                                         \
  }                                                                                                        \
  FASTGATE_WIDE_CLONES void backward_##NAME(                                                               \
      const AbsorbedProblem& o, const AbsorbedGradients& g, int64_t longest, int64_t begin, int64_t end) { \
    backward_units<T>(o, g, longest, begin, end);                                                          \
  }                                                                                                        \
  FASTGATE_WIDE_CLONES void rows_##NAME(                                                                   \
      const AbsorbedProblem& o, const AbsorbedGradients& g, int64_t begin, int64_t end) {                  \
    backward_rows<T>(o, g, begin, end);                                                                    \
  }

FASTGATE_ABSORBED(f, float)
FASTGATE_ABSORBED(b, bf16)

// Holds what AbsorbedProblem points into.
struct PreparedAbsorbed {
  AbsorbedProblem problem{};
  std::vector<Tensor> kept_alive;
  std::vector<int64_t> ends;
  int64_t longest = 0;
  bool is_bf16 = false;
};

HeadRows head_rows(std::vector<Tensor>& kept_alive, const Tensor& t) {
  const bool adjacent = t.stride(2) == 1 || t.size(2) == 1;
  kept_alive.push_back(adjacent ? t : dense(t));
  const Tensor& held = kept_alive.back();
  return {held.data_ptr(), held.stride(0), held.stride(1)};
}

PreparedAbsorbed prepare(FASTGATE_PARAMETERS(ABSORBED_ATTENTION)) {
  const auto dtype = x.scalar_type();
  STD_TORCH_CHECK(
      (dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && probe.scalar_type() == dtype,
      "absorbed_attention: probe, x: got other or unequal dtypes, wanted float32 or bfloat16; convert them "
      "first");
  STD_TORCH_CHECK(
      x.dim() == 2 && probe.dim() == 3 && probe.size(2) == x.size(1) &&
          probe.size(0) + 1 == cu_seqlens.numel(),
      "absorbed_attention: probe, x: got shapes that do not fit, wanted (sequences, heads, H), (rows, H); "
      "reshape "
      "them first");
  PreparedAbsorbed p;
  p.kept_alive.reserve(4);
  AbsorbedProblem& o = p.problem;
  o.sequences = probe.size(0), o.heads = probe.size(1), o.width = x.size(1);
  p.ends = read_cu_seqlens("absorbed_attention", "cu_seqlens", cu_seqlens, x.size(0));
  p.longest = longest_sequence(p.ends);
  o.ends = p.ends.data();
  p.kept_alive.push_back(dense(x));
  o.x = p.kept_alive.back().data_ptr();
  o.probe = head_rows(p.kept_alive, probe);
  o.scale = static_cast<float>(scale);
  o.dropout = dropout_of("absorbed_attention", dropout_p, seed);
  p.is_bf16 = dtype == ScalarType::BFloat16;
  o.direct = !p.is_bf16 && o.width % 16 == 0;
  return p;
}

// Of one head of a sequence, in float operations.
double cost_of(const AbsorbedProblem& o, int64_t sequence) {
  return (o.ends[sequence + 1] - o.ends[sequence]) * (4.0 * o.width + 50.0) + o.width;
}

}  // namespace

std::tuple<Tensor, Tensor> absorbed_attention(FASTGATE_PARAMETERS(ABSORBED_ATTENTION)) {
  const PreparedAbsorbed p = prepare(FASTGATE_ARGUMENTS(ABSORBED_ATTENTION));
  const AbsorbedProblem& o = p.problem;
  Tensor mixed = empty_like(probe, x.scalar_type());
  Tensor total = empty(probe.sizes().data(), 2, ScalarType::Float, x);
  const AbsorbedOutputs out{mixed.data_ptr(), static_cast<float*>(total.data_ptr())};
  const auto cost = [&](int64_t sequence) { return cost_of(o, sequence); };
  parallel_by_cost(o.sequences, o.heads, cost, [&](int64_t begin, int64_t end) {
    (p.is_bf16 ? forward_b : forward_f)(o, out, p.longest, begin, end);
  });
  return {mixed, total};
}

std::tuple<Tensor, Tensor> absorbed_attention_backward(
    Tensor grad_mixed, OptionalTensor grad_total, FASTGATE_PARAMETERS(ABSORBED_ATTENTION)) {
  PreparedAbsorbed p = prepare(FASTGATE_ARGUMENTS(ABSORBED_ATTENTION));
  const AbsorbedProblem& o = p.problem;
  STD_TORCH_CHECK(
      grad_mixed.scalar_type() == x.scalar_type() && has_sizes_of(grad_mixed, probe) &&
          (!grad_total || grad_total->numel() == o.sequences * o.heads),
      "absorbed_attention_backward: grad_mixed, grad_total: got another shape or dtype, wanted the outputs'; "
      "pass the gradients of "
      "the outputs");
  Tensor dprobe = empty_like(probe, x.scalar_type()), dx = empty_like(x, x.scalar_type());
  const std::unique_ptr<float[]> weights(new float[2 * o.heads * x.size(0)]);
  AbsorbedGradients g{
      head_rows(p.kept_alive, grad_mixed), nullptr, dprobe.data_ptr(), dx.data_ptr(), weights.get()};
  if (grad_total)
    g.grad_total = static_cast<const float*>(p.kept_alive.emplace_back(as_float(*grad_total)).data_ptr());
  const auto cost = [&](int64_t sequence) { return 1.5 * cost_of(o, sequence); };
  parallel_by_cost(o.sequences, o.heads, cost, [&](int64_t begin, int64_t end) {
    (p.is_bf16 ? backward_b : backward_f)(o, g, p.longest, begin, end);
  });
  const auto cost_of_rows = [&](int64_t sequence) { return o.heads * cost_of(o, sequence) / kParts; };
  parallel_by_cost(o.sequences, kParts, cost_of_rows, [&](int64_t begin, int64_t end) {
    (p.is_bf16 ? rows_b : rows_f)(o, g, begin, end);
  });
  return {dprobe, dx};
}

}  // namespace fastgate::cpu
