// CUDA on one CPU thread, as far as csrc/cuda needs it: a block's threads are coroutines that take turns at
// barriers and shuffles, blocks run one after the other. So that the kernels' own source runs, slowly, where
// there is no GPU.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __shared__ thread_local  // blocks take turns on one CPU thread: one copy, which may be extern
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kThreads = 1024, kWarp = 32;
constexpr size_t kStack = 128 * 1024, kShared = 256 * 1024;

inline int multiprocessors = 3;
inline int shared_bytes = 163 * 1024;  // of a block at most, as on an A100
inline void* last_stream = nullptr;
inline float* dynamic_shared = nullptr;  // kShared bytes, which the kernels know by a name of their own

struct Thread {
  ucontext_t start;
  jmp_buf resume;
  std::vector<char> stack;
  bool started = false, done = true, odd = false;
};
struct Barrier {
  int arrived = 0;
  uint64_t passed = 0;
};
inline Thread threads[kThreads];
inline Barrier block_barriers[16], warp_barriers[kThreads / kWarp];
inline float exchanged[2][kThreads];
inline jmp_buf scheduler;
inline uint64_t progress;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

// ucontext starts a thread; from then on jumps switch, which need no system call.
inline void yield() {
  if (_setjmp(threads[threadIdx.x].resume) == 0) _longjmp(scheduler, 1);
}

inline void resume(Thread& thread) {
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.resume, 1);
  thread.started = true;
  setcontext(&thread.start);
}

inline void wait(Barrier& barrier, int count) {
  const uint64_t passed = barrier.passed;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.passed;
    ++progress;
  }
  while (barrier.passed == passed) yield();
}

inline void enter() {
  body();
  threads[threadIdx.x].done = true;
  ++progress;
  yield();
}

inline void run_block() {
  for (Barrier& barrier : block_barriers) barrier = {};
  for (Barrier& barrier : warp_barriers) barrier = {};
  std::fill_n(dynamic_shared, kShared / sizeof(float), std::numeric_limits<float>::quiet_NaN());
  for (unsigned t = 0; t < blockDim.x; ++t) {
    Thread& thread = threads[t];
    thread.stack.resize(kStack);
    thread.started = thread.done = thread.odd = false;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.data();
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, enter, 0);
  }
  for (unsigned left = blockDim.x; left > 0;) {
    const uint64_t before = progress;
    left = 0;
    for (unsigned t = 0; t < blockDim.x; ++t) {
      if (threads[t].done) continue;
      threadIdx.x = t;
      resume(threads[t]);
      left += !threads[t].done;
    }
    if (left > 0 && progress == before) fail("threads wait at a barrier that others never reach");
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block_barriers[0], static_cast<int>(blockDim.x)); }
inline void __barrier_sync_count(unsigned id, unsigned count) {
  if (id > 15 || count % 32 != 0)
    emulator::fail("a barrier's number is above 15, or its count no multiple of a warp");
  emulator::wait(emulator::block_barriers[id], static_cast<int>(count));
}
inline float __shfl_xor_sync(unsigned, float value, int apart) {
  bool& odd = emulator::threads[threadIdx.x].odd;
  odd = !odd;
  float* exchanged =
      emulator::exchanged[odd];  // two halves: the next shuffle may start before this one is read
  exchanged[threadIdx.x] = value;
  emulator::wait(emulator::warp_barriers[threadIdx.x / emulator::kWarp], emulator::kWarp);
  return exchanged[threadIdx.x ^ apart];
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline float rsqrtf(float value) {
  return 1.0000003f / std::sqrt(value);
}  // two units off, as the device's may be

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= emulator::shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::multiprocessors : emulator::shared_bytes;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (config->blockDim.x % emulator::kWarp != 0 || config->blockDim.x > emulator::kThreads ||
      config->gridDim.x == 0)
    return cudaErrorInvalidValue;
  emulator::last_stream = config->stream;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulator::body = [&] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) emulator::run_block();
  return cudaSuccess;
}
