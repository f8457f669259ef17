// Rows of stored elements (float32, bfloat16, float16): runs of columns moved in 16-byte accesses, or one by
// one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "gated_add_norm.h"

namespace fastgate::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(bf16 value) { return __bfloat162float(value); }
__device__ inline float to_float(f16 value) { return __half2float(value); }

template <class T>
__device__ inline T from_float(float value) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(value);
  if constexpr (std::is_same_v<T, f16>) return __float2half_rn(value);
  if constexpr (std::is_same_v<T, float>) return value;
}

// N elements that lie in memory together, as one access moves them: 16 bytes, or 8.
template <class T, int N>
struct AlignedRun {
  using Words = std::conditional_t<sizeof(T) * N == 16, uint4, uint2>;
  static_assert(sizeof(Words) == sizeof(T) * N);

  Words words;

  __device__ void load(const T* from) { words = *reinterpret_cast<const Words*>(from); }
  __device__ void store(T* to) const { *reinterpret_cast<Words*>(to) = words; }
  __device__ void unpack(float (&values)[N]) const {
    T elements[N];
    memcpy(elements, &words, sizeof words);
#pragma unroll
    for (int c = 0; c < N; ++c) values[c] = to_float(elements[c]);
  }
  __device__ void pack(const float (&values)[N]) {
    T elements[N];
#pragma unroll
    for (int c = 0; c < N; ++c) elements[c] = from_float<T>(values[c]);
    memcpy(&words, elements, sizeof words);
  }
};

// Stands for an element type that is known at run time only, in rows of any width and alignment.
struct Mixed {};

// C columns of a row as they were read: in their own type, so that a row that is still on its way takes few
// registers.
template <class T, int C>
struct Held {
  AlignedRun<T, C> run;

  __device__ void read(Array from, int64_t at, int inside) {
    if (inside > 0) {
      run.load(static_cast<const T*>(from.data) + at);
    } else {
      run.words = {};
    }
  }
  __device__ void unpack(float (&values)[C]) const { run.unpack(values); }
};

template <class T, int C>
__device__ inline void read_each(const void* from, int64_t at, int inside, float (&values)[C]) {
#pragma unroll
  for (int c = 0; c < C; ++c) values[c] = c < inside ? to_float(static_cast<const T*>(from)[at + c]) : 0.0f;
}

template <int C>
struct Held<Mixed, C> {
  float values[C];

  __device__ void read(Array from, int64_t at, int inside) {
    if (from.type == Type::f32) {
      read_each<float>(from.data, at, inside, values);
    } else if (from.type == Type::bf16) {
      read_each<bf16>(from.data, at, inside, values);
    } else {
      read_each<f16>(from.data, at, inside, values);
    }
  }
  __device__ void unpack(float (&out)[C]) const { memcpy(out, values, sizeof values); }
};

template <class T, int C>
__device__ inline void write_each(void* to, int64_t at, int inside, const float (&values)[C]) {
#pragma unroll
  for (int c = 0; c < C; ++c)
    if (c < inside) static_cast<T*>(to)[at + c] = from_float<T>(values[c]);
}

// C columns of a row of T; those from `inside` on lie beyond its end.
template <class T, int C>
__device__ inline void write(Output to, int64_t at, int inside, const float (&values)[C]) {
  if constexpr (!std::is_same_v<T, Mixed>) {
    if (inside <= 0) return;
    AlignedRun<T, C> run;
    run.pack(values);
    run.store(static_cast<T*>(to.data) + at);
  } else if (to.type == Type::f32) {
    write_each<float>(to.data, at, inside, values);
  } else if (to.type == Type::bf16) {
    write_each<bf16>(to.data, at, inside, values);
  } else {
    write_each<f16>(to.data, at, inside, values);
  }
}

template <class T, int C>
__device__ inline void read_runs(const void* from, int column, float (&values)[C]) {
  constexpr int kRun = C < 16 / int(sizeof(T)) ? C : 16 / int(sizeof(T));
#pragma unroll
  for (int start = 0; start < C; start += kRun) {
    AlignedRun<T, kRun> run;
    run.load(static_cast<const T*>(from) + column + start);
    float part[kRun];
    run.unpack(part);
#pragma unroll
    for (int c = 0; c < kRun; ++c) values[start + c] = part[c];
  }
}

// C columns of a parameter, whose type is known at run time only; zeros beyond its end.
template <bool kAligned, int C>
__device__ inline void read_parameter(Array from, int column, int inside, float (&values)[C]) {
  if constexpr (!kAligned) {
    Held<Mixed, C> held;
    held.read(from, column, inside);
    held.unpack(values);
  } else if (inside <= 0) {
#pragma unroll
    for (int c = 0; c < C; ++c) values[c] = 0.0f;
  } else if (from.type == Type::f32) {
    read_runs<float>(from.data, column, values);
  } else if (from.type == Type::bf16) {
    read_runs<bf16>(from.data, column, values);
  } else {
    read_runs<f16>(from.data, column, values);
  }
}

__device__ inline float read_one(Array from) {
  Held<Mixed, 1> held;
  held.read(from, 0, 1);
  return held.values[0];
}

}  // namespace fastgate::cuda
