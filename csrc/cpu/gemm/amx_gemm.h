// Gemm of bfloat16 rows and packed panels by Intel's AMX, whose instructions multiply tile registers.
#pragma once

#include "cpu/gemm/bf16_gemm.h"

namespace fastgate::cpu {

// Whether this processor has AMX, and the operating system lets this process use it.
bool has_amx();

// Memory that a gemm prefetches, `step` numbers further after every 32 along k.
struct PanelPrefetch {
  const bf16* at;
  int64_t step;
};

// This thread's tile registers. While an object lives, nothing else on the thread may use them.
class AmxTiles {
 public:
  AmxTiles() = default;
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
  ~AmxTiles();

  // As bf16_gemm, for m <= kAmxRows and k a multiple of 32; rows of c are c_row apart. An element of c is one
  // sum, whatever m is. meanwhile: the epilogue of another gemm, computed beside this one by the vector
  // units, which a gemm by tile registers leaves idle; null: none.
  void gemm(
      const bf16* a, int64_t a_row, const bf16* b, float* c, int64_t c_row, int64_t m, int64_t k,
      PanelPrefetch prefetch = {}, const Epilogue* meanwhile = nullptr);

 private:
  int64_t rows_ = 0;  // that the registers are configured for
};

constexpr int64_t kAmxRows = 32;

}  // namespace fastgate::cpu
