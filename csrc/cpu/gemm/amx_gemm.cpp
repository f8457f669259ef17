// Two tile registers of sixteen rows by two of sixteen columns: four sums in registers, four loads a step of
// 32 along k. A panel's pairs (bf16_gemm.h) are the layout that AMX wants of its right operand.
#include "cpu/gemm/amx_gemm.h"

#include <algorithm>

#include "cpu/gemm/bf16_epilogue.h"

#if defined(FASTGATE_AVX512_BF16) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define FASTGATE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastgate::cpu {

#ifdef FASTGATE_AMX
namespace {

#define FASTGATE_AMX_TARGET __attribute__((target("amx-tile,amx-bf16," FASTGATE_AVX512_BF16_FEATURES)))
constexpr int64_t kRows = 16, kDepth = 32;         // of a tile register: rows, and how far it goes along k
constexpr int64_t kStep = kDepth * kPanelColumns;  // numbers of a panel that a step reads

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // of a row
  uint8_t rows[16] = {};
};

// Tile registers 0 to 3 are sums, 4 and 5 rows of a, `upper` and `lower` of them, 6 and 7 columns of b.
FASTGATE_AMX_TARGET void configure(int64_t upper, int64_t lower) {
  TileConfig config;
  const int64_t rows[] = {upper, upper, lower, lower, upper, lower, kRows, kRows};
  std::copy_n(rows, 8, config.rows);
  if (lower == 0) config.bytes[2] = config.bytes[3] = config.bytes[5] = 0;
  _tile_loadconfig(&config);
}

constexpr Epilogue kNoEpilogue = {};

// The rows of one configuration. epilogue: computed meanwhile, its rows spread over the steps along k.
template <bool Lower, bool Gelu>
FASTGATE_AMX_TARGET void gemm_tile(
    const bf16* a, int64_t a_row, const bf16* b, float* c, int64_t c_row, int64_t k, PanelPrefetch prefetch,
    const Epilogue& epilogue) {
  const int64_t steps = std::max<int64_t>(1, k / kDepth), share = (epilogue.rows + steps - 1) / steps;
  int64_t finished = 0;
  const int64_t stride = a_row * sizeof(bf16), b_stride = 2 * kPanelColumns * sizeof(bf16);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Lower) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t p = 0; p < k; p += kDepth, b += kStep, prefetch.at += prefetch.step) {
    for (int64_t i = 0; i < prefetch.step; i += 32) __builtin_prefetch(prefetch.at + i, 0, 2);
    _tile_loadd(4, a + p, stride);
    _tile_loadd(6, b, b_stride);
    _tile_loadd(7, b + kPanelColumns, b_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Lower) {
      _tile_loadd(5, a + kRows * a_row + p, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    for (const int64_t until = std::min(epilogue.rows, finished + share); finished < until; ++finished)
      epilogue_row<Gelu>(epilogue, finished);
  }
  for (; finished < epilogue.rows; ++finished) epilogue_row<Gelu>(epilogue, finished);  // where k is 0
  const int64_t c_stride = c_row * sizeof(float);
  _tile_stored(0, c, c_stride);
  _tile_stored(1, c + 16, c_stride);
  if constexpr (Lower) {
    _tile_stored(2, c + kRows * c_row, c_stride);
    _tile_stored(3, c + kRows * c_row + 16, c_stride);
  }
}

FASTGATE_AMX_TARGET void release() { _tile_release(); }

bool request_amx() {
  if (!has_avx512_bf16()) return false;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kAsk = 0x1023,
                 kTileData =
                     18;  // ARCH_REQ_XCOMP_PERM: the kernel saves tile registers for a process that asks
  return (d & kBfloat16) && (d & kTiles) && syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
}

}  // namespace

bool has_amx() {
  static const bool granted = request_amx();
  return granted;
}

FASTGATE_AMX_TARGET void AmxTiles::gemm(
    const bf16* a, int64_t a_row, const bf16* b, float* c, int64_t c_row, int64_t m, int64_t k,
    PanelPrefetch prefetch, const Epilogue* meanwhile) {
  if (m != rows_) configure(std::min(m, kRows), std::max<int64_t>(0, m - kRows));
  rows_ = m;
  // By reference: a copy would wait until everything stored before it is in the cache.
  const Epilogue& epilogue = meanwhile ? *meanwhile : kNoEpilogue;
  const auto both = epilogue.gelu ? gemm_tile<true, true> : gemm_tile<true, false>;
  const auto upper = epilogue.gelu ? gemm_tile<false, true> : gemm_tile<false, false>;
  (m > kRows ? both : upper)(a, a_row, b, c, c_row, k, prefetch, epilogue);
}

AmxTiles::~AmxTiles() {
  if (rows_) release();
}

#else

bool has_amx() { return false; }
void AmxTiles::gemm(
    const bf16*, int64_t, const bf16*, float*, int64_t, int64_t, int64_t, PanelPrefetch, const Epilogue*) {}
AmxTiles::~AmxTiles() {}

#endif

}  // namespace fastgate::cpu
