// The half layers that fused_layers runs, as it takes them. fastgate/ops/fused_layers.py has the same, and
// tests/ops/test_operands.py compares the two.
#pragma once

#include <cstdint>

namespace fastgate::cpu {

// A half layer's kind. Its size: the heads of either attention; the columns of the first gemm; a shift_norm's
// halo, in hops around the output rows, or kAllRows.
enum HalfLayer : int64_t { kAttention, kAbsorbed, kFeedForward, kShiftNorm };
constexpr int64_t kAllRows = -1;

// What `kinds` and `numbers` hold for each half layer.
enum Kinds : int64_t { kKind, kSize, kKindsPerHalf };
enum Numbers : int64_t { kEps, kScaleOrEps2, kNumbersPerHalf };

// The places of a half layer's operands.
namespace attention_operands {
enum Place : int64_t { kQkv, kQBias, kKBias, kVBias, kOutput, kOutputBias, kNormWeight, kNormBias, kPlaces };
}
namespace absorbed_operands {
enum Place : int64_t {
  kQuery,
  kQBias,
  kKey,
  kValue,
  kVBias,
  kOutput,
  kOutputBias,
  kNormWeight,
  kNormBias,
  kPlaces
};
}
namespace feed_forward_operands {
enum Place : int64_t {
  kUp,
  kUpBias,
  kDown,
  kDownBias,
  kNormWeight,
  kNormBias,
  kNormWeight2,
  kNormBias2,
  kPlaces
};
}
namespace shift_norm_operands {
enum Place : int64_t { kOffset, kScale, kBefore, kAfter, kNormWeight, kNormBias, kPlaces };
}

}  // namespace fastgate::cpu
