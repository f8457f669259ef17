// gated_add_norm on CUDA, forward: x and residual read once, y written once, nothing kept for backward.
//
// E is large enough for one warp a row up to 1024 columns: no barrier, and every load of a row is under way
// before the first is used.
#include "launch.cuh"
#include "norm_rows.cuh"

namespace fastgate::cuda {

namespace {

constexpr int kForwardWarps = 4;  // of a block, where one warp a row is enough

// Threads of a forward block at most: one warp a row up to the widest row of each layout but the last,
// kWidest there.
template <class L>
constexpr int kForwardThreads =
    L::kAligned && L::kColumns < 32 ? kForwardWarps * kWarp : kWidest / L::kColumns;

// Threads of a multiprocessor that a forward kernel leaves registers for: the more columns each holds, the
// fewer.
template <class L>
constexpr int kForwardResident = L::kColumns == 16 && L::kAligned ? 1024
                                 : L::kColumns == 24              ? 640
                                                                  : 512;

template <class L>
__global__ void __launch_bounds__(kForwardThreads<L>, kForwardResident<L> / kForwardThreads<L>)
    forward_rows(const __grid_constant__ NormOperands o, const Output y, int warps) {
  Team team(warps);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / team.threads()) + team.place;
  if (row >= o.rows) return;
  HeldRow<L, typename L::TX> x;
  HeldRow<L, typename L::TR> residual;
  read_row<L, typename L::TX>(o.x, team, o, row, x);
  read_row<L, typename L::TR>(o.residual, team, o, row, residual);
  const Scalars scalars(o);
  typename L::Values u;
  uint32_t keep;
  mix<L, false>(o, scalars, team, row, x, residual, u, keep);
  normalise<L>(o, o.eps, team, u);
  affine<L>(o, o.weight, o.norm_bias, team, u, u);
  if (o.weight2.data != nullptr) {
    normalise<L>(o, o.eps2, team, u);
    affine<L>(o, o.weight2, o.norm_bias2, team, u, u);
  }
#pragma unroll
  for (int k = 0; k < L::kChunks; ++k) {
    const int column = L::column(team, k);
    write<typename L::TY>(y, row * o.hidden + column, o.hidden - column, u[k]);
  }
}

// ---- host: which kernel, how many threads, how many blocks ----

template <class L>
cudaError_t launch_forward(Queue queue, const NormOperands& o, Output y) {
  const int warps = warps_a_row(o, L::kColumns), teams = warps == 1 ? kForwardWarps : 1;
  return launch(queue, forward_rows<L>, divided_up(o.rows, teams), teams * warps * kWarp, 0, o, y, warps);
}

template <class TX, class TR>
cudaError_t launch_forward(Types<TX, TR>, Queue queue, const NormOperands& o, Output y) {
  if constexpr (std::is_same_v<TX, Mixed>) {
    return launch_forward<Layout<TX, TR, 16>>(queue, o, y);
  } else {
    if (o.hidden <= 16 * kWarp) return launch_forward<Layout<TX, TR, 16>>(queue, o, y);
    if (o.hidden <= 24 * kWarp) return launch_forward<Layout<TX, TR, 24>>(queue, o, y);
    return launch_forward<Layout<TX, TR, 32>>(queue, o, y);
  }
}

}  // namespace

const char* launch_gated_add_norm(Queue queue, const NormOperands& o, Output y) {
  if (o.rows == 0) return nullptr;
  const OnDevice on(queue.device);
  if (on.error != cudaSuccess) return described(on.error);
  return described(with_types(o, [&](auto types) { return launch_forward(types, queue, o, y); }));
}

}  // namespace fastgate::cuda
