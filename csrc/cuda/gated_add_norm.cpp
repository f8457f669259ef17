// gated_add_norm on CUDA, the tensor side: checks, element types, memory; the kernels are in the .cu files.
#include "gated_add_norm.h"

#include <dlfcn.h>

#include <cmath>

#include "gradient_bits.h"
#include "ops.h"

namespace fastgate::cuda {
namespace {

namespace grads = gated_add_norm_gradients;

// torch's current stream. The stable ABI gives it from torch 2.13 on only; before that, torch's CUDA library
// has it. It is in the process, for there is a CUDA tensor, but its symbols are visible to those who name it
// only.
void* current_stream(int32_t device) {
  using Find = AOTITorchError (*)(int32_t, void**);
  static const Find find = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Find>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(
      find != nullptr,
      "gated_add_norm: stream: got a torch without libtorch_cuda.so's aoti_torch_get_current_cuda_stream, "
      "wanted one "
      "with it; install a CUDA build of torch, or set FASTGATE_CUDA=triton");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(find(device, &stream));
  return stream;
}

bool is_stored(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

Type type_of(const Tensor& t) {
  const auto dtype = t.scalar_type();
  return dtype == ScalarType::Float ? Type::f32 : dtype == ScalarType::BFloat16 ? Type::bf16 : Type::f16;
}

// What a call's kernels are started with; holds the tensors that they read.
struct Call {
  int32_t device_type = 0;
  Queue queue{};
  NormOperands operands{};
  ScalarType y_dtype{};
  std::vector<Tensor> kept_alive;

  // `t` as the kernels read it: on the call's device, dense, from a multiple of 16 bytes on.
  Array array(Tensor t, const char* name) {
    int32_t type, device;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device));
    STD_TORCH_CHECK(
        type == device_type && device == queue.device, "gated_add_norm: ", name,
        ": got a tensor on another device, wanted x's; move it there");
    t = dense(t);
    if (reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 != 0) t = torch::stable::clone(t);
    kept_alive.push_back(t);
    return {t.data_ptr(), type_of(t)};
  }

  Array rows(const Tensor& t, const char* name, int64_t elements) {
    STD_TORCH_CHECK(
        is_stored(t.scalar_type()), "gated_add_norm: ", name,
        ": got another dtype, wanted float32, bfloat16 or float16; the torch reference takes the others");
    STD_TORCH_CHECK(
        t.numel() == elements, "gated_add_norm: ", name, ": got ", t.numel(), " elements, wanted ", elements,
        "; match x's shape");
    return array(t, name);
  }

  Array parameter(const OptionalTensor& t, const char* name, int64_t elements) {
    if (!t) return {};
    STD_TORCH_CHECK(
        t->numel() == elements, "gated_add_norm: ", name, ": got ", t->numel(), " elements, wanted ",
        elements, "; match x's last dimension");
    return array(is_stored(t->scalar_type()) ? *t : torch::stable::to(*t, ScalarType::Float), name);
  }
};

Call prepare(FASTGATE_PARAMETERS(GATED_ADD_NORM)) {
  Call call;
  NormOperands& o = call.operands;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &call.device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &call.queue.device));
  call.kept_alive.reserve(12);
  STD_TORCH_CHECK(x.dim() > 0, "gated_add_norm: x: got 0 dimensions, wanted (..., H); add one");
  const int64_t hidden = x.size(x.dim() - 1);
  STD_TORCH_CHECK(
      hidden > 0 && hidden <= kWidest, "gated_add_norm: x: got ", hidden, " columns, wanted 1 to ", kWidest,
      "; for wider rows call the torch reference");
  o.hidden = static_cast<int>(hidden);
  o.rows = x.numel() / hidden;
  o.x = call.rows(x, "x", x.numel());
  o.residual = call.rows(residual, "residual", x.numel());
  call.y_dtype = o.x.type == o.residual.type ? x.scalar_type() : ScalarType::Float;
  o.weight = call.parameter(weight, "weight", hidden);
  o.norm_bias = call.parameter(norm_bias, "norm_bias", hidden);
  o.bias = call.parameter(bias, "bias", hidden);
  o.scale = call.parameter(scale, "scale", hidden);
  o.offset = call.parameter(offset, "offset", hidden);
  o.weight2 = call.parameter(weight2, "weight2", hidden);
  o.norm_bias2 = call.parameter(norm_bias2, "norm_bias2", hidden);
  STD_TORCH_CHECK(
      weight2.has_value() == norm_bias2.has_value(),
      "gated_add_norm: weight2, norm_bias2: got one of them, wanted both or neither; pass the other one too");
  o.gate = call.parameter(gate, "gate", 1);
  o.eps = static_cast<float>(eps);
  o.eps2 = static_cast<float>(eps2);
  if (dropout_p > 0.0) {
    STD_TORCH_CHECK(
        seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
        "gated_add_norm: seed: got none, wanted an int64 tensor of one element with dropout_p > 0; pass a "
        "seed");
    o.seed = static_cast<const int64_t*>(call.array(*seed, "seed").data);
    o.threshold = static_cast<uint32_t>(std::fmin(std::nearbyint(dropout_p * 4294967296.0), 4294967295.0));
    o.kept = static_cast<float>(1.0 / (1.0 - dropout_p));
  }
  call.queue.stream = current_stream(call.queue.device);
  return call;
}

void check(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, op, ": launch: got the CUDA error '", error, "', wanted none");
}

Output output(const Tensor& t, bool requested) {
  return requested ? Output{t.data_ptr(), type_of(t)} : Output{};
}

}  // namespace

Tensor gated_add_norm(FASTGATE_PARAMETERS(GATED_ADD_NORM)) {
  const Call call = prepare(FASTGATE_ARGUMENTS(GATED_ADD_NORM));
  Tensor y = empty_like(x, call.y_dtype);
  check(launch_gated_add_norm(call.queue, call.operands, output(y, true)), "gated_add_norm");
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gated_add_norm_backward(
    Tensor grad, FASTGATE_PARAMETERS(GATED_ADD_NORM), int64_t requested) {
  Call call = prepare(FASTGATE_ARGUMENTS(GATED_ADD_NORM));
  const NormOperands& o = call.operands;
  STD_TORCH_CHECK(
      grad.scalar_type() == call.y_dtype,
      "gated_add_norm_backward: grad: got another dtype, wanted y's; pass the gradient of y");
  const Array dy = call.rows(grad, "grad", x.numel());
  const int64_t none = 0;
  Tensor dx = requested & grads::kX ? empty_like(x, x.scalar_type()) : empty(&none, 1, x.scalar_type(), x);
  Tensor dresidual = requested & grads::kResidual ? empty_like(x, residual.scalar_type())
                                                  : empty(&none, 1, residual.scalar_type(), x);
  int64_t sizes[2] = {0, o.hidden};
  for (int parameter = 0; parameter < grads::kParameters; ++parameter)
    sizes[0] += (requested & (int64_t{grads::kFirstParameterBit} << parameter)) != 0;
  Tensor parameters = empty(sizes, 2, ScalarType::Float, x);
  int64_t blocks = 0;
  check(gated_add_norm_partial_rows(call.queue, o, &blocks), "gated_add_norm_backward");
  const int64_t room = blocks * sizes[0] * sizes[1];
  Tensor partials = empty(&room, 1, ScalarType::Float, x);
  check(
      launch_gated_add_norm_backward(
          call.queue, o, dy, output(dx, requested & grads::kX),
          output(dresidual, requested & grads::kResidual), requested,
          static_cast<float*>(partials.data_ptr()), static_cast<float*>(parameters.data_ptr())),
      "gated_add_norm_backward");
  return {dx, dresidual, parameters};
}

}  // namespace fastgate::cuda
