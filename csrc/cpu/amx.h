// Products of bfloat16 rows and packed panels, on processors that multiply tiles (Intel's AMX).
#pragma once

#include "pairs.h"

namespace fastgate::cpu {

// Whether this processor can, and the system lets it.
bool has_amx();

// What is brought nearer while a product is made, `step` numbers further after every 32 along k.
struct Ahead {
  const bf16* at;
  int64_t step;
};

// The tile registers, as long as one lives: nothing else may use them meanwhile on this thread.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles();

  // As multiply_pairs, for m <= kTileRows and k that is a multiple of 32; rows of c are c_row apart. An element of c
  // is one sum, whatever m is. meanwhile: sums of another product, which are finished beside this one, as the tiles
  // leave the vectors nothing to do; null: none.
  void multiply(
      const bf16* a, int64_t a_row, const bf16* b, float* c, int64_t c_row, int64_t m, int64_t k,
      Ahead ahead = {}, const Sums* meanwhile = nullptr);

 private:
  int64_t rows_ = 0;  // that the registers are shaped for
};

constexpr int64_t kTileRows = 32;

}  // namespace fastgate::cpu
