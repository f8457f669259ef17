// gated_add_norm on CUDA, backward: dy, x and residual read once, dx and dresidual written once.
//
// Let t = dL/dxhat = dy * weight. xhat depends on u through u itself, through its mean and through rstd:
//
//   dxhat_j / du_k = rstd * (delta_jk - 1 / n - xhat_j * xhat_k / n)
//
// since d rstd / du_k = -rstd^2 * xhat_k / n, and the mean's own share in the variance is sum_j (u_j - mean)
// = 0. Hence
//
//   du = rstd * (t - mean(t) - xhat * mean(t * xhat))
//
// and by the chain rule through u, column sums over the rows for the parameters:
//
//   dresidual = scale * du                   dscale  = sum_i du * residual
//   dx        = gate * m / (1 - p) * du      dbias   = sum_i dx
//   dgate     = sum_ij du * d                doffset  = sum_i du
//   dweight   = sum_i dy * xhat              dnorm_bias = sum_i dy
//
// A second norm sits on y: its backward gives the dy of the first. Backward recomputes u, the statistics and
// the mask from x, residual and the seed, which it reads anyway: forward saves nothing.
//
// E = 8, so that the sums over rows stay in registers, and a team loads its next row while it works on this
// one; the grid is one block a multiprocessor. Each block adds its teams' sums in order and writes one row of
// partial sums, and sum_partials adds those in order: the same bits at every call.
#include "gradient_bits.h"
#include "launch.cuh"
#include "norm_rows.cuh"

namespace fastgate::cuda {

extern __shared__ float4 dynamic_shared[];  // the sums

namespace {

using namespace gated_add_norm_gradients;
__host__ __device__ constexpr int bit(int parameter) { return kFirstParameterBit << parameter; }

__device__ inline int bits_set(int bits) { return __popc(bits); }

// A thread's sums over its team's rows in shared memory, for each requested parameter its E columns: four by
// four, and neighbouring threads' side by side, so that accesses are 16 bytes wide and meet no bank twice.
template <class L>
struct ParameterSums {
  static constexpr int kQuads = L::kChunks * L::kChunk / 4;
  int requested, count, threads;
  float4* mine;

  __device__ ParameterSums(const Team& team, int requested)
      : requested(requested),
        count(bits_set(requested >> 2)),
        threads(team.threads()),
        mine(dynamic_shared + team.place * count * kQuads * threads + team.thread) {
    for (int at = 0; at < count * kQuads; ++at) mine[at * threads] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  __device__ bool has(int parameter) const { return requested & bit(parameter); }

  // Place of a requested parameter's first four.
  __device__ int first(int parameter) const {
    return bits_set(requested >> 2 & ((1 << parameter) - 1)) * kQuads;
  }

  // Adds to chunk k.
  __device__ void add(int parameter, int k, const float (&values)[L::kChunk]) {
    const int at = first(parameter) + k * (L::kChunk / 4);
#pragma unroll
    for (int c = 0; c < L::kChunk; c += 4) {
      float4& sum = mine[(at + c / 4) * threads];
      const float4 was = sum;
      sum =
          make_float4(was.x + values[c], was.y + values[c + 1], was.z + values[c + 2], was.w + values[c + 3]);
    }
  }
};

// The sums of all teams, added in the teams' order: one row of partial sums a block, (count, hidden).
template <class L>
__device__ inline void write_partials(
    const NormOperands& o, const Team& team, const ParameterSums<L>& sums, float* partials) {
  constexpr int kQuads = ParameterSums<L>::kQuads;
  const int teams = blockDim.x / sums.threads, stride = sums.count * kQuads * sums.threads;
  const float4* first = dynamic_shared + team.thread;
  for (int parameter = team.place; parameter < sums.count; parameter += teams) {
    float* to = partials + (static_cast<int64_t>(blockIdx.x) * sums.count + parameter) * o.hidden;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const float4* from = first + (parameter * kQuads + quad) * sums.threads;
      float4 sum = from[0];
      for (int other = 1; other < teams; ++other) {
        const float4 more = from[other * stride];
        sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
      }
      constexpr int kPerChunk = L::kChunk / 4;
      const int column = L::column(team, quad / kPerChunk) + quad % kPerChunk * 4, inside = o.hidden - column;
      const float values[4] = {sum.x, sum.y, sum.z, sum.w};
      write<std::conditional_t<L::kAligned, float, Mixed>>({to, Type::f32}, column, inside, values);
    }
  }
}

// dL/d(output) in dy to dL/d(xhat) in t, and the means over the row that its gradient needs: of t and of t *
// xhat.
template <class L>
__device__ inline float2 weigh(
    const NormOperands& o, Array weight, Team& team, const typename L::Values& xhat, typename L::Values& t) {
  constexpr int C = L::kChunk;
  float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int k = 0; k < L::kChunks; ++k) {
    const int column = L::column(team, k);
    float multiplied[C];
    read_parameter<L::kAligned>(weight, column, o.hidden - column, multiplied);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      t[k][c] *= multiplied[c];
      sums.x += t[k][c];
      sums.y += t[k][c] * xhat[k][c];
    }
  }
  sums = team.sum(sums);
  const float share = 1.0f / static_cast<float>(o.hidden);
  return make_float2(sums.x * share, sums.y * share);
}

template <class L>
__device__ inline void through_norm(
    float rstd, float2 means, const typename L::Values& xhat, typename L::Values& t) {
#pragma unroll
  for (int k = 0; k < L::kChunks; ++k)
#pragma unroll
    for (int c = 0; c < L::kChunk; ++c) t[k][c] = rstd * (t[k][c] - means.x - xhat[k][c] * means.y);
}

template <class L>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp, 1) backward_rows(
    const __grid_constant__ NormOperands o, const Array grad, const Output dx, const Output dresidual,
    int requested, float* partials, int warps) {
  constexpr int C = L::kChunk, K = L::kChunks;
  constexpr bool kNarrow = C * K <= 8;  // room in registers for the usual sums and for the next row
  Team team(warps);
  const Scalars scalars(o);
  ParameterSums<L> sums(team, requested);
  typename L::Values dbias = {}, dweight = {}, dnorm_bias = {};
  float dgate = 0.0f;
  const int teams = blockDim.x / team.threads();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * teams;
  int64_t row = static_cast<int64_t>(blockIdx.x) * teams + team.place;

  HeldRow<L, typename L::TX> x;
  HeldRow<L, typename L::TR> residual;
  HeldRow<L, typename L::TY> dy;
  const auto read = [&](int64_t from) {
    if (from >= o.rows) return;
    read_row<L, typename L::TX>(o.x, team, o, from, x);
    read_row<L, typename L::TR>(o.residual, team, o, from, residual);
    read_row<L, typename L::TY>(grad, team, o, from, dy);
  };
  if constexpr (kNarrow) read(row);
  for (; row < o.rows; row += stride) {
    typename L::Values u, t;  // u becomes xhat; t goes from dy to du
    uint32_t keep;
    mix<L, !kNarrow>(o, scalars, team, row, x, residual, u, keep);
    if constexpr (kNarrow) unpack_row<L, typename L::TY>(dy, t), read(row + stride);
    const float rstd = normalise<L>(o, o.eps, team, u);
    typename L::Values xhat2;
    float rstd2 = 0.0f;
    if (o.weight2.data != nullptr) {
      affine<L>(o, o.weight, o.norm_bias, team, u, xhat2);
      rstd2 = normalise<L>(o, o.eps2, team, xhat2);
    }
    if constexpr (!kNarrow)
      read_row<L, typename L::TY>(grad, team, o, row, dy), unpack_row<L, typename L::TY>(dy, t);
    if (o.weight2.data != nullptr) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        float along[C];
#pragma unroll
        for (int c = 0; c < C; ++c) along[c] = t[k][c] * xhat2[k][c];
        if (sums.has(kWeight2)) sums.add(kWeight2, k, along);
        if (sums.has(kNormBias2)) sums.add(kNormBias2, k, t[k]);
      }
      const float2 means = weigh<L>(o, o.weight2, team, xhat2, t);
      through_norm<L>(rstd2, means, xhat2, t);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float along[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        along[c] = t[k][c] * u[k][c];
        if constexpr (kNarrow) dweight[k][c] += along[c], dnorm_bias[k][c] += t[k][c];
      }
      if constexpr (!kNarrow) {
        if (sums.has(kWeight)) sums.add(kWeight, k, along);
        if (sums.has(kNormBias)) sums.add(kNormBias, k, t[k]);
      }
    }
    const float2 means = weigh<L>(o, o.weight, team, u, t);
    through_norm<L>(rstd, means, u, t);

#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int column = L::column(team, k), inside = o.hidden - column;
      const int64_t at = row * o.hidden + column;
      const float (&du)[C] = t[k];
      float out[C];
      if (requested & (kX | bit(kBias))) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          out[c] = scalars.gate * du[c];
          if (o.seed != nullptr) out[c] = keep >> (k * C + c) & 1u ? out[c] * o.kept : 0.0f;
          if constexpr (kNarrow) dbias[k][c] += out[c];
        }
        if (requested & kX) write<typename L::TX>(dx, at, inside, out);
        if constexpr (!kNarrow)
          if (sums.has(kBias)) sums.add(kBias, k, out);
      }
      if (requested & kResidual) {
        if (o.scale.data == nullptr) {
          write<typename L::TR>(dresidual, at, inside, du);
        } else {
          read_parameter<L::kAligned>(o.scale, column, inside, out);
#pragma unroll
          for (int c = 0; c < C; ++c) out[c] *= du[c];
          write<typename L::TR>(dresidual, at, inside, out);
        }
      }
      // x and residual once more: few calls want these two, and the row is still in the cache.
      if (sums.has(kGate)) {
        Held<typename L::TX, C> again;
        again.read(o.x, at, inside);
        drop<L>(o, again, column, keep >> (k * C), out);
#pragma unroll
        for (int c = 0; c < C; ++c) dgate += du[c] * out[c];
      }
      if (sums.has(kScale)) {
        Held<typename L::TR, C> again;
        again.read(o.residual, at, inside);
        again.unpack(out);
#pragma unroll
        for (int c = 0; c < C; ++c) out[c] *= du[c];
        sums.add(kScale, k, out);
      }
      if (sums.has(kOffset)) sums.add(kOffset, k, du);
    }
  }

  if (sums.count == 0) return;
  if constexpr (kNarrow) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (sums.has(kBias)) sums.add(kBias, k, dbias[k]);
      if (sums.has(kWeight)) sums.add(kWeight, k, dweight[k]);
      if (sums.has(kNormBias)) sums.add(kNormBias, k, dnorm_bias[k]);
    }
  }
  if (sums.has(kGate)) sums.mine[sums.first(kGate) * sums.threads].x = dgate;  // its row sums to the gradient
  __syncthreads();
  write_partials<L>(o, team, sums, partials);
}

constexpr int kSumWarps = 8;

// (rows, size) to its column sums: warp w adds rows w, w + 8, ..., then the warps are added in order.
__global__ void __launch_bounds__(kSumWarps* kWarp)
    sum_partials(const float* __restrict__ partials, int64_t rows, int64_t size, float* __restrict__ sums) {
  __shared__ float parts[kSumWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  float sum = 0.0f;
  if (column < size)
#pragma unroll 4
    for (int64_t row = warp; row < rows; row += kSumWarps) sum += partials[row * size + column];
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= size) return;
#pragma unroll
  for (int other = 1; other < kSumWarps; ++other) sum += parts[other][lane];
  sums[column] = sum;
}

// ---- host: which kernel, how many threads, how many blocks ----

// How backward is cut into blocks of teams.
struct BackwardGrid {
  int warps, teams;
  int64_t blocks;
};

template <class L>
cudaError_t backward_grid(Queue queue, const NormOperands& o, BackwardGrid* grid) {
  int multiprocessors;
  const cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, queue.device);
  grid->warps = warps_a_row(o, L::kColumns);
  grid->teams = kWarpsPerBlock / grid->warps;
  const int64_t enough = divided_up(o.rows, grid->teams);
  grid->blocks = enough < multiprocessors ? enough : multiprocessors;
  return error;
}

template <class TX, class TR, class F>
cudaError_t call_with_layout(Types<TX, TR>, const NormOperands& o, const F& f) {
  if constexpr (!std::is_same_v<TX, Mixed>)
    if (o.hidden <= 8 * kWarp * kWarpsPerBlock) return f(Layout<TX, TR, 8>());
  if constexpr (std::is_same_v<TX, TR>) return f(Layout<TX, TR, 16>());
  return f(Layout<Mixed, Mixed, 16>());  // two types in very wide rows are not worth kernels of their own
}

// Calls f with backward's layout for these operands.
template <class F>
cudaError_t with_backward_layout(const NormOperands& o, const F& f) {
  return with_types(o, [&](auto types) { return call_with_layout(types, o, f); });
}

// The lowest `most` of the parameters that `requested` names.
int lowest(int requested, int most) {
  int taken = 0;
  for (int parameter = 0; parameter < kParameters && most > 0; ++parameter)
    if (requested & bit(parameter)) taken |= bit(parameter), --most;
  return taken;
}

int count_of(int requested) {
  int count = 0;
  for (int parameter = 0; parameter < kParameters; ++parameter) count += (requested & bit(parameter)) != 0;
  return count;
}

// One launch for all that is requested, unless the sums of a very wide row exceed a multiprocessor's shared
// memory: then further launches read the rows again for the parameters that are left.
template <class L>
cudaError_t launch_backward(
    Queue queue, const NormOperands& o, Array grad, Output dx, Output dresidual, int requested,
    float* partials, float* parameters) {
  constexpr int kRows = kX | kResidual, kStatic = 1024;  // shared memory that is not sums, at most
  int shared;
  cudaError_t error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device);
  BackwardGrid grid;
  if (error == cudaSuccess) error = backward_grid<L>(queue, o, &grid);
  const int threads = grid.teams * grid.warps * kWarp,
            bytes_a_sum = threads * L::kColumns * int(sizeof(float));
  int rows = requested & kRows, left = requested & ~kRows;
  while (error == cudaSuccess && (rows | left)) {
    const int now = lowest(left, (shared - kStatic) / bytes_a_sum), count = count_of(now);
    if (grid.blocks > 0)
      error = launch(
          queue, backward_rows<L>, grid.blocks, threads, static_cast<size_t>(count) * bytes_a_sum, o, grad,
          dx, dresidual, rows | now, partials, grid.warps);
    const int64_t size = static_cast<int64_t>(count) * o.hidden;
    if (error == cudaSuccess && count > 0)
      error = launch(
          queue, sum_partials, divided_up(size, kWarp), kSumWarps * kWarp, 0,
          static_cast<const float*>(partials), grid.blocks, size, parameters);
    parameters += size;
    left &= ~now;
    rows = 0;
  }
  return error;
}

}  // namespace

const char* gated_add_norm_partial_rows(Queue queue, const NormOperands& o, int64_t* partial_rows) {
  return described(with_backward_layout(o, [&](auto layout) {
    BackwardGrid grid;
    const cudaError_t error = backward_grid<decltype(layout)>(queue, o, &grid);
    *partial_rows = grid.blocks;
    return error;
  }));
}

const char* launch_gated_add_norm_backward(
    Queue queue, const NormOperands& o, Array grad, Output dx, Output dresidual, int64_t requested,
    float* partials, float* parameters) {
  const OnDevice on(queue.device);
  if (on.error != cudaSuccess) return described(on.error);
  return described(with_backward_layout(o, [&](auto layout) {
    return launch_backward<decltype(layout)>(
        queue, o, grad, dx, dresidual, static_cast<int>(requested), partials, parameters);
  }));
}

}  // namespace fastgate::cuda
