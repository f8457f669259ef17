// Launches on the host: the device and stream, errors, and the element types that a kernel is compiled for.
#pragma once

#include <cuda_runtime.h>

#include "elements.cuh"
#include "gated_add_norm.h"
#include "team.cuh"

namespace fastgate::cuda {

struct OnDevice {
  int before = 0;
  cudaError_t error;

  explicit OnDevice(int device) {
    error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  }
  ~OnDevice() {
    int now = before;
    if (cudaGetDevice(&now) == cudaSuccess && now != before) cudaSetDevice(before);
  }
};

inline const char* described(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or it would be met again by whoever asks next
  return cudaGetErrorString(error);
}

template <class Kernel, class... Arguments>
cudaError_t launch(
    Queue queue, Kernel kernel, int64_t blocks, int threads, size_t shared, const Arguments&... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
        static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Stands for the element types of x and residual.
template <class TX, class TR>
struct Types {};

// Calls f with the types that training and inference meet if rows are whole chunks, else with Mixed, for
// everything.
template <class F>
cudaError_t with_types(const NormOperands& o, const F& f) {
  const Type x = o.x.type, residual = o.residual.type;
  const int64_t wider = bytes(x) > bytes(residual) ? bytes(x) : bytes(residual);
  if (o.hidden % (16 / wider) == 0) {
    if (x == Type::f32 && residual == Type::f32) return f(Types<float, float>());
    if (x == Type::bf16 && residual == Type::bf16) return f(Types<bf16, bf16>());
    if (x == Type::f16 && residual == Type::f16) return f(Types<f16, f16>());
    if (x == Type::bf16 && residual == Type::f32) return f(Types<bf16, float>());
    if (x == Type::f16 && residual == Type::f32) return f(Types<f16, float>());
  }
  return f(Types<Mixed, Mixed>());
}

inline int warps_a_row(const NormOperands& o, int columns_a_thread) {
  return static_cast<int>(divided_up(o.hidden, columns_a_thread * kWarp));
}

}  // namespace fastgate::cuda
