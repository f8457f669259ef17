// A row of gated_add_norm in registers: how threads share it, and the steps that both directions take.
//
// With rows i, columns j, keep mask m, keep probability 1 - p:
//
//   d = m * (x + bias) / (1 - p)        u = scale * residual + gate * d + offset
//   xhat = (u - mean(u)) * rstd(u)      y = xhat * weight + norm_bias
//
// A team of one or several warps owns a row, and each thread E of its columns, in chunks that are as wide as
// one 16-byte access of the wider element type: so neighbouring threads touch neighbouring bytes. Parameters
// are read again for each row, from the first-level cache.
#pragma once

#include "dropout.cuh"
#include "elements.cuh"
#include "gated_add_norm.h"
#include "team.cuh"

namespace fastgate::cuda {

// How rows of x in TX and residual in TR, E columns a thread, are cut into chunks.
template <class TX_, class TR_, int E>
struct Layout {
  using TX = TX_;
  using TR = TR_;
  static constexpr bool kAligned = !std::is_same_v<TX, Mixed>;
  using TY = std::conditional_t<std::is_same_v<TX, TR>, TX, float>;
  static constexpr int kChunk = kAligned ? 16 / int(sizeof(TX) > sizeof(TR) ? sizeof(TX) : sizeof(TR)) : 4;
  static constexpr int kColumns = E, kChunks = E / kChunk;
  static_assert(E % kChunk == 0 && E <= 32, "a row's mask is 32 bits a thread");
  using Values = float[kChunks][kChunk];

  // First column of this thread's chunk k.
  __device__ static int column(const Team& team, int k) {
    return (k * team.threads() + team.thread) * kChunk;
  }
  // Whether element c of a chunk, `inside` of whose columns lie in the row, is one of them.
  __device__ static bool has(int inside, int c) { return kAligned ? inside > 0 : c < inside; }
};

template <class L, class T>
using HeldRow = Held<T, L::kChunk>[L::kChunks];

template <class L, class T>
__device__ inline void read_row(
    Array from, const Team& team, const NormOperands& o, int64_t row, HeldRow<L, T>& held) {
#pragma unroll
  for (int k = 0; k < L::kChunks; ++k) {
    const int column = L::column(team, k);
    held[k].read(from, row * o.hidden + column, o.hidden - column);
  }
}

template <class L, class T>
__device__ inline void unpack_row(const HeldRow<L, T>& held, typename L::Values& values) {
#pragma unroll
  for (int k = 0; k < L::kChunks; ++k) held[k].unpack(values[k]);
}

template <int C>
__device__ inline float total(const float (&values)[C]) {
  float halves[C / 2];
#pragma unroll
  for (int c = 0; c < C / 2; ++c) halves[c] = values[c] + values[c + C / 2];
  if constexpr (C == 2) {
    return halves[0];
  } else {
    return total(halves);
  }
}

// The operands that one number serves for the whole row.
struct Scalars {
  float gate;
  uint2 seed;  // low and high word

  __device__ explicit Scalars(const NormOperands& o)
      : gate(o.gate.data != nullptr ? read_one(o.gate) : 1.0f),
        seed(o.seed != nullptr ? *reinterpret_cast<const uint2*>(o.seed) : make_uint2(0, 0)) {}
};

// d of one chunk.
template <class L>
__device__ inline void drop(
    const NormOperands& o, const Held<typename L::TX, L::kChunk>& x, int column, uint32_t keep,
    float (&d)[L::kChunk]) {
  x.unpack(d);
  if (o.bias.data != nullptr) {
    float bias[L::kChunk];
    read_parameter<L::kAligned>(o.bias, column, o.hidden - column, bias);
#pragma unroll
    for (int c = 0; c < L::kChunk; ++c) d[c] += bias[c];
  }
  if (o.seed != nullptr) {
#pragma unroll
    for (int c = 0; c < L::kChunk; ++c) d[c] = keep >> c & 1u ? d[c] * o.kept : 0.0f;
  }
}

// u of this thread's columns, zero beyond the row; `keep` gets the mask's bits, chunk after chunk. kReads: x
// and residual are not there yet, each chunk is read when it is due.
template <class L, bool kReads>
__device__ inline void mix(
    const NormOperands& o, const Scalars& scalars, const Team& team, int64_t row,
    HeldRow<L, typename L::TX>& x, HeldRow<L, typename L::TR>& residual, typename L::Values& u,
    uint32_t& keep) {
  constexpr int C = L::kChunk;
  keep = 0;
#pragma unroll
  for (int k = 0; k < L::kChunks; ++k) {
    const int column = L::column(team, k), inside = o.hidden - column;
    if constexpr (kReads) {
      x[k].read(o.x, row * o.hidden + column, inside);
      residual[k].read(o.residual, row * o.hidden + column, inside);
    }
    if (o.seed != nullptr) keep |= keep_bits<C>(scalars.seed, row, column, o.threshold) << (k * C);
    float d[C], parameter[C];
    drop<L>(o, x[k], column, keep >> (k * C), d);
    residual[k].unpack(u[k]);
    if (o.scale.data != nullptr) {
      read_parameter<L::kAligned>(o.scale, column, inside, parameter);
#pragma unroll
      for (int c = 0; c < C; ++c) u[k][c] *= parameter[c];
    }
#pragma unroll
    for (int c = 0; c < C; ++c) u[k][c] += scalars.gate * d[c];
    if (o.offset.data != nullptr) {
      read_parameter<L::kAligned>(o.offset, column, inside, parameter);
#pragma unroll
      for (int c = 0; c < C; ++c) u[k][c] += parameter[c];
    }
  }
}

// A norm's input to xhat in place, the variance from the centred values; returns rstd.
template <class L>
__device__ inline float normalise(const NormOperands& o, float eps, Team& team, typename L::Values& u) {
  constexpr int C = L::kChunk;
  const float share = 1.0f / static_cast<float>(o.hidden);
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < L::kChunks; ++k) sum += total(u[k]);
  const float mean = team.sum(sum) * share;
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < L::kChunks; ++k) {
    const int inside = o.hidden - L::column(team, k);
    float squared[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      u[k][c] = L::has(inside, c) ? u[k][c] - mean : 0.0f;
      squared[c] = u[k][c] * u[k][c];
    }
    squares += total(squared);
  }
  const float variance = team.sum(squares) * share + eps;
  float rstd = rsqrtf(variance);
  rstd *= 1.5f - 0.5f * variance * rstd * rstd;  // the approximation's last bits
#pragma unroll
  for (int k = 0; k < L::kChunks; ++k)
#pragma unroll
    for (int c = 0; c < C; ++c) u[k][c] *= rstd;
  return rstd;
}

// xhat * weight + norm_bias, zero beyond the row.
template <class L>
__device__ inline void affine(
    const NormOperands& o, Array weight, Array norm_bias, const Team& team, const typename L::Values& xhat,
    typename L::Values& y) {
  constexpr int C = L::kChunk;
#pragma unroll
  for (int k = 0; k < L::kChunks; ++k) {
    const int column = L::column(team, k), inside = o.hidden - column;
    float multiplied[C], added[C];
    read_parameter<L::kAligned>(weight, column, inside, multiplied);
    read_parameter<L::kAligned>(norm_bias, column, inside, added);
#pragma unroll
    for (int c = 0; c < C; ++c) y[k][c] = xhat[k][c] * multiplied[c] + added[c];
  }
}

}  // namespace fastgate::cuda
