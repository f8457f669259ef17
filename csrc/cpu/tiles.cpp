// Products of small float32 matrices, a tile of the result in registers at a time, for each level of x86-64.
//
// The sizes of a tile are what the level's registers hold. A matrix is cut into tiles of nearly equal height, so that
// none runs nearly empty; each height is compiled apart.
#include "tiles.h"

#include <algorithm>

#include "rows.h"

namespace fastgate::cpu {
namespace {

typedef float v4 __attribute__((vector_size(16)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v16 __attribute__((vector_size(64)));

// multiply: kRows rows by kPanels times 16 columns; multiply_rows: kAlong rows of a by kAcross rows of b.
struct Baseline {
  using Vector = v4;
  static constexpr int kRows = 2, kPanels = 1, kAlong = 2, kAcross = 4;
};
struct Avx2 {
  using Vector = v8;
  static constexpr int kRows = 6, kPanels = 1, kAlong = 3, kAcross = 4;
};
struct Avx512 {
  using Vector = v16;
  static constexpr int kRows = 8, kPanels = 2, kAlong = 4, kAcross = 4;
};

// By reference: a vector returned by value has another calling convention at each level of x86-64.
template <class V>
FASTGATE_INLINE void load_vector(V& value, const float* p) {
  std::memcpy(&value, p, sizeof value);
}

// Memory to bring nearer on the way: 32 floats at each step along k, `step` further at the next. Or none.
struct Ahead {
  const float* at;
  int64_t step;
  FASTGATE_INLINE void bring() {
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + 16, 0, 2);
    at += step;
  }
  FASTGATE_INLINE void pass(int64_t k) { at += k * step; }
};
struct Nothing {
  FASTGATE_INLINE void bring() {}
  FASTGATE_INLINE void pass(int64_t) {}
};

// One tile of `multiply`: R rows, P panels.
template <class L, int R, int P, class A>
FASTGATE_INLINE void tile(
    bool add, const Left& a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t k, A ahead) {
  using V = typename L::Vector;
  constexpr int kLanes = sizeof(V) / sizeof(float), kVectors = 16 * P / kLanes;
  V sums[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
      if (add)
        load_vector(sums[r][v], c + r * c_row + v * kLanes);
      else
        sums[r][v] = V{};
  const float* left = a.at;
  for (int64_t p = 0; p < k; ++p, b += b_row, left += a.step) {
    ahead.bring();
    V right[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) load_vector(right[v], b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float factor = left[r * a.row];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * right[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) std::memcpy(c + r * c_row + v * kLanes, &sums[r][v], sizeof(V));
}

// The tile of `rows` rows, rows <= R.
template <class L, int R, int P, class A>
FASTGATE_INLINE void tile_of(
    int64_t rows, bool add, const Left& a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t k, A ahead) {
  if constexpr (R > 1)
    if (rows < R) return tile_of<L, R - 1, P>(rows, add, a, b, b_row, c, c_row, k, ahead);
  tile<L, R, P>(add, a, b, b_row, c, c_row, k, ahead);
}

template <class L, class A>
FASTGATE_INLINE void multiply_all(
    bool add, const Left& a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t n, int64_t k,
    A ahead) {
  const int64_t tiles = (m + L::kRows - 1) / L::kRows;
  for (int64_t j = 0; j < n;) {
    const bool wide = L::kPanels == 2 && n - j >= 32;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = t * m / tiles, rows = (t + 1) * m / tiles - i;
      const Left part{a.at + i * a.row, a.row, a.step};
      if (wide)
        tile_of<L, L::kRows, L::kPanels>(rows, add, part, b + j, b_row, c + i * c_row + j, c_row, k, ahead);
      else
        tile_of<L, L::kRows, 1>(rows, add, part, b + j, b_row, c + i * c_row + j, c_row, k, ahead);
      ahead.pass(k);
    }
    j += wide ? 32 : 16;
  }
}

template <class L>
FASTGATE_INLINE void multiply_level(
    bool add, const Left& a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t n, int64_t k,
    const float* next) {
  const int64_t tiles = (m + L::kRows - 1) / L::kRows;
  // A single pass over b is as slow as memory: nothing comes sooner for being asked for sooner.
  if (next == nullptr || tiles < 2) return multiply_all<L>(add, a, b, b_row, c, c_row, m, n, k, Nothing{});
  // Every pass brings its share: bringing all of it in the first would stall that.
  const Ahead ahead{next, std::max<int64_t>(1, 16 * L::kPanels / tiles)};
  multiply_all<L>(add, a, b, b_row, c, c_row, m, n, k, ahead);
}

// The sum of a vector's lanes, four to a lane of the result, the same order for every vector.
template <class V>
FASTGATE_INLINE void fold(v4& folded, const V& value) {
  v4 parts[sizeof(V) / sizeof(v4)];
  std::memcpy(parts, &value, sizeof value);
  folded = parts[0];
  for (size_t i = 1; i < sizeof(V) / sizeof(v4); ++i) folded += parts[i];
}

// One tile of `multiply_rows`: R rows of a, C of b.
template <class L, int R, int C>
FASTGATE_INLINE void dots(
    const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t k) {
  using V = typename L::Vector;
  constexpr int kLanes = sizeof(V) / sizeof(float);
  V sums[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int s = 0; s < C; ++s) sums[r][s] = V{};
  for (int64_t p = 0; p < k; p += kLanes) {
    V left[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) load_vector(left[r], a + r * a_row + p);
#pragma GCC unroll 16
    for (int s = 0; s < C; ++s) {
      V right;
      load_vector(right, b + s * b_row + p);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sums[r][s] += left[r] * right;
    }
  }
  static_assert(C <= 4);
  for (int r = 0; r < R; ++r) {  // the lanes of four vectors, summed side by side
    v4 folded[4] = {};
#pragma GCC unroll 4
    for (int s = 0; s < C; ++s) fold(folded[s], sums[r][s]);
    const v4 one = __builtin_shufflevector(folded[0], folded[1], 0, 4, 1, 5) +
                   __builtin_shufflevector(folded[0], folded[1], 2, 6, 3, 7);
    const v4 two = __builtin_shufflevector(folded[2], folded[3], 0, 4, 1, 5) +
                   __builtin_shufflevector(folded[2], folded[3], 2, 6, 3, 7);
    const v4 all = __builtin_shufflevector(one, two, 0, 1, 4, 5) + __builtin_shufflevector(one, two, 2, 3, 6, 7);
    std::memcpy(c + r * c_row, &all, C * sizeof(float));
  }
}

template <class L, int R, int C>
FASTGATE_INLINE void dots_of(
    int64_t rows, int64_t columns, const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row,
    int64_t k) {
  if constexpr (R > 1)
    if (rows < R) return dots_of<L, R - 1, C>(rows, columns, a, a_row, b, b_row, c, c_row, k);
  if constexpr (C > 1)
    if (columns < C) return dots_of<L, R, C - 1>(rows, columns, a, a_row, b, b_row, c, c_row, k);
  dots<L, R, C>(a, a_row, b, b_row, c, c_row, k);
}

template <class L>
FASTGATE_INLINE void multiply_rows_level(
    const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t n, int64_t k) {
  const int64_t along = (m + L::kAlong - 1) / L::kAlong, across = (n + L::kAcross - 1) / L::kAcross;
  for (int64_t t = 0; t < across; ++t) {  // a few rows of b stay in the first-level cache while a passes
    const int64_t j = t * n / across, columns = (t + 1) * n / across - j;
    for (int64_t u = 0; u < along; ++u) {
      const int64_t i = u * m / along, rows = (u + 1) * m / along - i;
      dots_of<L, L::kAlong, L::kAcross>(
          rows, columns, a + i * a_row, a_row, b + j * b_row, b_row, c + i * c_row + j, c_row, k);
    }
  }
}

struct Products {
  void (*multiply)(
      bool, const Left&, const float*, int64_t, float*, int64_t, int64_t, int64_t, int64_t, const float*);
  void (*multiply_rows)(
      const float*, int64_t, const float*, int64_t, float*, int64_t, int64_t, int64_t, int64_t);
};

#define FASTGATE_PRODUCTS(LEVEL, TARGET)                                                                              \
  TARGET void multiply_##LEVEL(                                                                                       \
      bool add, const Left& a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t n,          \
      int64_t k, const float* next) {                                                                                 \
    multiply_level<LEVEL>(add, a, b, b_row, c, c_row, m, n, k, next);                                                 \
  }                                                                                                                   \
  TARGET void multiply_rows_##LEVEL(                                                                                  \
      const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t n,    \
      int64_t k) {                                                                                                    \
    multiply_rows_level<LEVEL>(a, a_row, b, b_row, c, c_row, m, n, k);                                                \
  }

FASTGATE_PRODUCTS(Baseline, )
FASTGATE_PRODUCTS(Avx2, __attribute__((target("arch=x86-64-v3"))))
FASTGATE_PRODUCTS(Avx512, __attribute__((target("arch=x86-64-v4"))))

Products choose() {
  __builtin_cpu_init();
  // The levels by what they consist of: clang knows their names as targets before it knows them here.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4) return {multiply_Avx512, multiply_rows_Avx512};
  if (v3) return {multiply_Avx2, multiply_rows_Avx2};
  return {multiply_Baseline, multiply_rows_Baseline};
}

const Products kProducts = choose();

}  // namespace

void multiply(
    bool add, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t n, int64_t k,
    const float* next) {
  kProducts.multiply(add, a, b, b_row, c, c_row, m, n, k, next);
}

void multiply_rows(
    const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t n, int64_t k) {
  kProducts.multiply_rows(a, a_row, b, b_row, c, c_row, m, n, k);
}

}  // namespace fastgate::cpu
