// gated_add_norm on CUDA: what its tensor side (.cpp, stable ABI) hands to its kernel side (.cu, no torch).
#pragma once

#include <cstdint>

namespace fastgate::cuda {

enum class Type : int { f32, bf16, f16 };
constexpr int64_t bytes(Type type) { return type == Type::f32 ? 4 : 2; }

// Contiguous elements in device memory that start at a multiple of 16 bytes; null: an operand that was not
// given, or a gradient that is not requested.
struct Array {
  const void* data = nullptr;
  Type type = Type::f32;
};
struct Output {
  void* data = nullptr;
  Type type = Type::f32;
};

constexpr int kWidest = 8192;  // columns of a row

struct NormOperands {
  int64_t rows;
  int hidden;
  Array x, residual;                                                  // (rows, hidden)
  Array weight, norm_bias, bias, scale, offset, weight2, norm_bias2;  // (hidden,)
  Array gate;                                                         // one element
  float eps, eps2;
  const int64_t* seed;  // one element on the device; null: no dropout
  uint32_t threshold;   // a Philox word below it drops its element
  float kept;           // 1 / (1 - dropout_p)
};

// Where to run. The functions below only enqueue, and return what went wrong, null if nothing.
struct Queue {
  int device;
  void* stream;
};

const char* launch_gated_add_norm(Queue queue, const NormOperands& operands, Output y);

// The parameters that `requested` names (gradient_bits.h) are in `parameters` (count, hidden), float32, in
// its bits' order; gate's row sums to its gradient. `partials` is room for partial rows * count * hidden
// numbers.
const char* launch_gated_add_norm_backward(
    Queue queue, const NormOperands& operands, Array grad, Output dx, Output dresidual, int64_t requested,
    float* partials, float* parameters);

// The partial rows, of sums, that backward writes: a function of rows, hidden and the device's
// multiprocessors only.
const char* gated_add_norm_partial_rows(Queue queue, const NormOperands& operands, int64_t* partial_rows);

}  // namespace fastgate::cuda
