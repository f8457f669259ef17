// Gemm of small float32 matrices, a tile of the result in registers at a time, for each level of x86-64.
//
// The sizes of a tile are what the level's registers hold. A matrix is cut into tiles of nearly equal height,
// so that none runs nearly empty; each height is compiled apart.
#include "cpu/gemm/fp32_gemm.h"

#include <algorithm>

#include "cpu/simd.h"

namespace fastgate::cpu {
namespace {

typedef float v4 __attribute__((vector_size(16)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v16 __attribute__((vector_size(64)));

// gemm: kGemmRows rows by kGemmPanels times 16 columns; gemm_nt: kNtRows rows of a by kNtColumns rows of b.
struct Baseline {
  using Vector = v4;
  static constexpr int kGemmRows = 2, kGemmPanels = 1, kNtRows = 2, kNtColumns = 4;
};
struct Avx2 {
  using Vector = v8;
  static constexpr int kGemmRows = 6, kGemmPanels = 1, kNtRows = 3, kNtColumns = 4;
};
struct Avx512 {
  using Vector = v16;
  static constexpr int kGemmRows = 8, kGemmPanels = 2, kNtRows = 4, kNtColumns = 4;
};

// By reference: a vector returned by value has another calling convention at each level of x86-64.
template <class V>
FASTGATE_INLINE void load_vector(V& value, const float* p) {
  std::memcpy(&value, p, sizeof value);
}

// Memory to prefetch on the way: 32 floats at each step along k, `step` further at the next. Or none.
struct Prefetch {
  const float* at;
  int64_t step;
  FASTGATE_INLINE void fetch() {
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + 16, 0, 2);
    at += step;
  }
  FASTGATE_INLINE void skip(int64_t k) { at += k * step; }
};
struct NoPrefetch {
  FASTGATE_INLINE void fetch() {}
  FASTGATE_INLINE void skip(int64_t) {}
};

// One tile of `gemm`: R rows, P panels.
template <class L, int R, int P, class A>
FASTGATE_INLINE void gemm_tile(
    bool add, const MatrixView& a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t k,
    A prefetch) {
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
  const float* left = a.data;
  for (int64_t p = 0; p < k; ++p, b += b_row, left += a.column_stride) {
    prefetch.fetch();
    V right[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) load_vector(right[v], b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float factor = left[r * a.row_stride];
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
FASTGATE_INLINE void gemm_tile_of_rows(
    int64_t rows, bool add, const MatrixView& a, const float* b, int64_t b_row, float* c, int64_t c_row,
    int64_t k, A prefetch) {
  if constexpr (R > 1)
    if (rows < R) return gemm_tile_of_rows<L, R - 1, P>(rows, add, a, b, b_row, c, c_row, k, prefetch);
  gemm_tile<L, R, P>(add, a, b, b_row, c, c_row, k, prefetch);
}

template <class L, class A>
FASTGATE_INLINE void gemm_tiles(
    bool add, const MatrixView& a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m,
    int64_t n, int64_t k, A prefetch) {
  const int64_t tiles = (m + L::kGemmRows - 1) / L::kGemmRows;
  for (int64_t j = 0; j < n;) {
    const bool wide = L::kGemmPanels == 2 && n - j >= 32;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = t * m / tiles, rows = (t + 1) * m / tiles - i;
      const MatrixView part{a.data + i * a.row_stride, a.row_stride, a.column_stride};
      if (wide)
        gemm_tile_of_rows<L, L::kGemmRows, L::kGemmPanels>(
            rows, add, part, b + j, b_row, c + i * c_row + j, c_row, k, prefetch);
      else
        gemm_tile_of_rows<L, L::kGemmRows, 1>(
            rows, add, part, b + j, b_row, c + i * c_row + j, c_row, k, prefetch);
      prefetch.skip(k);
    }
    j += wide ? 32 : 16;
  }
}

template <class L>
FASTGATE_INLINE void gemm_level(
    bool add, const MatrixView& a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m,
    int64_t n, int64_t k, const float* next) {
  const int64_t tiles = (m + L::kGemmRows - 1) / L::kGemmRows;
  // A single pass over b is as slow as memory already: a prefetch would gain nothing.
  if (next == nullptr || tiles < 2) return gemm_tiles<L>(add, a, b, b_row, c, c_row, m, n, k, NoPrefetch{});
  // Every pass prefetches its share: all of it at once would stall the first pass.
  const Prefetch prefetch{next, std::max<int64_t>(1, 16 * L::kGemmPanels / tiles)};
  gemm_tiles<L>(add, a, b, b_row, c, c_row, m, n, k, prefetch);
}

// The sum of a vector's lanes, four to a lane of the result, the same order for every vector.
template <class V>
FASTGATE_INLINE void fold(v4& folded, const V& value) {
  v4 parts[sizeof(V) / sizeof(v4)];
  std::memcpy(parts, &value, sizeof value);
  folded = parts[0];
  for (size_t i = 1; i < sizeof(V) / sizeof(v4); ++i) folded += parts[i];
}

// One tile of `gemm_nt`: R rows of a, C of b.
template <class L, int R, int C>
FASTGATE_INLINE void gemm_nt_tile(
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
    const v4 all =
        __builtin_shufflevector(one, two, 0, 1, 4, 5) + __builtin_shufflevector(one, two, 2, 3, 6, 7);
    std::memcpy(c + r * c_row, &all, C * sizeof(float));
  }
}

template <class L, int R, int C>
FASTGATE_INLINE void gemm_nt_tile_of_rows(
    int64_t rows, int64_t columns, const float* a, int64_t a_row, const float* b, int64_t b_row, float* c,
    int64_t c_row, int64_t k) {
  if constexpr (R > 1)
    if (rows < R) return gemm_nt_tile_of_rows<L, R - 1, C>(rows, columns, a, a_row, b, b_row, c, c_row, k);
  if constexpr (C > 1)
    if (columns < C) return gemm_nt_tile_of_rows<L, R, C - 1>(rows, columns, a, a_row, b, b_row, c, c_row, k);
  gemm_nt_tile<L, R, C>(a, a_row, b, b_row, c, c_row, k);
}

template <class L>
FASTGATE_INLINE void gemm_nt_level(
    const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m,
    int64_t n, int64_t k) {
  const int64_t row_tiles = (m + L::kNtRows - 1) / L::kNtRows,
                column_tiles = (n + L::kNtColumns - 1) / L::kNtColumns;
  for (int64_t t = 0; t < column_tiles; ++t) {  // some rows of b stay in the first-level cache
    const int64_t j = t * n / column_tiles, columns = (t + 1) * n / column_tiles - j;
    for (int64_t u = 0; u < row_tiles; ++u) {
      const int64_t i = u * m / row_tiles, rows = (u + 1) * m / row_tiles - i;
      gemm_nt_tile_of_rows<L, L::kNtRows, L::kNtColumns>(
          rows, columns, a + i * a_row, a_row, b + j * b_row, b_row, c + i * c_row + j, c_row, k);
    }
  }
}

struct GemmLevel {
  void (*gemm)(
      bool, const MatrixView&, const float*, int64_t, float*, int64_t, int64_t, int64_t, int64_t,
      const float*);
  void (*gemm_nt)(const float*, int64_t, const float*, int64_t, float*, int64_t, int64_t, int64_t, int64_t);
};

#define FASTGATE_GEMM_LEVEL(LEVEL, TARGET)                                                              \
  TARGET void gemm_##LEVEL(                                                                             \
      bool add, const MatrixView& a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m, \
      int64_t n, int64_t k, const float* next) {                                                        \
    gemm_level<LEVEL>(add, a, b, b_row, c, c_row, m, n, k, next);                                       \
  }                                                                                                     \
  TARGET void gemm_nt_##LEVEL(                                                                          \
      const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m, \
      int64_t n, int64_t k) {                                                                           \
    gemm_nt_level<LEVEL>(a, a_row, b, b_row, c, c_row, m, n, k);                                        \
  }

FASTGATE_GEMM_LEVEL(Baseline, )
FASTGATE_GEMM_LEVEL(Avx2, __attribute__((target("arch=x86-64-v3"))))
FASTGATE_GEMM_LEVEL(Avx512, __attribute__((target("arch=x86-64-v4"))))

GemmLevel choose_level() {
  __builtin_cpu_init();
  // The levels by what they consist of: clang knows their names as targets before it knows them here.
  const bool v3 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4) return {gemm_Avx512, gemm_nt_Avx512};
  if (v3) return {gemm_Avx2, gemm_nt_Avx2};
  return {gemm_Baseline, gemm_nt_Baseline};
}

const GemmLevel kLevel = choose_level();

}  // namespace

void gemm(
    bool add, MatrixView a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t n,
    int64_t k, const float* next) {
  kLevel.gemm(add, a, b, b_row, c, c_row, m, n, k, next);
}

void gemm_nt(
    const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m,
    int64_t n, int64_t k) {
  kLevel.gemm_nt(a, a_row, b, b_row, c, c_row, m, n, k);
}

}  // namespace fastgate::cpu
