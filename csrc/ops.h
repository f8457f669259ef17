// The ops' C++ functions, one a schema in fastgate/ops.py, and the tensor helpers that they share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastgate {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Operands of gated_add_norm: the schema, as in fastgate/ops.py.
#define FASTGATE_GATED_ADD_NORM_SCHEMA                                                                       \
  "Tensor x, Tensor residual, Tensor weight, Tensor norm_bias, float eps, Tensor? bias, Tensor? gate, "      \
  "Tensor? scale, Tensor? shift, float dropout_p, Tensor? seed, Tensor? weight2, Tensor? norm_bias2, float eps2"

// Operands of gated_add_norm after x and residual, in the schema's order.
#define FASTGATE_GATED_ADD_NORM_OPERANDS                                                                     \
  Tensor weight, Tensor norm_bias, double eps, OptionalTensor bias, OptionalTensor gate, OptionalTensor scale, \
      OptionalTensor shift, double dropout_p, OptionalTensor seed, OptionalTensor weight2,                     \
      OptionalTensor norm_bias2, double eps2

// Bits of `wanted`: what gated_add_norm_backward is asked for. Parameters follow in the order they are stacked in.
enum Wanted : int64_t {
  kX = 1,
  kResidual = 2,
  kBias = 4,
  kGate = 8,
  kScale = 16,
  kShift = 32,
  kWeight = 64,
  kNormBias = 128,
  kWeight2 = 256,
  kNormBias2 = 512,
};
constexpr int kParameters = 8;
constexpr int64_t parameter_bit(int place) { return int64_t{4} << place; }

// Kinds of the halves of a layer that packed_layers runs. With each comes a number: heads, heads, columns of the first
// product, or how many links away from those that are read a shift's rows may be (-1: all of them).
enum Half : int64_t { kAttention = 0, kAbsorbed = 1, kFeedForward = 2, kShiftNorm = 3 };

// Operands of attention, in the schema's order: rows packed sequence after sequence, which end at cu_q and cu_k.
#define FASTGATE_ATTENTION_OPERANDS                                                                        \
  Tensor q, Tensor k, Tensor v, OptionalTensor q_bias, OptionalTensor k_bias, OptionalTensor v_bias,       \
      Tensor cu_q, Tensor cu_k, int64_t heads, double scale, double dropout_p, OptionalTensor seed

// Operands of absorbed_attention, in the schema's order.
#define FASTGATE_ABSORBED_ATTENTION_OPERANDS \
  Tensor probe, Tensor x, Tensor cu_seqlens, double scale, double dropout_p, OptionalTensor seed

// Operands of shift_norm, in the schema's order.
#define FASTGATE_SHIFT_NORM_OPERANDS                                                                          \
  Tensor x, Tensor linked, Tensor shift, Tensor scale, Tensor before, Tensor after, Tensor weight, Tensor norm_bias, \
      double eps

// Operands of embed_norm, in the schema's order.
#define FASTGATE_EMBED_NORM_OPERANDS                                                                        \
  Tensor words, Tensor positions, OptionalTensor types, Tensor word_table, Tensor position_table,           \
      Tensor type_table, Tensor weight, Tensor norm_bias, double eps, double dropout_p, OptionalTensor seed, \
      OptionalTensor weight2, OptionalTensor norm_bias2, double eps2, int64_t padding_idx,                   \
      int64_t position_padding_idx

namespace cpu {
std::tuple<Tensor, Tensor> absorbed_attention(FASTGATE_ABSORBED_ATTENTION_OPERANDS);
std::tuple<Tensor, Tensor> absorbed_attention_backward(
    Tensor grad, OptionalTensor grad_total, FASTGATE_ABSORBED_ATTENTION_OPERANDS);
Tensor embed_norm(FASTGATE_EMBED_NORM_OPERANDS);
std::tuple<Tensor, Tensor, Tensor, Tensor> embed_norm_backward(
    Tensor grad, FASTGATE_EMBED_NORM_OPERANDS, int64_t wanted);
Tensor attention(FASTGATE_ATTENTION_OPERANDS);
std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad, FASTGATE_ATTENTION_OPERANDS);
bool packs_bfloat16();
Tensor packed_linear(Tensor x, Tensor panels, OptionalTensor bias, int64_t columns, bool gelu);
Tensor packed_layers(
    Tensor h, std::vector<OptionalTensor> operands, std::vector<int64_t> kinds, std::vector<double> numbers,
    Tensor cu_seqlens, OptionalTensor wanted, std::vector<Tensor> links);
Tensor shift_norm(FASTGATE_SHIFT_NORM_OPERANDS);
std::tuple<Tensor, Tensor> shift_norm_backward(Tensor grad, FASTGATE_SHIFT_NORM_OPERANDS, int64_t wanted);
Tensor gated_add_norm(Tensor x, Tensor residual, FASTGATE_GATED_ADD_NORM_OPERANDS);
std::tuple<Tensor, Tensor, Tensor> gated_add_norm_backward(
    Tensor grad, Tensor x, Tensor residual, FASTGATE_GATED_ADD_NORM_OPERANDS, int64_t wanted);
}  // namespace cpu

namespace cuda {
Tensor gated_add_norm(Tensor x, Tensor residual, FASTGATE_GATED_ADD_NORM_OPERANDS);
std::tuple<Tensor, Tensor, Tensor> gated_add_norm_backward(
    Tensor grad, Tensor x, Tensor residual, FASTGATE_GATED_ADD_NORM_OPERANDS, int64_t wanted);
}  // namespace cuda

// An uninitialised contiguous tensor on `like`'s device. The shim is called straight: through the dispatcher an
// allocation costs as much as a small kernel.
inline Tensor empty(const int64_t* sizes, int64_t dims, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(dims);
  int64_t step = 1;
  for (int64_t d = dims; d-- > 0; step *= sizes[d] > 0 ? sizes[d] : 1) strides[d] = step;
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t code = dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                       : dtype == ScalarType::Half   ? aoti_torch_dtype_float16()
                       : dtype == ScalarType::Long   ? aoti_torch_dtype_int64()
                                                     : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides.data(), code, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty_like(const Tensor& like, ScalarType dtype) {
  return empty(like.sizes().data(), like.dim(), dtype, like);
}

// Whether a has the sizes of b. Rows of a are found by its strides, so as many elements are not enough.
inline bool has_sizes_of(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// t as a contiguous float32 tensor.
inline Tensor as_float(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? dense(t) : dense(torch::stable::to(t, ScalarType::Float));
}

}  // namespace fastgate
