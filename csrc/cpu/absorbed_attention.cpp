// Absorbed attention on the CPU, forward and backward: the equations of fastgate/ops/reference/absorbed_attention.py.
//
// A unit of work is one head of one sequence, and heads of a sequence that come to one thread go together: their scores
// in one sweep over the sequence's rows, a softmax, and one sweep more for the mix. Backward makes the weights again.
// Its gradient of the rows takes all heads: a second round, over runs of rows. Whoever computes an element, and beside
// which others, it is the same sum: the same bits at every call and for every number of threads.
#include "dropout.h"
#include "sequences.h"
#include "softmax.h"
#include "tiles.h"

namespace fastgate::cpu {
namespace {

constexpr int64_t kRows = 64;   // rows of x at a time: they stay in the second-level cache
constexpr int64_t kParts = 16;  // runs of rows of a sequence, at most, for the gradient of the rows

// (sequences, heads, width) with adjacent channels.
struct ByHead {
  const void* at;
  int64_t sequence_step, head_step;
};

struct Problem {
  int64_t sequences, heads, width;  // width: of x's rows
  const int64_t* ends;
  ByHead probe;
  const void* x;
  float scale;
  Dropout dropout;
  bool direct;  // rows are float32 in whole vectors: products read them where they lie
};

struct AbsorbedGradients {
  ByHead grad;
  const float* grad_total;  // (sequences, heads); null: none
  void *dprobe, *dx;
  // P and scale * dS of the module's equations: of a sequence, (heads, rows) and (heads, rows) once more.
  float* weights;
};

// Rows as products take them.
struct Rows {
  const float* at;
  int64_t step;
};

// `count` rows: where they lie, or as float32 in `room`, padded with zeros to whole vectors.
template <class T>
FASTGATE_INLINE Rows rows_of(
    const Problem& o, const void* from, int64_t offset, int64_t step, int64_t count, float* room) {
  const T* first = static_cast<const T*>(from) + offset;
  if (o.direct) return {reinterpret_cast<const float*>(first), step};
  const int64_t width = o.width, apart = stride(width);
  for (int64_t i = 0; i < count; ++i) {
    float* to = room + i * apart;
    each(width, [&](int64_t j) { to[j] = load(first, i * step + j); });
    for (int64_t j = width; j < up(width, 16); ++j) to[j] = 0.0f;
  }
  return {room, apart};
}

template <class T>
FASTGATE_INLINE Rows heads_of(
    const Problem& o, const ByHead& from, int64_t sequence, int64_t head, int64_t count, float* room) {
  const int64_t offset = sequence * from.sequence_step + head * from.head_step;
  return rows_of<T>(o, from.at, offset, from.head_step, count, room);
}

template <class T>
FASTGATE_INLINE Rows x_of(const Problem& o, int64_t row, int64_t count, float* room) {
  return rows_of<T>(o, o.x, row * o.width, o.width, count, room);
}

// Where products leave `count` rows that belong at `row` of `to`; `put` brings them there.
FASTGATE_INLINE Rows target(const Problem& o, void* to, int64_t row, float* room) {
  return o.direct ? Rows{static_cast<float*>(to) + row * o.width, o.width} : Rows{room, stride(o.width)};
}

template <class T>
FASTGATE_INLINE void put(const Problem& o, const Rows& from, int64_t count, void* to, int64_t row) {
  if (o.direct) return;
  T* out = static_cast<T*>(to) + row * o.width;
  for (int64_t i = 0; i < count; ++i)
    each(o.width, [&](int64_t j) { store(out, i * o.width + j, from.at[i * from.step + j]); });
}

// One sequence's run of heads: its rows and the sizes of its buffers.
struct Run {
  int64_t sequence, head, heads, row, rows;
  int64_t blocks, apart;  // of a row of scores: 16 a block; distance between such rows
};

// The units from `begin` that belong to its sequence, and come before `end`.
Run run_of(const Problem& o, int64_t begin, int64_t end) {
  const int64_t sequence = begin / o.heads, head = begin % o.heads;
  const int64_t row = o.ends[sequence], rows = o.ends[sequence + 1] - row;
  return {sequence, head, std::min(o.heads - head, end - begin), row, rows, (rows + 15) / 16, stride(rows)};
}

// out (heads, rows) = left x^T, `left` a row for each of the run's heads.
template <class T>
FASTGATE_INLINE void against_rows(const Problem& o, const Run& r, const Rows& left, float* out, float* room) {
  for (int64_t first = 0; first < r.rows; first += kRows) {
    const int64_t count = std::min(kRows, r.rows - first);
    const Rows x = x_of<T>(o, r.row + first, count, room);
    multiply_rows(left.at, left.step, x.at, x.step, out + first, r.apart, r.heads, count, up(o.width, 16));
  }
}

// The run's heads of `to` = weights (heads, rows) x.
template <class T>
FASTGATE_INLINE void mix_rows(
    const Problem& o, const Run& r, const float* weights, void* to, float* room, float* mixed) {
  const int64_t place = r.sequence * o.heads + r.head;
  const Rows out = target(o, to, place, mixed);
  for (int64_t first = 0; first == 0 || first < r.rows; first += kRows) {
    const int64_t count = std::min(kRows, r.rows - first);
    const Rows x = x_of<T>(o, r.row + first, count, room);
    multiply(
        first > 0, {weights + first, r.apart, 1}, x.at, x.step, const_cast<float*>(out.at), out.step, r.heads,
        up(o.width, 16), count);
  }
  put<T>(o, out, r.heads, to, place);
}

// The run's probabilities into `scores`.
template <class T>
FASTGATE_INLINE void weigh(const Problem& o, const Run& r, float* scores, float* probes, float* room) {
  against_rows<T>(o, r, heads_of<T>(o, o.probe, r.sequence, r.head, r.heads, probes), scores, room);
  for (int64_t h = 0; h < r.heads; ++h) each(r.rows, [&](int64_t j) { scores[h * r.apart + j] *= o.scale; });
  softmax(scores, r.heads, r.apart, r.rows, r.blocks);
}

// Dropout factors of the run's head h; the counter row is sequence * heads + head.
FASTGATE_INLINE void draw(const Problem& o, const Run& r, int64_t h, float* factors) {
  keep_factors(o.dropout, r.sequence * o.heads + r.head + h, r.rows, factors);
}

int64_t longest_row(const Problem& o, int64_t longest) { return stride(longest) * o.heads; }

// Of rows of x, of a row for each head.
int64_t rows_size(const Problem& o) { return o.direct ? 0 : kRows * stride(o.width); }
int64_t heads_size(const Problem& o) { return o.direct ? 0 : o.heads * stride(o.width); }

struct Outputs {
  void* mixed;
  float* total;
};

template <class T>
FASTGATE_INLINE void forward_units(const Problem& o, const Outputs& out, int64_t longest, int64_t begin, int64_t end) {
  Scratch scratch(rows_size(o) + 2 * heads_size(o) + longest_row(o, longest) + stride(longest));
  float *room = scratch.take(rows_size(o)), *probes = scratch.take(heads_size(o)), *mixed = scratch.take(heads_size(o));
  float *scores = scratch.take(longest_row(o, longest)), *factors = scratch.take(stride(longest));
  for (int64_t unit = begin; unit < end;) {
    const Run r = run_of(o, unit, end);
    weigh<T>(o, r, scores, probes, room);
    for (int64_t h = 0; h < r.heads; ++h) {
      float* row = scores + h * r.apart;
      out.total[unit + h] = r.rows > 0 ? 1.0f : 0.0f;
      if (!o.dropout.on) continue;
      draw(o, r, h, factors);
      out.total[unit + h] = sum(r.rows, [&](int64_t j) { return row[j] *= factors[j]; });
    }
    mix_rows<T>(o, r, scores, out.mixed, room, mixed);
    unit += r.heads;
  }
}

// The weights P and scale * dS, and from the latter dprobe.
template <class T>
FASTGATE_INLINE void backward_units(
    const Problem& o, const AbsorbedGradients& g, int64_t longest, int64_t begin, int64_t end) {
  Scratch scratch(rows_size(o) + 2 * heads_size(o) + 2 * longest_row(o, longest) + stride(longest));
  float *room = scratch.take(rows_size(o)), *probes = scratch.take(heads_size(o)), *mixed = scratch.take(heads_size(o));
  float *scores = scratch.take(longest_row(o, longest)), *dscores = scratch.take(longest_row(o, longest));
  float* factors = scratch.take(stride(longest));
  for (int64_t unit = begin; unit < end;) {
    const Run r = run_of(o, unit, end);
    weigh<T>(o, r, scores, probes, room);
    against_rows<T>(o, r, heads_of<T>(o, g.grad, r.sequence, r.head, r.heads, probes), dscores, room);
    for (int64_t h = 0; h < r.heads; ++h) {
      float *p = scores + h * r.apart, *ds = dscores + h * r.apart;
      float* kept = g.weights + 2 * o.heads * r.row + (r.head + h) * r.rows;
      float* along_scores = kept + o.heads * r.rows;
      const float more = g.grad_total ? g.grad_total[unit + h] : 0.0f;
      if (o.dropout.on) {
        draw(o, r, h, factors);
        each(r.rows, [&](int64_t j) { kept[j] = p[j] * factors[j], ds[j] = factors[j] * (ds[j] + more); });
      } else {
        each(r.rows, [&](int64_t j) { kept[j] = p[j], ds[j] += more; });
      }
      const float along = sum(r.rows, [&](int64_t j) { return p[j] * ds[j]; });
      each(r.rows, [&](int64_t j) { along_scores[j] = ds[j] = o.scale * p[j] * (ds[j] - along); });
    }
    mix_rows<T>(o, r, dscores, g.dprobe, room, mixed);
    unit += r.heads;
  }
}

// dx of runs of rows, kParts to a sequence.
template <class T>
FASTGATE_INLINE void backward_rows(const Problem& o, const AbsorbedGradients& g, int64_t begin, int64_t end) {
  Scratch scratch(2 * heads_size(o) + rows_size(o));
  float *grads = scratch.take(heads_size(o)), *probes = scratch.take(heads_size(o)), *room = scratch.take(rows_size(o));
  for (int64_t part = begin; part < end;) {
    const int64_t sequence = part / kParts, until = std::min(end, (sequence + 1) * kParts);
    const int64_t row = o.ends[sequence], rows = o.ends[sequence + 1] - row;
    const int64_t from = part % kParts * rows / kParts, to = (until - sequence * kParts) * rows / kParts;
    part = until;
    if (from == to) continue;
    const Rows u = heads_of<T>(o, g.grad, sequence, 0, o.heads, grads);
    const Rows a = heads_of<T>(o, o.probe, sequence, 0, o.heads, probes);
    const float *kept = g.weights + 2 * o.heads * row, *along_scores = kept + o.heads * rows;
    for (int64_t first = from; first < to; first += kRows) {
      const int64_t count = std::min(kRows, to - first);
      const Rows out = target(o, g.dx, row + first, room);
      float* dx = const_cast<float*>(out.at);
      multiply(false, {kept + first, 1, rows}, u.at, u.step, dx, out.step, count, up(o.width, 16), o.heads);
      multiply(true, {along_scores + first, 1, rows}, a.at, a.step, dx, out.step, count, up(o.width, 16), o.heads);
      put<T>(o, out, count, g.dx, row + first);
    }
  }
}

#define FASTGATE_ABSORBED(NAME, T)                                                                                  \
  FASTGATE_WIDE_CLONES void forward_##NAME(                                                                         \
      const Problem& o, const Outputs& out, int64_t longest, int64_t begin, int64_t end) {                          \
    forward_units<T>(o, out, longest, begin, end);                                                                  \
  }                                                                                                                 \
  FASTGATE_WIDE_CLONES void backward_##NAME(                                                                        \
      const Problem& o, const AbsorbedGradients& g, int64_t longest, int64_t begin, int64_t end) {                  \
    backward_units<T>(o, g, longest, begin, end);                                                                   \
  }                                                                                                                 \
  FASTGATE_WIDE_CLONES void rows_##NAME(const Problem& o, const AbsorbedGradients& g, int64_t begin, int64_t end) { \
    backward_rows<T>(o, g, begin, end);                                                                             \
  }

FASTGATE_ABSORBED(f, float)
FASTGATE_ABSORBED(b, bf16)

// Holds what Problem points into.
struct PreparedAbsorbed {
  Problem problem{};
  std::vector<Tensor> kept_alive;
  std::vector<int64_t> ends;
  int64_t longest = 0;
  bool half = false;
};

ByHead by_head(std::vector<Tensor>& kept_alive, const Tensor& t) {
  const bool adjacent = t.stride(2) == 1 || t.size(2) == 1;
  kept_alive.push_back(adjacent ? t : dense(t));
  const Tensor& held = kept_alive.back();
  return {held.data_ptr(), held.stride(0), held.stride(1)};
}

PreparedAbsorbed prepare(
    const Tensor& probe, const Tensor& x, const Tensor& cu_seqlens, double scale, double dropout_p,
    const OptionalTensor& seed) {
  const auto dtype = x.scalar_type();
  STD_TORCH_CHECK(
      (dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && probe.scalar_type() == dtype,
      "absorbed_attention: probe, x: got other or unequal dtypes, wanted float32 or bfloat16; convert them first");
  STD_TORCH_CHECK(
      x.dim() == 2 && probe.dim() == 3 && probe.size(2) == x.size(1) && probe.size(0) + 1 == cu_seqlens.numel(),
      "absorbed_attention: probe, x: got shapes that do not fit, wanted (sequences, heads, H), (rows, H); reshape "
      "them first");
  PreparedAbsorbed p;
  p.kept_alive.reserve(4);
  Problem& o = p.problem;
  o.sequences = probe.size(0), o.heads = probe.size(1), o.width = x.size(1);
  p.ends = ends_of("absorbed_attention", "cu_seqlens", cu_seqlens, x.size(0));
  p.longest = longest_of(p.ends);
  o.ends = p.ends.data();
  p.kept_alive.push_back(dense(x));
  o.x = p.kept_alive.back().data_ptr();
  o.probe = by_head(p.kept_alive, probe);
  o.scale = static_cast<float>(scale);
  o.dropout = dropout_of("absorbed_attention", dropout_p, seed);
  p.half = dtype == ScalarType::BFloat16;
  o.direct = !p.half && o.width % 16 == 0;
  return p;
}

// Of one head of a sequence, in float operations.
double cost_of(const Problem& o, int64_t sequence) {
  return (o.ends[sequence + 1] - o.ends[sequence]) * (4.0 * o.width + 50.0) + o.width;
}

}  // namespace

std::tuple<Tensor, Tensor> absorbed_attention(FASTGATE_ABSORBED_ATTENTION_OPERANDS) {
  const PreparedAbsorbed p = prepare(probe, x, cu_seqlens, scale, dropout_p, seed);
  const Problem& o = p.problem;
  Tensor mixed = empty_like(probe, x.scalar_type());
  Tensor total = empty(probe.sizes().data(), 2, ScalarType::Float, x);
  const Outputs out{mixed.data_ptr(), static_cast<float*>(total.data_ptr())};
  const auto cost = [&](int64_t sequence) { return cost_of(o, sequence); };
  share_out(o.sequences, o.heads, cost, [&](int64_t begin, int64_t end) {
    (p.half ? forward_b : forward_f)(o, out, p.longest, begin, end);
  });
  return {mixed, total};
}

std::tuple<Tensor, Tensor> absorbed_attention_backward(
    Tensor grad, OptionalTensor grad_total, FASTGATE_ABSORBED_ATTENTION_OPERANDS) {
  PreparedAbsorbed p = prepare(probe, x, cu_seqlens, scale, dropout_p, seed);
  const Problem& o = p.problem;
  STD_TORCH_CHECK(
      grad.scalar_type() == x.scalar_type() && has_sizes_of(grad, probe) &&
          (!grad_total || grad_total->numel() == o.sequences * o.heads),
      "absorbed_attention_backward: grads: got another shape or dtype, wanted the outputs'; pass the gradients of "
      "the outputs");
  Tensor dprobe = empty_like(probe, x.scalar_type()), dx = empty_like(x, x.scalar_type());
  const std::unique_ptr<float[]> weights(new float[2 * o.heads * x.size(0)]);
  AbsorbedGradients g{by_head(p.kept_alive, grad), nullptr, dprobe.data_ptr(), dx.data_ptr(), weights.get()};
  if (grad_total) g.grad_total = static_cast<const float*>(p.kept_alive.emplace_back(as_float(*grad_total)).data_ptr());
  const auto cost = [&](int64_t sequence) { return 1.5 * cost_of(o, sequence); };
  share_out(o.sequences, o.heads, cost, [&](int64_t begin, int64_t end) {
    (p.half ? backward_b : backward_f)(o, g, p.longest, begin, end);
  });
  const auto cost_of_rows = [&](int64_t sequence) { return o.heads * cost_of(o, sequence) / kParts; };
  share_out(o.sequences, kParts, cost_of_rows, [&](int64_t begin, int64_t end) {
    (p.half ? rows_b : rows_f)(o, g, begin, end);
  });
  return {dprobe, dx};
}

}  // namespace fastgate::cpu
