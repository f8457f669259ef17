// What each op takes, written once for its schema and its C++ functions, and helpers on tensors.
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

// An op's operands, in the order of its schema. fastgate/ops/ has the same; tests/ops/test_operands.py
// compares them.
//
//   FASTGATE_SCHEMA(OP)      of its schema: "Tensor x, Tensor? bias, float eps"
//   FASTGATE_PARAMETERS(OP)  of its C++ functions: Tensor x, OptionalTensor bias, double eps
//   FASTGATE_ARGUMENTS(OP)   of a call: x, bias, eps
#define FASTGATE_SCHEMA(OP) FASTGATE_##OP##_OPERANDS(FASTGATE_FIRST_IN_SCHEMA, FASTGATE_NEXT_IN_SCHEMA)
#define FASTGATE_PARAMETERS(OP) FASTGATE_##OP##_OPERANDS(FASTGATE_FIRST_PARAMETER, FASTGATE_NEXT_PARAMETER)
#define FASTGATE_ARGUMENTS(OP) FASTGATE_##OP##_OPERANDS(FASTGATE_FIRST_ARGUMENT, FASTGATE_NEXT_ARGUMENT)

// clang-format off
#define FASTGATE_GATED_ADD_NORM_OPERANDS(FIRST, NEXT) \
  FIRST(TENSOR, x) NEXT(TENSOR, residual) NEXT(TENSOR, weight) NEXT(TENSOR, norm_bias) \
  NEXT(FLOAT, eps) NEXT(OPTIONAL, bias) NEXT(OPTIONAL, gate) NEXT(OPTIONAL, scale) \
  NEXT(OPTIONAL, offset) NEXT(FLOAT, dropout_p) NEXT(OPTIONAL, seed) NEXT(OPTIONAL, weight2) \
  NEXT(OPTIONAL, norm_bias2) NEXT(FLOAT, eps2)

// Rows of sequences one after another; those of sequence s end at cu_q[s + 1] and cu_k[s + 1].
#define FASTGATE_ATTENTION_OPERANDS(FIRST, NEXT) \
  FIRST(TENSOR, q) NEXT(TENSOR, k) NEXT(TENSOR, v) NEXT(OPTIONAL, q_bias) NEXT(OPTIONAL, k_bias) \
  NEXT(OPTIONAL, v_bias) NEXT(TENSOR, cu_q) NEXT(TENSOR, cu_k) NEXT(INT, heads) NEXT(FLOAT, scale) \
  NEXT(FLOAT, dropout_p) NEXT(OPTIONAL, seed)

#define FASTGATE_ABSORBED_ATTENTION_OPERANDS(FIRST, NEXT) \
  FIRST(TENSOR, probe) NEXT(TENSOR, x) NEXT(TENSOR, cu_seqlens) NEXT(FLOAT, scale) \
  NEXT(FLOAT, dropout_p) NEXT(OPTIONAL, seed)

#define FASTGATE_SHIFT_NORM_OPERANDS(FIRST, NEXT) \
  FIRST(TENSOR, x) NEXT(TENSOR, has_left_neighbour) NEXT(TENSOR, offset) NEXT(TENSOR, scale) \
  NEXT(TENSOR, before) NEXT(TENSOR, after) NEXT(TENSOR, weight) NEXT(TENSOR, norm_bias) \
  NEXT(FLOAT, eps)

#define FASTGATE_EMBED_NORM_OPERANDS(FIRST, NEXT) \
  FIRST(TENSOR, words) NEXT(TENSOR, positions) NEXT(OPTIONAL, types) NEXT(TENSOR, word_table) \
  NEXT(TENSOR, position_table) NEXT(TENSOR, type_table) NEXT(TENSOR, weight) NEXT(TENSOR, norm_bias) \
  NEXT(FLOAT, eps) NEXT(FLOAT, dropout_p) NEXT(OPTIONAL, seed) NEXT(OPTIONAL, weight2) \
  NEXT(OPTIONAL, norm_bias2) NEXT(FLOAT, eps2) NEXT(INT, padding_idx) \
  NEXT(INT, position_padding_idx)

// clang-format on

#define FASTGATE_FIRST_IN_SCHEMA(TYPE, NAME) FASTGATE_SCHEMA_##TYPE " " #NAME
#define FASTGATE_NEXT_IN_SCHEMA(TYPE, NAME) ", " FASTGATE_SCHEMA_##TYPE " " #NAME
#define FASTGATE_FIRST_PARAMETER(TYPE, NAME) FASTGATE_CPP_##TYPE NAME
#define FASTGATE_NEXT_PARAMETER(TYPE, NAME) , FASTGATE_CPP_##TYPE NAME
#define FASTGATE_FIRST_ARGUMENT(TYPE, NAME) NAME
#define FASTGATE_NEXT_ARGUMENT(TYPE, NAME) , NAME

#define FASTGATE_SCHEMA_TENSOR "Tensor"
#define FASTGATE_SCHEMA_OPTIONAL "Tensor?"
#define FASTGATE_SCHEMA_FLOAT "float"
#define FASTGATE_SCHEMA_INT "int"
#define FASTGATE_CPP_TENSOR ::fastgate::Tensor
#define FASTGATE_CPP_OPTIONAL ::fastgate::OptionalTensor
#define FASTGATE_CPP_FLOAT double
#define FASTGATE_CPP_INT int64_t

// requested: bits of gradient_bits.h.
namespace cpu {
std::tuple<Tensor, Tensor> absorbed_attention(FASTGATE_PARAMETERS(ABSORBED_ATTENTION));
std::tuple<Tensor, Tensor> absorbed_attention_backward(
    Tensor grad_mixed, OptionalTensor grad_total, FASTGATE_PARAMETERS(ABSORBED_ATTENTION));
Tensor embed_norm(FASTGATE_PARAMETERS(EMBED_NORM));
std::tuple<Tensor, Tensor, Tensor, Tensor> embed_norm_backward(
    Tensor grad, FASTGATE_PARAMETERS(EMBED_NORM), int64_t requested);
Tensor attention(FASTGATE_PARAMETERS(ATTENTION));
std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad, FASTGATE_PARAMETERS(ATTENTION));
bool packs_bfloat16();
Tensor packed_linear(Tensor x, Tensor panels, OptionalTensor bias, int64_t columns, bool gelu);
Tensor fused_layers(
    Tensor h, std::vector<OptionalTensor> operands, std::vector<int64_t> kinds, std::vector<double> numbers,
    Tensor cu_seqlens, OptionalTensor output_rows, std::vector<Tensor> neighbours);
Tensor shift_norm(FASTGATE_PARAMETERS(SHIFT_NORM));
std::tuple<Tensor, Tensor> shift_norm_backward(
    Tensor grad, FASTGATE_PARAMETERS(SHIFT_NORM), int64_t requested);
Tensor gated_add_norm(FASTGATE_PARAMETERS(GATED_ADD_NORM));
std::tuple<Tensor, Tensor, Tensor> gated_add_norm_backward(
    Tensor grad, FASTGATE_PARAMETERS(GATED_ADD_NORM), int64_t requested);
}  // namespace cpu

namespace cuda {
Tensor gated_add_norm(FASTGATE_PARAMETERS(GATED_ADD_NORM));
std::tuple<Tensor, Tensor, Tensor> gated_add_norm_backward(
    Tensor grad, FASTGATE_PARAMETERS(GATED_ADD_NORM), int64_t requested);
}  // namespace cuda

// An uninitialised contiguous tensor on `like`'s device. The shim is called straight: through the dispatcher
// an allocation costs as much as a small kernel.
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
