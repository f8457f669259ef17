// csrc/cuda's gated_add_norm on CPU tensors, through the emulated CUDA beside this file: fastgate_emulated's
// ops.
#include "cuda/gated_add_norm.cpp"
#include "cuda/gated_add_norm_backward.cu"
#include "cuda/gated_add_norm_forward.cu"

namespace fastgate::cuda {
thread_local float4 dynamic_shared[emulator::kShared / sizeof(float4)];
}

STABLE_TORCH_LIBRARY(fastgate_emulated, m) {
  m.def("gated_add_norm(" FASTGATE_SCHEMA(GATED_ADD_NORM) ") -> Tensor");
  m.def(
      "gated_add_norm_backward(Tensor grad, " FASTGATE_SCHEMA(
          GATED_ADD_NORM) ", int requested) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastgate_emulated, CPU, m) {
  m.impl("gated_add_norm", TORCH_BOX(&fastgate::cuda::gated_add_norm));
  m.impl("gated_add_norm_backward", TORCH_BOX(&fastgate::cuda::gated_add_norm_backward));
}

extern "C" {
__attribute__((visibility("default"))) void emulate(int multiprocessors, int shared_bytes) {
  emulator::multiprocessors = multiprocessors;
  emulator::shared_bytes = shared_bytes;
  emulator::dynamic_shared = &fastgate::cuda::dynamic_shared[0].x;
}
__attribute__((visibility("default"))) void* last_stream() { return emulator::last_stream; }
}
