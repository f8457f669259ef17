// embed_norm on the CPU, forward and backward: the equations of fastgate/ops/reference/embed_norm.py, one row
// at a time.
//
// A row is gathered from the three tables into float32, normed inside the first-level cache, and written
// once. Backward gathers again. It leaves du of every row, and sums the vectors' gradients over fixed blocks
// of rows; then the rows of du that have an id are summed in order by whoever owns that id's row of the
// table: no atomics, the same bits at every call and for every number of threads.
#include <memory>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/cu_seqlens.h"
#include "cpu/dropout.h"
#include "cpu/norm.h"
#include "gradient_bits.h"

namespace fastgate::cpu {
namespace {

namespace grads = embed_norm_gradients;

constexpr int64_t kForwardElements = 32768;  // per thread at least: less is not worth waking one
constexpr int64_t kFlush = 32;               // rows summed before their sum joins the others'
constexpr int64_t kBlocks = 64;              // row blocks at most, each with its own sums
constexpr int64_t kParts = 64;               // of a table's gradient
constexpr int kTables = 3;

struct EmbedProblem {
  int64_t rows, hidden;
  const int64_t* ids[kTables];  // of words, positions and types; types' null: type 0
  const void* tables[kTables];
  const float *weight, *norm_bias;
  const float *weight2, *norm_bias2;  // null: one norm
  float eps, eps2;
  Dropout dropout;
};

template <class T>
FASTGATE_INLINE const T* row_of(const EmbedProblem& o, int table, int64_t row) {
  const int64_t id = o.ids[table] ? o.ids[table][row] : 0;
  return static_cast<const T*>(o.tables[table]) + id * o.hidden;
}

// u of one row, and its statistics.
template <class T>
FASTGATE_INLINE Norm embed_row(const EmbedProblem& o, int64_t row, float* u) {
  const T *word = row_of<T>(o, 0, row), *position = row_of<T>(o, 1, row), *type = row_of<T>(o, 2, row);
  const float total =
      sum(o.hidden, [&](int64_t j) { return u[j] = load(word, j) + load(position, j) + load(type, j); });
  return statistics(u, o.hidden, total, o.eps);
}

// dropout(norm(u)) into v, and the statistics of the second norm, if there is one. `keep` holds the row's
// factors.
FASTGATE_INLINE Norm between(const EmbedProblem& o, const float* u, Norm one, const float* keep, float* v) {
  const float *weight = o.weight, *norm_bias = o.norm_bias;
  const auto normed = [&](int64_t j) { return (u[j] - one.mean) * one.rstd * weight[j] + norm_bias[j]; };
  const float total = o.dropout.on ? sum(o.hidden, [&](int64_t j) { return v[j] = keep[j] * normed(j); })
                                   : sum(o.hidden, [&](int64_t j) { return v[j] = normed(j); });
  return o.weight2 ? statistics(v, o.hidden, total, o.eps2) : Norm{};
}

template <class T>
FASTGATE_INLINE void forward_rows(
    const EmbedProblem& o, void* out, float* scratch, int64_t begin, int64_t end) {
  const int64_t n = o.hidden;
  float *u = scratch, *keep = u + padded(n);
  const float *weight2 = o.weight2, *norm_bias2 = o.norm_bias2;
  for (int64_t row = begin; row < end; ++row) {
    T* y = static_cast<T*>(out) + row * n;
    if (o.dropout.on) keep_factors(o.dropout, row, n, keep);
    const Norm two = between(o, u, embed_row<T>(o, row, u), keep, u);
    if (weight2)
      for_each(n, [&](int64_t j) { store(y, j, (u[j] - two.mean) * two.rstd * weight2[j] + norm_bias2[j]); });
    else
      for_each(n, [&](int64_t j) { store(y, j, u[j]); });
  }
}

// du of the rows, and the sums of the vectors' gradients (weight, norm_bias, weight2, norm_bias2) into
// `block`.
template <class T>
FASTGATE_INLINE void backward_rows(
    const EmbedProblem& o, const void* grad, float* du, float* scratch, int64_t begin, int64_t end,
    float* block) {
  const int64_t n = o.hidden;
  float *u = scratch, *t = u + padded(n), *v = t + padded(n), *keep = v + padded(n), *sums = keep + padded(n);
  float *dweight = sums, *dnorm_bias = dweight + n, *dweight2 = dnorm_bias + n, *dnorm_bias2 = dweight2 + n;
  for (int64_t start = begin; start < end; start += kFlush) {
    const int64_t stop = std::min(end, start + kFlush);
    std::fill(sums, sums + grads::kParameters * n, 0.0f);
    for (int64_t row = start; row < stop; ++row) {
      const T* dy = static_cast<const T*>(grad) + row * n;
      if (o.dropout.on) keep_factors(o.dropout, row, n, keep);
      const Norm one = embed_row<T>(o, row, u);
      if (o.weight2) {
        const Norm two = between(o, u, one, keep, v);
        const Means means = norm_backward(n, dy, o.weight2, two, v, t, dweight2, dnorm_bias2);
        for_each(n, [&](int64_t j) { t[j] = through_norm(two, means, v[j], t[j]); });
      } else {
        for_each(n, [&](int64_t j) { t[j] = load(dy, j); });
      }
      if (o.dropout.on) for_each(n, [&](int64_t j) { t[j] *= keep[j]; });
      const Means means = norm_backward(n, t, o.weight, one, u, t, dweight, dnorm_bias);
      float* out = du + row * n;
      for_each(n, [&](int64_t j) { out[j] = through_norm(one, means, u[j], t[j]); });
    }
    for_each(grads::kParameters * n, [&](int64_t j) { block[j] += sums[j]; });
  }
}

// A table's gradient, and the rows that each of its ids has: order[starts[id]] to order[starts[id + 1] - 1],
// rising.
struct TableScatter {
  void* gradient;
  int64_t number, padding;
  std::vector<int32_t> starts, order;
};

// Ids `first` to `last` of a table's gradient, which was zeros, columns `begin` to `end`.
template <class T>
FASTGATE_INLINE void scatter_ids(
    const EmbedProblem& o, const TableScatter& s, const float* du, float* scratch, int64_t first,
    int64_t last, int64_t begin, int64_t end) {
  const int64_t n = end - begin;
  float *sums = scratch, *part = sums + padded(n);
  for (int64_t id = first; id < last; ++id) {
    T* out = static_cast<T*>(s.gradient) + id * o.hidden + begin;
    const int64_t stop = s.starts[id + 1];
    int64_t at = s.starts[id];
    if (at == stop || id == s.padding) continue;
    const auto row = [&](int64_t place) { return du + s.order[place] * o.hidden + begin; };
    for (bool joined = false; at < stop; joined = true) {
      const int64_t flush = std::min(stop, at + kFlush);
      std::memcpy(part, row(at++), n * sizeof(float));
      for (; at < flush; ++at) {
        const float* more = row(at);
        for_each(n, [&](int64_t j) { part[j] += more[j]; });
      }
      if (joined)
        for_each(n, [&](int64_t j) { sums[j] += part[j]; });
      else
        std::swap(sums, part);
    }
    for_each(n, [&](int64_t j) { store(out, j, sums[j]); });
  }
}

#define FASTGATE_EMBED(NAME, T)                                                                       \
  FASTGATE_CLONES void forward_##NAME(                                                                \
      const EmbedProblem& o, void* y, float* scratch, int64_t begin, int64_t end) {                   \
    forward_rows<T>(o, y, scratch, begin, end);                                                       \
  }                                                                                                   \
  FASTGATE_CLONES void backward_##NAME(                                                               \
      const EmbedProblem& o, const void* grad, float* du, float* scratch, int64_t begin, int64_t end, \
      float* block) {                                                                                 \
    backward_rows<T>(o, grad, du, scratch, begin, end, block);                                        \
  }                                                                                                   \
  FASTGATE_CLONES void scatter_##NAME(                                                                \
      const EmbedProblem& o, const TableScatter& s, const float* du, float* scratch, int64_t first,   \
      int64_t last, int64_t begin, int64_t end) {                                                     \
    scatter_ids<T>(o, s, du, scratch, first, last, begin, end);                                       \
  }

FASTGATE_EMBED(f, float)
FASTGATE_EMBED(b, bf16)

// Holds what EmbedProblem points into.
struct PreparedEmbedding {
  EmbedProblem problem{};
  std::vector<Tensor> kept_alive;
  std::vector<int64_t> ids[kTables];
  int64_t numbers[kTables] = {};
  bool is_bf16 = false;
};

const float* floats(PreparedEmbedding& p, const Tensor& t) {
  STD_TORCH_CHECK(
      t.numel() == p.problem.hidden, "embed_norm: vectors: got ", t.numel(), " elements, wanted ",
      p.problem.hidden, "; match the tables' width");
  p.kept_alive.push_back(as_float(t));
  return static_cast<const float*>(p.kept_alive.back().data_ptr());
}

// The ids, found inside their table: nothing is read before they are.
void take_ids(PreparedEmbedding& p, int table, const Tensor& given) {
  const Tensor held = dense(given);
  const bool wide = held.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(
      (wide || held.scalar_type() == ScalarType::Int) && held.numel() == p.problem.rows,
      "embed_norm: ids: got another dtype or number, wanted int64 or int32, one a row; convert them");
  std::vector<int64_t>& ids = p.ids[table];
  ids.resize(p.problem.rows);
  bool inside = true;
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = wide ? static_cast<const int64_t*>(held.data_ptr())[i]
                  : static_cast<const int32_t*>(held.data_ptr())[i];
    inside = inside && ids[i] >= 0 && ids[i] < p.numbers[table];
  }
  STD_TORCH_CHECK(
      inside, "embed_norm: ids: got one outside its table, wanted 0 to ", p.numbers[table] - 1,
      "; look them up");
  p.problem.ids[table] = ids.data();
}

PreparedEmbedding prepare(FASTGATE_PARAMETERS(EMBED_NORM)) {
  (void)padding_idx, (void)position_padding_idx;
  PreparedEmbedding p;
  EmbedProblem& o = p.problem;
  p.kept_alive.reserve(8);
  const auto dtype = word_table.scalar_type();
  o.rows = words.numel();
  o.hidden = word_table.dim() == 2 ? word_table.size(1) : 0;
  const Tensor* tables[kTables] = {&word_table, &position_table, &type_table};
  for (int table = 0; table < kTables; ++table) {
    const Tensor& t = *tables[table];
    STD_TORCH_CHECK(
        (dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && t.scalar_type() == dtype &&
            t.dim() == 2 && t.size(1) == o.hidden && t.size(0) > 0,
        "embed_norm: tables: got other dtypes or shapes, wanted (number, H) thrice, float32 or bfloat16; "
        "convert them first");
    p.kept_alive.push_back(dense(t));
    o.tables[table] = p.kept_alive.back().data_ptr();
    p.numbers[table] = t.size(0);
  }
  take_ids(p, 0, words);
  take_ids(p, 1, positions);
  if (types) take_ids(p, 2, *types);
  o.weight = floats(p, weight), o.norm_bias = floats(p, norm_bias);
  STD_TORCH_CHECK(
      weight2.has_value() == norm_bias2.has_value(),
      "embed_norm: weight2, norm_bias2: got one of them, wanted both or neither; pass the other too");
  if (weight2) o.weight2 = floats(p, *weight2), o.norm_bias2 = floats(p, *norm_bias2);
  o.eps = static_cast<float>(eps), o.eps2 = static_cast<float>(eps2);
  o.dropout = dropout_of("embed_norm", dropout_p, seed);
  p.is_bf16 = dtype == ScalarType::BFloat16;
  return p;
}

TableScatter scatter_of(const PreparedEmbedding& p, int table, Tensor& gradient, int64_t padding) {
  const int64_t rows = p.problem.rows, *ids = p.problem.ids[table];
  TableScatter s{gradient.data_ptr(), p.numbers[table], padding, {}, std::vector<int32_t>(rows)};
  s.starts.assign(
      s.number + 2, 0);  // first one place late: filling in the order moves each start to the next one's
  for (int64_t row = 0; row < rows; ++row) ++s.starts[(ids ? ids[row] : 0) + 2];
  for (int64_t id = 2; id < s.number + 2; ++id) s.starts[id] += s.starts[id - 1];
  for (int64_t row = 0; row < rows; ++row)
    s.order[s.starts[(ids ? ids[row] : 0) + 1]++] = static_cast<int32_t>(row);
  return s;
}

// A table of few ids goes to threads by columns, another by ids.
void scatter_part(
    const PreparedEmbedding& p, const TableScatter& s, const float* du, float* scratch, int64_t begin,
    int64_t end) {
  const auto scatter = p.is_bf16 ? scatter_b : scatter_f;
  const int64_t hidden = p.problem.hidden;
  if (s.number < kParts)
    scatter(p.problem, s, du, scratch, 0, s.number, begin * hidden / kParts, end * hidden / kParts);
  else
    scatter(p.problem, s, du, scratch, begin * s.number / kParts, end * s.number / kParts, 0, hidden);
}

// A table's gradient is fresh memory at every step, and what zeros in it cost is a fault for each of its
// pages: 2 MB ones where the system gives them for the asking.
void in_large_pages(const Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const auto at = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t bytes = t.numel() * (t.scalar_type() == ScalarType::Float ? 4 : 2);
  const uintptr_t begin = (at + kPage - 1) / kPage * kPage, end = (at + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

Tensor embed_norm(FASTGATE_PARAMETERS(EMBED_NORM)) {
  const PreparedEmbedding p = prepare(FASTGATE_ARGUMENTS(EMBED_NORM));
  const EmbedProblem& o = p.problem;
  const int64_t shape[2] = {o.rows, o.hidden};
  Tensor y = empty(shape, 2, word_table.scalar_type(), word_table);
  void* out = y.data_ptr();
  if (o.rows == 0 || o.hidden == 0) return y;
  torch::stable::parallel_for(
      0, o.rows, std::max<int64_t>(1, kForwardElements / o.hidden), [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(2 * padded(o.hidden));
        (p.is_bf16 ? forward_b : forward_f)(o, out, scratch.data(), begin, end);
      });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> embed_norm_backward(
    Tensor grad, FASTGATE_PARAMETERS(EMBED_NORM), int64_t requested) {
  const PreparedEmbedding p = prepare(FASTGATE_ARGUMENTS(EMBED_NORM));
  const EmbedProblem& o = p.problem;
  STD_TORCH_CHECK(
      grad.scalar_type() == word_table.scalar_type() && grad.numel() == o.rows * o.hidden,
      "embed_norm_backward: grad: got another shape or dtype, wanted y's; pass the gradient of y");
  const Tensor dy = dense(grad);
  const void* from = dy.data_ptr();

  // Blocks depend on the number of rows only, never on the number of threads.
  const int64_t least = std::max<int64_t>(1, (o.rows + kBlocks - 1) / kBlocks);
  const int64_t block_rows = (least + kFlush - 1) / kFlush * kFlush;
  const int64_t blocks = (o.rows + block_rows - 1) / block_rows, size = grads::kParameters * o.hidden;
  std::vector<float> sums(blocks * size);
  const std::unique_ptr<float[]> du(new float[o.rows * o.hidden]);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(4 * padded(o.hidden) + size);
    for (int64_t b = begin; b < end; ++b)
      (p.is_bf16 ? backward_b : backward_f)(
          o, from, du.get(), scratch.data(), b * block_rows, std::min(o.rows, (b + 1) * block_rows),
          sums.data() + b * size);
  });

  const Tensor* tables[kTables] = {&word_table, &position_table, &type_table};
  const int64_t paddings[kTables] = {padding_idx, position_padding_idx, -1}, none = 0;
  const int64_t bits[kTables] = {grads::kWordTable, grads::kPositionTable, grads::kTypeTable};
  std::vector<Tensor> gradients;
  std::vector<TableScatter> scatters;
  for (int table = 0; table < kTables; ++table) {
    const bool asked = requested & bits[table];
    const auto dtype = word_table.scalar_type();
    gradients.push_back(asked ? empty_like(*tables[table], dtype) : empty(&none, 1, dtype, word_table));
    if (!asked) continue;
    in_large_pages(gradients.back());
    torch::stable::zero_(gradients.back());
    scatters.push_back(scatter_of(p, table, gradients.back(), paddings[table]));
  }
  const auto cost = [&](int64_t) { return 4.0 * o.rows * o.hidden / kParts; };
  parallel_by_cost(static_cast<int64_t>(scatters.size()), kParts, cost, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * padded(o.hidden));
    for (int64_t part = begin; part < end;) {
      const int64_t s = part / kParts, until = std::min(end, (s + 1) * kParts);
      scatter_part(p, scatters[s], du.get(), scratch.data(), part - s * kParts, until - s * kParts);
      part = until;
    }
  });

  std::vector<int> asked;
  for (int parameter = 0; parameter < grads::kParameters; ++parameter)
    if (requested & (int64_t{grads::kFirstParameterBit} << parameter)) asked.push_back(parameter);
  const int64_t shape[2] = {static_cast<int64_t>(asked.size()), o.hidden};
  Tensor parameters = empty(shape, 2, ScalarType::Float, word_table);
  float* out = static_cast<float*>(parameters.data_ptr());
  for (size_t place = 0; place < asked.size(); ++place, out += o.hidden) {
    std::fill(out, out + o.hidden, 0.0f);
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t j = 0; j < o.hidden; ++j) out[j] += sums[b * size + asked[place] * o.hidden + j];
  }
  return {gradients[0], gradients[1], gradients[2], parameters};
}

}  // namespace fastgate::cpu
