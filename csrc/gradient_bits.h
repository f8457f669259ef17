// The bits of `requested`, by which a backward op is told which gradients to compute. fastgate/ops/ has the
// same, and tests/ops/test_operands.py compares the two. Without torch's headers, because nvcc reads this
// too.
//
// The low bits ask for gradients that are tensors of their own. Those of the parameters follow: they come
// stacked, in the order of `Parameter`, and kFirstParameterBit << parameter asks for one.
#pragma once

#include <cstdint>

namespace fastgate {

namespace gated_add_norm_gradients {
enum Parameter : int { kBias, kGate, kScale, kOffset, kWeight, kNormBias, kWeight2, kNormBias2, kParameters };
constexpr int kX = 1, kResidual = 2, kFirstParameterBit = 4;
}  // namespace gated_add_norm_gradients

namespace shift_norm_gradients {
enum Parameter : int { kOffset, kScale, kBefore, kAfter, kWeight, kNormBias, kParameters };
constexpr int kX = 1, kFirstParameterBit = 2;
}  // namespace shift_norm_gradients

namespace embed_norm_gradients {
enum Parameter : int { kWeight, kNormBias, kWeight2, kNormBias2, kParameters };
constexpr int kWordTable = 1, kPositionTable = 2, kTypeTable = 4, kFirstParameterBit = 8;
}  // namespace embed_norm_gradients

}  // namespace fastgate
