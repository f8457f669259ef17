// The warps that share a row, and their sums: fixed order, so that every thread of them holds the same bits.
#pragma once

#include <cuda_runtime.h>

namespace fastgate::cuda {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 16;  // at most

// A block is cut into teams of `warps` warps; warps left over (blockDim is a multiple of a warp) have no
// team.
struct Team {
  int warps, place, thread;  // warps a row, this team in its block, this thread in its team
  bool odd = false;          // which half of `slots` the next sum takes, so that one barrier a sum is enough

  __device__ explicit Team(int warps)
      : warps(warps),
        place(static_cast<int>(threadIdx.x) / (warps * kWarp)),
        thread(static_cast<int>(threadIdx.x) % (warps * kWarp)) {}

  __device__ int threads() const { return warps * kWarp; }

  // Both sums over the team's threads.
  __device__ float2 sum(float2 value) {
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
      value.x += __shfl_xor_sync(0xffffffffu, value.x, apart);
      value.y += __shfl_xor_sync(0xffffffffu, value.y, apart);
    }
    return warps == 1 ? value : across(value);
  }

  __device__ float sum(float value) {
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
    return warps == 1 ? value : across(make_float2(value, 0.0f)).x;
  }

 private:
  __device__ float2 across(float2 value) {
    __shared__ float2 slots[2][kWarpsPerBlock];
    float2* mine = slots[odd] + place * warps;
    odd = !odd;
    if (thread % kWarp == 0) mine[thread / kWarp] = value;
    __barrier_sync_count(1 + place, threads());  // barrier 0 is the whole block's
    float2 total = mine[0];
    for (int warp = 1; warp < warps; ++warp) {
      total.x += mine[warp].x;
      total.y += mine[warp].y;
    }
    return total;
  }
};

}  // namespace fastgate::cuda
